"""``UCMConnector``: the class that vLLM loads.

Owns the translation of vLLM's connector interface, which differs by version, into the two halves in
``scheduler.py`` and ``worker.py``. Importing this module does nothing else.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.config import load as load_config
from ucm.integration.vllm.metadata import (
    CAN_FAIL_REQUESTS,
    REPORTS_IN_STATS,
    Groups,
    StepMetadata,
    TransferResults,
    carrier_of,
)
from ucm.integration.vllm.stats import UcmPromMetrics, UcmStats

if TYPE_CHECKING:
    from ucm.integration.vllm.convert import PageShape
    from ucm.integration.vllm.geometry import Layout
    from ucm.integration.vllm.namespace import Namespace
    from ucm.integration.vllm.rank import Rank
    from ucm.integration.vllm.scheduler import SchedulerSide
    from ucm.integration.vllm.siblings import Siblings
    from ucm.integration.vllm.worker import WorkerSide

logger = logging.getLogger("vllm.ucm")


def _rank(vllm_config: Any, index: int, stage: int = 0) -> Rank:
    from ucm.integration.vllm.platform import is_mla
    from ucm.integration.vllm.rank import rank_of

    parallel = vllm_config.parallel_config
    return rank_of(
        index,
        int(parallel.tensor_parallel_size),
        int(vllm_config.model_config.get_total_num_kv_heads()),
        shared=is_mla(vllm_config),
        stage=stage,
        stages=int(parallel.pipeline_parallel_size),
    )


def _name(transfer: Any) -> str:
    """Tells this connector from another of this class in the same server; the same in all its processes."""
    settings = json.dumps([transfer.kv_role, transfer.kv_connector_extra_config], sort_keys=True, default=str)
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def _set_failure_policy(vllm_config: Any, config: ConnectorConfig) -> None:
    transfer = vllm_config.kv_transfer_config
    if config.strict_load_failure:
        logger.info("strict_load_failure: kv_load_failure_policy stays %s", transfer.kv_load_failure_policy)
    elif transfer.kv_load_failure_policy != "recompute":
        transfer.kv_load_failure_policy = "recompute"
        logger.info(
            "kv_load_failure_policy is set to recompute: blocks that cannot be loaded are computed "
            "(strict_load_failure: true keeps vLLM's fail)"
        )


class UCMConnector(KVConnectorBase_V1, Groups):  # type: ignore[misc]
    """Saves KV blocks to UCM's store and loads them from it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        from ucm.integration.vllm.groups import group_shape
        from ucm.integration.vllm.platform import find_namespace

        transfer = self._kv_transfer_config
        self._config = dataclasses.replace(
            load_config(transfer.kv_connector_extra_config), instance=str(transfer.engine_id or "")
        )
        self._name = _name(transfer)
        self._shape = group_shape(kv_cache_config, can_fail_requests=CAN_FAIL_REQUESTS)
        self._namespace: Namespace = find_namespace(vllm_config, self._config, self._shape.block_tokens)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._open_scheduler()
        atexit.register(self.shutdown)

    def _open_scheduler(self) -> SchedulerSide:
        from ucm.integration.vllm.scheduler import SchedulerSide
        from ucm.integration.vllm.stores import open_lookup

        _set_failure_policy(self._vllm_config, self._config)
        store = open_lookup(
            self._config, self._namespace, self._shape.part_bytes, _rank(self._vllm_config, 0).part_count
        )
        logger.info("UCM namespace: %s", self._namespace.describe())
        self._tell_neighbours()
        transfer = self._kv_transfer_config
        return SchedulerSide(
            self._config,
            self._namespace,
            store,
            self._shape,
            siblings=self._siblings(),
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            writer=str(transfer.engine_id),
        )

    def _tell_neighbours(self) -> None:
        """Says what keeps this server from blocks of servers that differ in one thing."""
        from ucm.integration.vllm.namespace import neighbours

        for path, fields in neighbours(self._namespace, self._config.backends):
            if len(fields) == 1:
                for name, (mine, other) in fields.items():
                    logger.info(
                        "%s holds blocks of a namespace that differs in %s: %r here, %r there",
                        path,
                        name,
                        mine,
                        other,
                    )

    def _siblings(self) -> Siblings:
        from ucm.integration.vllm.convert import readable
        from ucm.integration.vllm.siblings import Siblings
        from ucm.integration.vllm.stores import open_lookup

        parts = _rank(self._vllm_config, 0).part_count

        def open_order(order: str) -> Any:
            namespace = dataclasses.replace(self._namespace, order=order)
            return open_lookup(self._config, namespace, self._shape.part_bytes, parts)

        orders = readable(self._namespace.order) if self._shape.page is not None else ()
        return Siblings(orders, self._config.backends, open_order)

    # -- worker -------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        from ucm.integration.vllm import geometry
        from ucm.integration.vllm.batches import Batches
        from ucm.integration.vllm.converters import Converters
        from ucm.integration.vllm.platform import local_ranks
        from ucm.integration.vllm.stores import open_transfer
        from ucm.integration.vllm.streams import ComputeStream
        from ucm.integration.vllm.worker import WorkerSide

        shape = self._shape
        layout = geometry.build(kv_caches, shape.block_count, shape.part_bytes, shape.names, shape.groups)
        rank = _rank(
            self._vllm_config, int(get_tensor_model_parallel_rank()), int(get_pp_group().rank_in_group)
        )
        rank = dataclasses.replace(rank, local_ranks=local_ranks(self._vllm_config))
        first = next(iter(kv_caches.values()))
        device = (first[0] if isinstance(first, (tuple, list)) else first).device
        layerwise = self._layerwise(layout)
        batches = Batches(layout, layerwise=layerwise or shape.count > 1, columns=shape.count)
        store = open_transfer(
            self._config, self._namespace, layout, rank, device, layerwise=batches.layerwise
        )
        stream = ComputeStream(device.type)
        converters = Converters(
            self._config, self._namespace, layout, rank, device, self._page(layout, rank),
            columns=shape.count,
        )  # fmt: skip
        self._worker = WorkerSide(
            self._config, rank, layout, batches, store, stream, shape.block_tokens, converters,
            layerwise=layerwise, fails_requests=shape.windowed,
        )  # fmt: skip
        logger.info(
            "UCM worker: rank %d, part %d of %d, %d layers, %d bytes a block, KV cache groups: %d",
            rank.index, rank.part, rank.part_count, len(layout.layers), layout.part_bytes, shape.count,
        )  # fmt: skip

    def _page(self, layout: Layout, rank: Rank) -> PageShape | None:
        """The shape of a page, where other byte orders can be read into it."""
        from ucm.integration.vllm.convert import page_shape
        from ucm.integration.vllm.order import PRIVATE, TOKEN_MAJOR
        from ucm.integration.vllm.platform import find_platform, refuse_other_backends

        shape = self._shape
        platform = find_platform(self._vllm_config, shape.block_tokens)
        refuse_other_backends(self._vllm_config, self._namespace, platform, shape.names)
        expected = shape.block_tokens // platform.kernel_tokens if platform.kernel_tokens else 1
        named = not self._namespace.order.startswith(PRIVATE)
        if layout.kernel_blocks != expected and named and self._namespace.order not in TOKEN_MAJOR:
            raise ValueError(
                f"the attention kernel splits a block of {shape.block_tokens} tokens into "
                f"{layout.kernel_blocks}, which the byte order {self._namespace.order} does not say; "
                f"use --block-size {shape.block_tokens // layout.kernel_blocks}"
            )
        return page_shape(layout, self._namespace.order, shape.block_tokens, shape.page)

    def _layerwise(self, layout: Layout) -> bool:
        """Whether saves go layer by layer: asked for, and possible."""
        from ucm.integration.vllm.groups import ONE_GROUP

        obstacle = layout.layerwise_obstacle()
        if obstacle and self._shape.count > 1:
            raise ValueError(
                f"the model has {self._shape.count} KV cache groups, of which each is loaded by itself, and "
                f"{obstacle}; {ONE_GROUP}"
            )
        if not self._config.use_layerwise:
            return False
        if getattr(self._vllm_config.parallel_config, "enable_dbo", False):
            obstacle = "with --enable-dbo a layer is computed in two halves"
        if obstacle:
            logger.warning("use_layerwise has no effect: %s; whole blocks are transferred", obstacle)
        return obstacle is None

    def _step(self) -> StepMetadata:
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        # Always before the forward pass; start_load_kv may come after it.
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            with self._worker.stats.timed("worker_seconds"):
                self._worker.begin(connector_metadata)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            # A set of request ids up to 0.17, the step's metadata after it.
            ids = getattr(kv_connector_metadata, "preempted", kv_connector_metadata)
            self._worker.preempted(ids, alone=self._is_alone())

    def _is_alone(self) -> bool:
        """Whether vLLM has no other connector beside this one, as under MultiConnector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        return not has_kv_transfer_group() or get_kv_transfer_group() is self

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            mode = getattr(getattr(forward_context, "cudagraph_runtime_mode", None), "name", "")
            # Runner V2 replays a whole graph under a context that says nothing of it, nor of attention.
            silent = forward_context is not None and forward_context.attn_metadata is None
            with self._worker.stats.timed("worker_seconds"):
                self._worker.start_loads(self._step(), whole_graph=silent or mode == "FULL")

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        # After the draft model's pass, where there is one; not called in steps without a pass.
        if self._worker is not None:
            with self._worker.stats.timed("worker_seconds"):
                self._worker.save_step(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        with self._worker.stats.timed("worker_seconds"):
            return self._worker.finished()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        sent, received = self.get_finished(finished_req_ids)
        failed = self._worker.failed_requests() if self._worker is not None else set()
        return TransferResults(sent or set(), received or set(), failed)

    def build_connector_worker_meta(self) -> Any:
        return self._worker.report() if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid() if self._worker is not None else set()

    def shutdown(self) -> None:
        worker, self._worker = self._worker, None
        scheduler, self._scheduler = self._scheduler, None
        if worker is not None:
            worker.close()
        if scheduler is not None:
            scheduler.close()

    # -- scheduler ----------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        # A dropped save is a future miss; a promise that is not kept ends with the wait for it.
        return False

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.bind(gpu_block_pool)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        with self._scheduler.stats.timed("scheduler_seconds"):
            return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        with self._scheduler.stats.timed("scheduler_seconds"):
            self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self._scheduler is not None
        with self._scheduler.stats.timed("scheduler_seconds"):
            return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        carrier: UcmStats | None = None
        report = getattr(connector_output, "kv_connector_worker_meta", None)
        if REPORTS_IN_STATS:
            carrier = carrier_of(connector_output, self._name)
            report = carrier.report if carrier is not None else None
        with self._scheduler.stats.timed("scheduler_seconds"):
            self._scheduler.worker_output(connector_output, report)
        if carrier is not None and (stats := self._scheduler.take_stats()) is not None:
            carrier.aggregate(stats)  # vLLM has asked for them before it said what the step was

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        with self._scheduler.stats.timed("scheduler_seconds"):
            return self._scheduler.finished(request, list(block_ids))

    def reset_cache(self) -> bool | None:
        assert self._scheduler is not None
        from ucm.integration.vllm.worker import LOCAL

        # vLLM calls this before it puts the engine to sleep, and gives the memory back right after it.
        for worker in LOCAL:
            worker.drain()
        return self._scheduler.reset_cache()

    # -- both ---------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> UcmStats | None:
        if self._scheduler is not None:
            # Where workers report within theirs, the scheduler side adds its own to those.
            return None if REPORTS_IN_STATS else self._scheduler.take_stats()
        if self._worker is None:
            return None
        stats = self._worker.take_stats()
        if REPORTS_IN_STATS:
            stats = stats or UcmStats()
            stats.report = dataclasses.replace(self._worker.report(), connector=self._name)
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> UcmStats:
        return UcmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> UcmPromMetrics:
        from ucm.integration.vllm.platform import find_namespace

        labels: dict[str, str] = {}
        try:
            config = load_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
            block_tokens = int(vllm_config.cache_config.block_size)
            labels = find_namespace(vllm_config, config, block_tokens).describe()
        except Exception as error:  # metrics must not stop a server
            logger.warning("ucm_namespace_info is not published: %s", error)
        return UcmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues, labels)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return load_config(extra_config).use_layerwise
