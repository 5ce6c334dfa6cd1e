"""vLLM's real scheduler over a simulated model, with the connector's both sides between them.

The "KV" of a token is a number computed from the token before it *as it is read from the KV memory*
and from the token; the next token is computed from the last one's KV. So a wrong byte anywhere in a
request's blocks changes its output, as in a real model, and output can be compared with
:func:`expected`. Nothing here depends on timing: the test decides when outputs are delivered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from standin import StandinStore, World
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from ucm.integration.vllm import geometry, stores, worker
from ucm.integration.vllm.batches import Batches
from ucm.integration.vllm.rank import Rank
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.streams import ComputeStream
from ucm.integration.vllm.ucm_connector import UCMConnector

BLOCK = 16
LAYERS = ("model.layers.0.attn", "model.layers.1.attn")
MODULUS = (1 << 61) - 1
GARBAGE = 0x5A5A5A5A5A5A
VOCABULARY = 500


def mix(before: int, token: int) -> int:
    return (before * 6364136223846793005 + token * 1442695040888963407 + 12345) % MODULUS


def sample(kv: int) -> int:
    return (kv >> 17) % VOCABULARY


def expected(prompt: list[int], count: int) -> list[int]:
    """The output of a model whose KV was never stored anywhere."""
    kv, out = 7, []
    for token in prompt:
        kv = mix(kv, token)
    for _ in range(count):
        out.append(sample(kv))
        kv = mix(kv, out[-1])
    return out


@dataclass
class Running:
    """The worker's view of a request."""

    tokens: list[int]
    tables: list[list[int]]
    """Of each KV cache group."""
    prompt: int
    """Tokens of the prompt."""


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    reason: Any = None
    params: Any = None


