"""The scheduler side: which blocks a request loads and saves, and when its memory may go.

Owns one ``RequestState`` per live request. Looks up; transfers nothing. All methods are called on
the scheduler's thread and none waits.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from ucm.integration.vllm import handoff
from ucm.integration.vllm.chain import BlockChain
from ucm.integration.vllm.config import ConnectorConfig, Handoff
from ucm.integration.vllm.geometry import NULL_BLOCK
from ucm.integration.vllm.groups import GroupShape
from ucm.integration.vllm.hashing import AdapterDigests, RequestExtras
from ucm.integration.vllm.holds import Holds
from ucm.integration.vllm.metadata import StepMetadata, Transfer, WorkerReport
from ucm.integration.vllm.namespace import Namespace
from ucm.integration.vllm.pins import Pins
from ucm.integration.vllm.request_state import RequestState
from ucm.integration.vllm.siblings import Siblings
from ucm.integration.vllm.stats import MISMATCH_PREFIX, UcmStats
from ucm.store import ANY_PROMISE

EPOCH_BYTES: Final = 16

LOOKUP_KEEP_S: Final = 1.0
"""A request that waits for memory is looked up again this often, in case blocks were evicted."""

logger = logging.getLogger("vllm.ucm.scheduler")


class SchedulerSide:
    """The scheduler's half of the connector."""

    def __init__(
        self,
        config: ConnectorConfig,
        namespace: Namespace,
        store: Any,
        shape: GroupShape,
        *,
        siblings: Siblings,
        loads: bool,
        saves: bool,
        writer: str,
    ) -> None:
        self._config = config
        self._namespace = namespace
        self._store = store
        self._siblings = siblings
        self._block_tokens = shape.block_tokens
        self._windowed = shape.windowed
        self._pinned = shape.windowed or shape.zeroed
        self._pins = Pins()
        self._loads = loads
        self._saves = saves
        self._writer = writer
        self._adapters = AdapterDigests()
        self._requests: dict[str, RequestState] = {}
        self._step = StepMetadata(number=1)
        self._epoch = b""
        """Empty until the weights change under the running server."""
        self._copied_step = 0
        self._holds = Holds(config.timeout_ms)
        self._loads_in_step = (
            config.use_layerwise
            and config.has_cache
            and config.handoff is Handoff.PROMISE
            # Of a request that runs, a failure in one of several groups cannot be reported.
            and not shape.windowed
        )
        self._doubtful_step = 0
        """The last step that loads blocks in itself."""
        self._seen_step = 0
        """The last step whose failures are known."""
        self._empty_steps: set[int] = set()
        """Steps under way that compute nothing."""
        self._computes = False
        """Whether the step that was heard of last computed anything."""
        self.stats = UcmStats()

    # -- loading ------------------------------------------------------------------------------

    def _state(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None:
            extras = RequestExtras(request, self._block_tokens, self._adapters.of, self._epoch)
            chain = BlockChain(self._store, extras, self._block_tokens)
            promises = handoff.read(getattr(request, "kv_transfer_params", None)) if self._loads else []
            wait = handoff.Wait(promises, self._config.handoff_wait_ms) if promises else None
            number = handoff.new_number() if self._saves else ANY_PROMISE
            state = self._requests[request.request_id] = RequestState(request, chain, wait, number)
        return state

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed_tokens`` the store holds; None: ask again."""
        state = self._state(request)
        if not self._loads:
            return 0, False
        first, limit = computed_tokens // self._block_tokens, self._limit(state)
        obstacle = self._obstacle(state, computed_tokens, limit)
        if obstacle:
            if not state.told:
                self._explain(state, obstacle)
            return 0, False
        now = time.monotonic()
        key = (first, limit)
        waiting = state.wait is not None
        keep = self._config.lookup_refresh_ms / 1000 if waiting else LOOKUP_KEEP_S
        if state.lookup_key != key or now - state.lookup_at >= keep:
            self._look_up(state, first, limit, now)
        elif waiting:
            return None, False
        if state.wait is not None and not self._arrived(state, first, limit, now):
            return None, False
        if not state.told:
            self._tell(state, computed_tokens)
        tokens = state.hits * self._block_tokens
        if tokens == 0 or tokens < self._config.load_tokens_threshold:
            return 0, False
        if not self._loads_in_step or state.whole or state.sources:
            return tokens, True
        return self._held_tokens(state, first, now)

    def _limit(self, state: RequestState) -> int:
        """The block that loads end before: at least the last token is computed, to sample the next."""
        limit: int = (state.request.num_tokens - 1) // self._block_tokens
        if self._config.hit_ratio < 1:
            limit = int(limit * self._config.hit_ratio)
        return limit if state.cap is None else min(limit, state.cap)

    def _obstacle(self, state: RequestState, computed_tokens: int, limit: int) -> str:
        """Why the store is not asked about a request; empty: it is."""
        request, size = state.request, self._block_tokens
        if request.skip_reading_prefix_cache:
            return "it asks not to read the prefix cache"
        if self._is_short(request):
            least = self._config.persist_token_threshold
            return f"its {request.num_prompt_tokens} tokens are below persist_token_threshold, {least}"
        if state.frozen:
            return "the weights changed while it ran"
        if computed_tokens % size:
            return f"vLLM has {computed_tokens} tokens of it, which do not end with a block of {size}"
        if request.num_tokens <= size:
            return f"its {request.num_tokens} tokens have no block of {size} before the last token"
        if limit <= computed_tokens // size:
            return (
                f"of its {request.num_tokens} tokens {limit} blocks of {size} may be loaded, "
                f"and vLLM has {computed_tokens // size}"
            )
        return ""

    def _held_tokens(self, state: RequestState, first: int, now: float) -> tuple[int | None, bool]:
        """What of the hits is in the workers' memory, so that a step can load it layer by layer."""
        held = state.held
        if held is None or not held.covers(first):
            self._holds.release(self._step, held)
            ids = state.chain.upto(state.request, first + state.hits)[first:]
            state.held = self._holds.ask(self._step, ids, first, now)
            return None, False
        if held.ready is None and now < held.deadline:
            return None, False
        if held.is_refused:
            self._release(state)
            state.whole = True
            return state.hits * self._block_tokens, True
        if held.ready is None:
            self.stats.add("hold_timeouts")
            logger.warning("request %s: no worker said that its blocks are held", state.request.request_id)
        if held.is_short or held.ready is None:
            state.cap = held.end  # what cannot be read is computed
        blocks = min(held.end - first, state.hits)
        if blocks <= 0:
            self._release(state)
            return 0, False
        return blocks * self._block_tokens, False

    def _release(self, state: RequestState) -> None:
        self._holds.release(self._step, state.held)
        state.held = None

    def _is_short(self, request: Any) -> bool:
        return bool(request.num_prompt_tokens < self._config.persist_token_threshold)

    def _look_up(self, state: RequestState, first: int, limit: int, now: float) -> None:
        ids = state.chain.upto(state.request, limit)
        try:
            state.hits, state.sources = self._siblings.prefix(self._store, ids[first:])
            state.failure = ""
        except Exception as error:  # a store that fails is a store that holds nothing
            logger.warning("lookup failed, request %s computes: %s", state.request.request_id, error)
            state.hits, state.failure = 0, str(error)
        state.lookup_key, state.lookup_at = (first, limit), now

    def _arrived(self, state: RequestState, first: int, limit: int, now: float) -> bool:
        """Whether the wait for a promise is over."""
        wait = state.wait
        assert wait is not None
        fields: list[str] = []
        if wait.kept is None:
            full = state.request.num_tokens // self._block_tokens
            fields = wait.compare(self._namespace, state.chain.upto(state.request, full))
            for field in fields:
                self.stats.add(MISMATCH_PREFIX + field)
        wanted = min(wait.blocks, limit)
        end = first + state.hits
        reason = ""
        if fields:
            reason = f"it differs in {', '.join(fields)}"
            logger.warning(
                "request %s: announced KV cannot be used here, %s", state.request.request_id, reason
            )
        elif end < wanted:
            if now >= wait.deadline:
                self.stats.add("handoff_timeouts")
                reason = f"{wanted - end} of {wanted} blocks were not published in time"
            elif end >= self._promised(state, wait, end, limit):
                self.stats.add("handoff_abandoned")
                reason = "their writer gave them up"
            else:
                wait.waited = True
                return False
            logger.warning("request %s: announced blocks missing, %s", state.request.request_id, reason)
        if wait.waited:
            self.stats.add("handoff_waits")
            self.stats.add("handoff_wait_seconds", now - wait.started)
        state.wait = None
        return True

    def _promised(self, state: RequestState, wait: handoff.Wait, first: int, limit: int) -> int:
        """How many blocks are still promised; not by promises of which one from ``first`` on was given up."""
        assert wait.kept is not None
        for promise in list(wait.kept):
            ids = state.chain.upto(state.request, min(promise.blocks, limit))[first:]
            if self._store.lookup_abandoned(ids, promise.number).any():
                wait.kept.remove(promise)
        return min(wait.blocks, limit)

    def _tell(self, state: RequestState, computed_tokens: int) -> None:
        state.told = True
        request, size = state.request, self._block_tokens
        self.stats.add("queried_tokens", request.num_tokens)
        self.stats.add("hbm_hit_tokens", computed_tokens)
        # One line for both: written and flushed, a line costs more than the lookup.
        reason = "" if state.explained else self._why_nothing(state, computed_tokens)
        state.explained = state.explained or bool(reason)
        logger.info(
            "request_id: %s, total_blocks_num: %d, hit hbm: %d, hit external: %d%s",
            request.request_id, request.num_tokens // size, computed_tokens // size, state.hits,
            f"; loads nothing external: {reason}" if reason else "",
        )  # fmt: skip

    def _why_nothing(self, state: RequestState, computed_tokens: int) -> str:
        """Why nothing of what was looked up is loaded; empty: something is."""
        size, least = self._block_tokens, self._config.load_tokens_threshold
        if state.failure:
            return f"the lookup failed, {state.failure}"
        if state.hits == 0:
            block = computed_tokens // size
            name = state.chain.upto(state.request, block + 1)[-1].tobytes().hex()
            where = f"namespace {self._namespace.logical}, order {self._namespace.order}"
            return f"block {block} (id {name}) is not in {where}"
        if state.hits * size < least:
            return f"{state.hits * size} tokens are below load_tokens_threshold, {least}"
        return ""

    @staticmethod
    def _explain(state: RequestState, reason: str) -> None:
        """Says once why a request loads nothing."""
        if not state.explained:
            state.explained = True
            logger.info("request_id: %s loads nothing external: %s", state.request.request_id, reason)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """vLLM has given memory to the tokens that ``matched`` promised."""
        if external_tokens <= 0:
            unused = self._requests.get(request.request_id)
            if unused is not None:
                self._release(unused)
            return
        state = self._requests[request.request_id]
        table = blocks.get_block_ids()
        first, _ = state.lookup_key
        count = external_tokens // self._block_tokens
        slots = _rows(table, range(first, first + count))
        ids = state.chain.upto(request, first + count)[first:]
        state.load_first, state.load_slots = first, slots
        state.lookup_key = (-1, -1)
        self.stats.add("hit_tokens", external_tokens)
        load = Transfer(request.request_id, ids.tobytes(), slots, state.sources[:count])
        held, state.held = state.held, None
        state.in_step = held is not None
        if held is not None:
            load.hold = held.number
            self._holds.loaded(held)
        self._step.loads.append(load)

    # -- saving -------------------------------------------------------------------------------

    def build(self, scheduler_output: Any) -> StepMetadata:
        """The metadata of the step that was just scheduled."""
        step, self._step = self._step, StepMetadata(number=self._step.number + 1)
        step.computes = scheduler_output.total_num_scheduled_tokens > 0
        self.stats.add("steps", step.computes)
        if not step.computes:
            self._empty_steps.add(step.number)
        if any(load.hold for load in step.loads):
            self._doubtful_step = step.number
        step.preempted = list(getattr(scheduler_output, "preempted_req_ids", None) or ())
        for request_id in step.preempted:
            state = self._requests.get(request_id)
            if state is not None:
                state.save_step = 0  # the worker waits for these copies before it goes on
                state.table = []
                state.load_slots = None
        scheduled = scheduler_output.num_scheduled_tokens
        current = scheduler_output.kv_connector_block_state if self._windowed else None
        for new in scheduler_output.scheduled_new_reqs:
            self._advance(step, new.req_id, new.block_ids, True, new.num_computed_tokens, scheduled, current)
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            self._advance(
                step, request_id, cached.new_block_ids[i], request_id in cached.resumed_req_ids,
                cached.num_computed_tokens[i], scheduled, current,
            )  # fmt: skip
        return step

    def bind(self, pool: Any) -> None:
        """vLLM's blocks."""
        self._pins.bind(pool)

    def _advance(
        self, step: StepMetadata, request_id: str, block_ids: Any, replace: bool, computed: int,
        scheduled: dict[str, int], current: Any,
    ) -> None:  # fmt: skip
        state = self._requests.get(request_id)
        if state is None:
            return
        if replace:
            state.table = [list(group) for group in block_ids]
        elif block_ids:
            for group, new in zip(state.table, block_ids, strict=True):
                group.extend(new)
        if not self._saves or self._is_short(state.request):
            return
        if self._doubtful_step > self._seen_step:
            return  # a block that a step loads may turn out to be invalid: nothing computed from it is saved
        prompt, end = state.request.num_prompt_tokens, computed + scheduled[request_id]
        if self._config.handoff is Handoff.BLOCKING and computed < prompt <= end:
            # The step that answers the prompt waits for all of it, whether or not it fills a block itself.
            step.blocking.append(request_id)
        # Only confirmed tokens are hashed: placeholders of asynchronous scheduling and rejected
        # drafts are not in num_tokens.
        tokens = min(end, state.request.num_tokens)
        if not self._config.save_decode_blocks:
            tokens = min(tokens, prompt)
        full = tokens // self._block_tokens
        if current is not None and full > state.saved:
            # Blocks that left a window are somebody else's by now.
            state.table = [list(group) for group in current.get_block_ids(request_id)]
        transfer = self._transfer(state, full, state.table)
        if transfer is None:
            return
        if self._pinned:
            self._pins.pin(step.number, transfer.slots)
        step.saves.append(transfer)
        state.save_step = step.number

    def _transfer(self, state: RequestState, full: int, table: list[list[int]]) -> Transfer | None:
        """The save of all blocks up to ``full`` that are not yet saved and not in the store."""
        full = min(full, *map(len, table))
        first = state.saved
        if full <= first or state.frozen:
            return None
        state.saved = full
        ids = state.chain.upto(state.request, full)[first:]
        present = self._store.lookup(ids)
        missing = [first + int(i) for i in np.flatnonzero(~present)]
        wanted = [block for block in missing if all(group[block] != NULL_BLOCK for group in table)]
        if len(wanted) < len(missing):
            state.gap = min(set(missing).difference(wanted) | {state.gap})
        if not wanted:
            return None
        ids = ids[np.array(wanted) - first]
        slots = _rows(table, wanted)
        return Transfer(state.request.request_id, ids.tobytes(), slots, promise=state.promise)

    # -- the end of requests --------------------------------------------------------------------

    def worker_output(self, output: Any, report: WorkerReport | None) -> None:
        """What vLLM heard from the workers in a step, and their own report, if there is one."""
        if report is not None:
            self._copied_step, self._seen_step = report.copied_step, report.step
            self._computes = report.step not in self._empty_steps
            self._empty_steps = {step for step in self._empty_steps if step > report.step}
            self._holds.answered(report.holds)
            self._pins.release(report.copied_step)
            for request_id, good in report.failed.items():
                failed = self._requests.get(request_id)
                if failed is not None:
                    failed.cap_at(failed.load_first + good)
        invalid = output.invalid_block_ids or ()
        if invalid:
            for state in self._requests.values():
                self._failed(state, invalid)
        for request_id in output.finished_recving or ():
            received = self._requests.get(request_id)
            if received is not None:
                received.load_slots = None

    @staticmethod
    def _failed(state: RequestState, invalid: Any) -> None:
        bad = [i for i, slot in enumerate(state.load_slots or ()) if slot in invalid]
        if bad:
            state.cap_at(state.load_first + bad[0])

    def finished(self, request: Any, block_ids: list[list[int]]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over: whether its memory must stay, and what the answer announces."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False, None
        status = request.status.name
        complete = status not in ("FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED")
        if complete and self._saves:
            self._save_rest(state, block_ids)
        params = self._announce(state) if complete and self._saves else None
        self._release(state)
        if state.load_slots is not None and not state.in_step:
            return False, params  # vLLM keeps the memory until the load has ended
        held = state.save_step > self._copied_step
        if held:
            self._step.held.append(request.request_id)
        return held, params

    def _save_rest(self, state: RequestState, block_ids: list[list[int]]) -> None:
        """Blocks whose last token was confirmed only by the output that ended the request."""
        if not state.table or self._is_short(state.request):
            return
        tokens = state.request.num_tokens - 1
        if not self._config.save_decode_blocks:
            tokens = min(tokens, state.request.num_prompt_tokens)
        full = tokens // self._block_tokens
        transfer = self._transfer(state, full, block_ids)
        if transfer is not None:
            self._step.late.append(transfer)
            state.save_step = self._step.number

    def _announce(self, state: RequestState) -> dict[str, Any] | None:
        request = state.request
        blocks = min(request.num_prompt_tokens // self._block_tokens, state.saved, state.gap)
        if blocks == 0 or state.frozen:
            return None
        ids = state.chain.upto(request, blocks)
        promise = handoff.announce(self._namespace, self._block_tokens, ids, self._writer, state.promise)
        params: dict[str, Any] = {handoff.KEY: promise}
        asked = getattr(request, "kv_transfer_params", None)
        if isinstance(asked, dict) and asked.get("do_remote_decode"):
            params |= {"do_remote_prefill": True, "do_remote_decode": False}
        return params

    def reset_cache(self) -> bool:
        """The weights changed: nothing that is stored may be hit again, by this server.

        From now on ids carry an epoch that no other server and no later process has: those read the
        weights on disk, and keep the blocks that belong to them.
        """
        self._epoch = secrets.token_bytes(EPOCH_BYTES)
        for state in self._requests.values():
            state.frozen = True  # its chain names the old weights, its memory holds both
            self._release(state)
        logger.info("weights changed: epoch %s, stored blocks are not used any more", self._epoch.hex())
        return True

    def take_stats(self) -> UcmStats | None:
        """The counters since the last call; kept for later in steps whose statistics could be lost."""
        if self.stats.is_empty() or not self._computes:
            return None
        stats, self.stats = self.stats, UcmStats()
        return stats

    def close(self) -> None:
        """Closes the store."""
        self._siblings.close()
        self._store.close()


def _rows(table: Sequence[Sequence[int]], blocks: Iterable[int]) -> list[int]:
    """The numbers of some blocks, of every group in turn."""
    return [group[block] for block in blocks for group in table]