def make_request(name: str, prompt: list[int], count: int = 8, **options: Any) -> Request:
    """A request of whichever vLLM this is."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    transfer = options.pop("kv_transfer_params", None)
    if transfer is not None:
        params.extra_args = {"kv_transfer_params": transfer}
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    options["block_hasher"] = get_request_block_hasher(BLOCK, sha256)
    try:
        return Request(name, prompt, params, None, **options)
    except TypeError:
        return Request(name, prompt, params, None, None, **options)


class NoConverters:
    def close(self) -> None:
        pass


class Simulation:
    def __init__(
        self, vllm_config: Any, world: World, blocks: int = 64, *, asynchronous: bool = False,
        layerwise: bool = False, window: int = 0, stream: Any = None,
    ) -> None:  # fmt: skip
        """``window``: the second layer is in a group of its own, and sees so many tokens. ``stream``: that of
        a device; without one the model computes on the CPU."""
        self.world = world
        self.window = window
        page: dict[str, Any] = {"num_kv_heads": 1, "head_size": 2, "dtype": torch.bfloat16}
        spec = FullAttentionSpec(block_size=BLOCK, **page)
        groups = [KVCacheGroupSpec(list(LAYERS), spec)]
        if window:
            slides = SlidingWindowSpec(block_size=BLOCK, sliding_window=window, **page)
            groups = [KVCacheGroupSpec([LAYERS[0]], spec), KVCacheGroupSpec([LAYERS[1]], slides)]
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        vllm_config.cache_config.num_gpu_blocks = blocks
        vllm_config.cache_config.block_size = BLOCK
        vllm_config.scheduler_config.async_scheduling = asynchronous
        stores.open_lookup = lambda c, n, part_bytes, count: StandinStore(world, [part_bytes])
        cls = AsyncScheduler if asynchronous else Scheduler
        self.scheduler = cls(
            vllm_config=vllm_config,
            kv_cache_config=config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK,
            log_stats=True,
        )
        # Groups share memory: a block belongs to one of them at a time.
        every = [torch.full((blocks, BLOCK), GARBAGE, dtype=torch.int64) for _ in range(1 if window else 2)]
        self.memory = {name: every[i % len(every)] for i, name in enumerate(LAYERS)}
        self.connector = UCMConnector(vllm_config, KVConnectorRole.WORKER, config)
        shape = self.connector._shape
        layout = geometry.build(self.memory, blocks, spec.page_size_bytes * 2, shape.names, shape.groups)
        batches = Batches(layout, layerwise=layerwise or shape.count > 1, columns=shape.count)
        shards = len(LAYERS) if batches.layerwise else 1
        slices = layout.slice_lengths[: len(layout.slice_lengths) // shards]
        store = StandinStore(world, slices, shards=shards)
        self.connector._worker = worker.WorkerSide(
            self.connector._config, Rank(0, 0, 1, True), layout, batches,
            store, stream or ComputeStream("cpu"), BLOCK, NoConverters(), layerwise=layerwise,
            fails_requests=shape.windowed,
        )  # fmt: skip
        self.running: dict[str, Running] = {}
        self.pending: deque[tuple[Any, Any]] = deque()
        self.results: dict[str, Result] = {}
        self.reports: list[Any] = []
        self.preemptions = 0
        self.counted = UcmStats()
        """The statistics that vLLM would publish."""

    # -- the engine's loop ----------------------------------------------------------------------

    def add(self, name: str, prompt: list[int], count: int = 8, **options: Any) -> Request:
        request = make_request(name, prompt, count, **options)
        self.results[name] = Result()
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Any:
        """Schedules one step and runs it; its output waits to be delivered."""
        output = self.scheduler.schedule()
        self.pending.append((output, self._run(output)))
        return output

    def deliver(self) -> None:
        """Gives the oldest output to the scheduler."""
        output, result = self.pending.popleft()
        for produced in self.scheduler.update_from_output(output, result).values():
            stats = getattr(produced.scheduler_stats, "kv_connector_stats", None)
            if produced.outputs and stats:  # vLLM's offline engine drops those of other steps
                self.counted.aggregate(UcmStats(stats))
            for one in produced.outputs:
                entry = self.results[one.request_id]
                entry.tokens += one.new_token_ids
                entry.reason = one.finish_reason or entry.reason
                entry.params = one.kv_transfer_params or entry.params

    def step(self) -> Any:
        output = self.schedule()
        self.deliver()
        return output

    def run(self, steps: int = 400, depth: int = 1) -> None:
        """Steps until nothing is left; ``depth`` outputs are in flight."""
        for _ in range(steps):
            if not self.scheduler.has_requests():
                break
            self.schedule()
            while len(self.pending) >= depth:
                self.deliver()
        while self.pending:
            self.deliver()
        waiting = [name for name, one in self.scheduler.requests.items() if not one.is_finished()]
        assert not waiting, f"requests {waiting} are stuck"
        self.settle()

    def settle(self) -> None:
        """Steps until held requests are free."""
        for _ in range(20):
            if not self.scheduler.requests and not self.pending:
                return
            self.step()
        assert not self.scheduler.requests, "held requests were never released"

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    # -- the worker -----------------------------------------------------------------------------

    def _run(self, output: Any) -> Any:
        connector, step = self.connector, output.kv_connector_metadata
        self.preemptions += len(step.preempted)
        if getattr(output, "preempted_req_ids", None) or hasattr(connector, "build_connector_worker_meta"):
            connector.handle_preemptions(step)
        connector.bind_connector_metadata(step)
        late = getattr(output, "has_sync_kv_loads", None) is False
        if not late:
            connector.start_load_kv(None)
        for name in LAYERS if output.total_num_scheduled_tokens else ():
            connector.wait_for_layer_load(name)
        sampled = self._forward(output)
        for name in LAYERS if output.total_num_scheduled_tokens else ():
            connector.save_kv_layer(name, None, None)
        if late:
            connector.start_load_kv(None)
        if output.total_num_scheduled_tokens or late:
            connector.wait_for_save()
        report = KVConnectorOutput()
        if hasattr(report, "failed_recving"):
            results = connector.get_transfer_results(output.finished_req_ids)
            report.finished_sending, report.finished_recving, report.failed_recving = (
                results.finished_sending, results.finished_recving, results.failed_recving,
            )  # fmt: skip
        else:
            report.finished_sending, report.finished_recving = connector.get_finished(output.finished_req_ids)
        report.invalid_block_ids = connector.get_block_ids_with_load_errors()
        report.kv_connector_stats = connector.get_kv_connector_stats()
        if hasattr(report, "kv_connector_worker_meta"):
            report.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        self.reports.append(report)
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            pooler_output=[None] * len(names),
            kv_connector_output=report,
        )

    def _forward(self, output: Any) -> dict[str, list[int]]:
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.running[new.req_id] = Running(
                list(new.prompt_token_ids), [list(group) for group in new.block_ids],
                len(new.prompt_token_ids),
            )  # fmt: skip
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            state, blocks = self.running[name], cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                state.tables = [list(group) for group in blocks]
                state.tokens = list(self.scheduler.requests[name].all_token_ids)
            elif blocks:
                for table, more in zip(state.tables, blocks, strict=True):
                    table.extend(more)
            # Output of a step whose load failed was thrown away by the scheduler.
            del state.tokens[state.prompt + cached.num_output_tokens[i] :]
            starts[name] = cached.num_computed_tokens[i]
        return {
            name: self._compute(self.running[name], starts[name], count)
            for name, count in output.num_scheduled_tokens.items()
        }

    def _compute(self, state: Running, start: int, count: int) -> list[int]:
        del state.tokens[max(start + count, len(state.tokens)) :]
        kv = 7
        for position in range(start + count):
            offset = position % BLOCK
            places = [
                self.memory[name][state.tables[i % len(state.tables)][position // BLOCK]]
                for i, name in enumerate(LAYERS)
            ]
            if position >= start:
                kv = mix(kv, state.tokens[position])
                for place in places:
                    place[offset] = kv
                continue
            if self.window and position <= start - self.window:
                places.pop()  # nobody looks there any more
            values = {int(place[offset]) for place in places}
            kv = values.pop() if len(values) == 1 else GARBAGE
        if start + count < len(state.tokens):
            return []
        state.tokens.append(sample(kv))
        return [state.tokens[-1]]
