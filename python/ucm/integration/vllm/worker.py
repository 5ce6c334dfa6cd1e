"""The worker side: moves blocks between vLLM's KV memory and the store.

Owns the tasks in flight and decides when vLLM may be told that they are over. Decides nothing about
which blocks move. Called on the worker's model thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, Final
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from ucm.errors import Busy, Status, UcmError
from ucm.integration.vllm.batches import Batches, Entries, good_blocks
from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.converters import Converters
from ucm.integration.vllm.geometry import Layout
from ucm.integration.vllm.layer_loads import StepLoad, WorkerHolds
from ucm.integration.vllm.metadata import StepMetadata, Transfer, WorkerReport
from ucm.integration.vllm.rank import Rank
from ucm.integration.vllm.siblings import OWN
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.streams import ComputeStream
from ucm.store import Stage, block_ids

MS_PER_S: Final = 1000

logger = logging.getLogger("vllm.ucm.worker")


LOCAL: Final[WeakSet[WorkerSide]] = WeakSet()
"""The workers of this process: with one rank the scheduler is in it too."""


class LoadJob:
    """The load of one request."""

    __slots__ = ("good", "parts", "started", "transfer")

    def __init__(self, transfer: Transfer, blocks: int) -> None:
        self.transfer = transfer
        self.good = np.ones(blocks, dtype=bool)
        """For each block whether nothing of it failed or was refused."""
        self.parts: list[tuple[Any, npt.NDArray[np.intp]]] = []
        """Tasks, and for each of their entries the block."""
        self.started = time.monotonic()


class SaveJob:
    """The saves of one step, of all its requests: one task, or one per layer."""

    __slots__ = (
        "copied", "ids", "layers", "promises", "refused", "requests", "slots", "started", "step", "tasks",
    )  # fmt: skip

    def __init__(self, transfers: list[Transfer], step: int) -> None:
        self.requests = {transfer.request for transfer in transfers}
        self.ids = block_ids(b"".join(transfer.ids for transfer in transfers))
        counts = [len(block_ids(transfer.ids)) for transfer in transfers]
        self.promises = np.repeat(np.array([t.promise for t in transfers], dtype=np.uint64), counts)
        """For each block the number of the promise that it belongs to."""
        self.slots = [slot for t in transfers for slot in t.slots]
        self.step = step
        self.tasks: list[Any] = []
        self.layers: set[int] = set()
        """Layers that were submitted."""
        self.refused = False
        self.copied = False
        self.started = time.monotonic()


class WorkerSide:
    """The worker's half of the connector."""

    def __init__(
        self, config: ConnectorConfig, rank: Rank, layout: Layout, batches: Batches, store: Any,
        stream: ComputeStream, block_tokens: int, converters: Converters, *, layerwise: bool,
        fails_requests: bool = False,
    ) -> None:  # fmt: skip
        self._config = config
        self._rank = rank
        self._batches = batches
        self._store = store
        self._converters = converters
        self._stream = stream
        self._block_tokens = block_tokens
        self._part_bytes = layout.part_bytes
        self._loads: list[LoadJob] = []
        self._layerwise = layerwise
        """Whether saves go layer by layer, and loads in steps."""
        self._fails_requests = fails_requests
        """Whether load failures are reported by request, not by block."""
        self._holds = WorkerHolds(store, possible=layerwise)
        self._step_load: StepLoad | None = None
        """The load inside the running step."""
        self._copying: list[StepLoad] = []
        """Loads of steps whose copies may be under way on the device."""
        self._saves: list[SaveJob] = []
        self._current: SaveJob | None = None
        """The saves of the step that is running, while its layers are computed."""
        self._held: set[str] = set()
        self._computes = False
        self._step = 0
        """The step that is running."""
        self._submitted_step = 0
        """The saves of steps up to this one were submitted."""
        self._invalid: set[int] = set()
        self._failed: dict[str, int] = {}
        """Requests whose load failed, and how many of their blocks are good."""
        self.stats = UcmStats()
        LOCAL.add(self)

    # -- the steps of a forward pass ------------------------------------------------------------

    def begin(self, step: StepMetadata) -> None:
        """A step begins: submits the saves of finished requests and makes its own saves ready."""
        self._step = step.number
        self._computes = step.computes
        if step.late and self._rank.saves:
            self._submit_rest(SaveJob(step.late, step.number))
        self._held.update(step.held)
        if not step.saves:
            self._submitted_step = step.number
        elif self._rank.saves:
            self._current = SaveJob(step.saves, step.number)

    def start_loads(self, step: StepMetadata, *, whole_graph: bool) -> None:
        """Submits this step's loads, all requests at once. ``whole_graph``: no layer says when it begins."""
        self._holds.begin(step.holds, step.released)
        inside = [transfer for transfer in step.loads if transfer.hold]
        for transfer in step.loads:
            if not transfer.hold:
                self._load(transfer)
        if inside:
            holds = [task for task in (self._holds.take(one.hold) for one in inside) if task is not None]
            self._step_load = StepLoad(inside, holds, self._store, self._batches, self._stream.record())
            self.stats.add("loads", len(inside))
            if whole_graph:
                self._step_load.wait_all(self._stream)

    def wait_layer(self, name: str) -> None:
        """A layer of the running step is about to be computed."""
        number = self._batches.layers.get(name)
        if self._step_load is not None and number is not None:
            self._step_load.wait(number, self._stream)

    def _finish_step_load(self) -> None:
        load, self._step_load = self._step_load, None
        if load is not None:
            load.wait_all(self._stream)
            first = 0
            for transfer in load.transfers:
                end = first + len(block_ids(transfer.ids))
                self._account(transfer, load.good[first:end], load.started, load.reason)
                first = end
            self._copying.append(load)
        self._copying = [one for one in self._copying if not one.is_over()]

    def _load(self, transfer: Transfer) -> None:
        ids, slots = block_ids(transfer.ids), self._batches.rows(transfer.slots)
        job = LoadJob(transfer, len(ids))
        sources = np.frombuffer(transfer.sources or bytes(len(ids)), dtype=np.uint8)
        for source in np.unique(sources):
            index = np.flatnonzero(sources == source)
            try:
                job.parts += [
                    (task, index[owners])
                    for task, owners in self._load_from(int(source), ids[index], slots[index])
                ]
            except (UcmError, ValueError) as error:
                logger.warning("load of %s was refused: %s", transfer.request, error)
                job.good[index] = False
        self.stats.add("loads")
        self._loads.append(job)

    def _load_from(self, source: int, ids: Any, slots: Any) -> list[tuple[Any, npt.NDArray[np.intp]]]:
        """The task, and for each of its entries which of the blocks it is a piece of; none where nothing of
        these blocks is needed."""
        store, batches = self._store, self._batches
        if source != OWN:
            store, batches = self._converters.of(source)
            self.stats.add("converted_blocks", len(ids))
        entries, owners = batches.needed(ids, slots)
        if not len(owners):
            return []
        # The load may only overwrite memory that the compute stream no longer uses.
        event = self._stream.record()
        task = store.load(entries.ids, entries.addresses, shards=entries.shards, event=event)
        return [(task, owners)]

    def save_layer(self, name: str) -> None:
        """A layer of the running step is computed."""
        job = self._current
        number = self._batches.layers.get(name)
        if job is None or not self._layerwise or number is None or number in job.layers:
            return
        job.layers.add(number)
        self._submit(job, self._batches.layer(number, job.ids, job.slots))

    def save_step(self, step: StepMetadata) -> None:
        """The step is computed, drafts included: submits what of its saves was not yet submitted."""
        job, self._current = self._current, None
        if job is not None:
            self._submit_rest(job)
        self._submitted_step = step.number
        if step.blocking:
            self._wait_persisted(set(step.blocking))

    def _submit_rest(self, job: SaveJob) -> None:
        if not job.layers:
            self._submit(job, self._batches.whole(job.ids, job.slots))
        for number in self._batches.layers.values() if job.layers else ():
            if number not in job.layers:  # its hook was not called: no attention, or a graph
                self._submit(job, self._batches.layer(number, job.ids, job.slots))
        self.stats.add("saves")
        if job.refused:
            self.stats.add("save_dropped_blocks", len(job.ids))
            self._give_up(job.ids, job.promises)
        if job.tasks:
            self._saves.append(job)

    def _submit(self, job: SaveJob, entries: Entries) -> None:
        if job.refused:
            return
        event = self._stream.record() if self._config.enable_event_sync else None
        if not self._config.enable_event_sync:
            self._stream.synchronize()
        try:
            job.tasks.append(
                self._store.save(entries.ids, entries.addresses, shards=entries.shards, event=event)
            )
        except UcmError as error:
            job.refused = True
            if not isinstance(error, Busy):
                logger.warning("a save of %d blocks was refused: %s", len(job.ids), error)

    def _give_up(self, ids: Any, promises: npt.NDArray[np.uint64]) -> None:
        """Ends the wait of servers to which these blocks were promised."""
        try:
            for promise in np.unique(promises):
                self._store.abandon(ids[promises == promise], int(promise))
        except UcmError as error:
            logger.debug("blocks could not be abandoned: %s", error)

    def _wait_persisted(self, requests: set[str]) -> None:
        self._wait([job for job in self._saves if not job.requests.isdisjoint(requests)], Stage.PERSISTED)

    def _wait(self, jobs: Iterable[SaveJob], stage: Stage) -> None:
        """Waits for a stage of all tasks, together at most ``save_wait_ms``."""
        deadline = time.monotonic() + self._config.save_wait_ms / MS_PER_S
        for job in jobs:
            for task in job.tasks:
                task.wait_status(stage, max(0, int((deadline - time.monotonic()) * MS_PER_S)))

    # -- what is over ---------------------------------------------------------------------------

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose copies are done and whose memory may go; requests whose loads are over."""
        received = self._finish_loads()
        self._finish_step_load()
        self._finish_saves()
        busy: set[str] = set()
        for job in self._saves:
            if not job.copied:
                busy |= job.requests
        sent = self._held - busy
        self._held -= sent
        return sent or None, received or None

    def _finish_loads(self) -> set[str]:
        received: set[str] = set()
        left: list[LoadJob] = []
        for job in self._loads:
            # RELEASED, not LOADED: after it no copy can land in these blocks any more.
            if any(task.poll(Stage.RELEASED) == Status.PENDING for task, _ in job.parts):
                left.append(job)
                continue
            received.add(job.transfer.request)
            self._account_load(job)
        self._loads = left
        return received

    def _account_load(self, job: LoadJob) -> None:
        for task, owners in job.parts:
            job.good[owners[~self._good(task, len(owners))]] = False
        reason = next((task.error() for task, i in job.parts if not job.good[i].all()), "refused")
        self._account(job.transfer, job.good, job.started, reason)

    def _account(self, transfer: Transfer, good: npt.NDArray[np.bool_], started: float, reason: str) -> None:
        count = len(good)
        if not good.all():
            logger.warning(
                "request %s: %d of %d blocks could not be loaded and are computed: %s",
                transfer.request, int((~good).sum()), count, reason,
            )  # fmt: skip
        bad = np.flatnonzero(~good)
        loaded = int(good.sum())
        useful = int(bad[0]) if len(bad) else count
        if len(bad) and self._fails_requests:
            self._failed[transfer.request] = useful
        else:
            self._invalid.update(transfer.slots[i] for i in bad)
        self.stats.add("load_seconds", time.monotonic() - started)
        self.stats.add("loaded_blocks", loaded)
        self.stats.add("loaded_bytes", loaded * self._part_bytes)
        if len(bad):
            self.stats.add("load_failed_blocks", len(bad))
        if self._rank.index == 0:
            self.stats.add("verified_loaded_tokens", useful * self._block_tokens)

    def _finish_saves(self) -> None:
        left: list[SaveJob] = []
        for job in self._saves:
            job.copied = job.copied or all(map(self._is_copied, job.tasks))
            if not job.copied or any(t.poll(Stage.PERSISTED) == Status.PENDING for t in job.tasks):
                left.append(job)
            elif not job.refused:
                self._account_save(job)
        self._saves = left

    def _account_save(self, job: SaveJob) -> None:
        count = len(job.ids)
        good = np.ones(count, dtype=bool)
        for task in job.tasks:
            good &= self._good(task, count)
        saved = int(good.sum())
        self.stats.add("save_seconds", time.monotonic() - job.started)
        self.stats.add("saved_blocks", saved)
        self.stats.add("saved_bytes", saved * self._part_bytes)
        if saved < count:
            self.stats.add("save_failed_blocks", count - saved)
            reason = next((t.error() for t in job.tasks if t.poll(Stage.PERSISTED) != Status.OK), "")
            logger.warning("%d blocks were not saved: %s", count - saved, reason)
            self._give_up(job.ids[~good], job.promises[~good])

    @staticmethod
    def _good(task: Any, blocks: int) -> npt.NDArray[np.bool_]:
        """For each block whether all of its entries ended well."""
        try:
            return good_blocks(task.statuses(), blocks)
        except UcmError as error:
            logger.warning("a task has no result: %s", error)
            return np.zeros(blocks, dtype=bool)

    @staticmethod
    def _is_copied(task: Any) -> bool:
        status = task.poll(Stage.COPIED)
        if status == Status.OK:
            return True
        # A save that failed may still be reading: only RELEASED says that it is not.
        return bool(status != Status.PENDING and task.poll(Stage.RELEASED) != Status.PENDING)

    def report(self) -> WorkerReport:
        """How far the copies are. Every rank reports in every step, so that the slowest counts."""
        pending = [job.step for job in self._saves if not job.copied]
        copied = min(pending) - 1 if pending else self._submitted_step
        failed, self._failed = self._failed, {}
        return WorkerReport(copied, self._step, self._holds.report(self.stats), failed)

    def failed_requests(self) -> set[str]:
        """Requests whose load failed since the last report."""
        return set(self._failed)

    def take_invalid(self) -> set[int]:
        """Blocks that failed to load since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_stats(self) -> UcmStats | None:
        """The counters since the last call; kept for later in steps whose statistics could be lost."""
        if self.stats.is_empty() or not self._computes:
            return None
        stats, self.stats = self.stats, UcmStats()
        return stats

    # -- memory that goes away ------------------------------------------------------------------

    def preempted(self, requests: Iterable[str], *, alone: bool) -> None:
        """vLLM took these requests' blocks back: nothing may write to them before their copies.

        ``alone``: no other connector writes to vLLM's memory. One that does, over a network for instance, may
        follow no stream.
        """
        wanted = set(requests)
        jobs = [job for job in self._saves if not job.copied and not wanted.isdisjoint(job.requests)]
        if not jobs:
            return
        self.stats.add("preemption_waits", len(jobs))
        if self._stream.is_device and alone:
            self._wait(jobs, Stage.ENQUEUED)
            jobs = [job for job in jobs if not self._is_waited_for(job)]
        self._end_copies(jobs)

    def _is_waited_for(self, job: SaveJob) -> bool:
        """Makes the compute stream wait for the copies that are in a queue of the device, and drops the
        others. What writes to vLLM's memory then comes after them: kernels run on that stream, and loads wait
        for events of it."""
        try:
            for task in job.tasks:
                if task.poll(Stage.ENQUEUED) == Status.PENDING:
                    task.cancel()
                task.stream_wait(self._stream.handle())
        except UcmError as error:
            logger.debug("the compute stream does not wait for saves, so the CPU does: %s", error)
            return False
        return True

    def _end_copies(self, jobs: list[SaveJob]) -> None:
        self._wait(jobs, Stage.COPIED)
        for job in jobs:
            for task in job.tasks:
                if not self._is_copied(task):
                    # What has not begun is dropped, what has begun is waited for: a copy that goes
                    # on while the block is written again would store wrong bytes under a valid name.
                    task.cancel()
                    task.wait_status(Stage.RELEASED, -1)
            job.copied = True

    def drain(self) -> None:
        """Ends every copy from and to vLLM's memory, which may go away after this (sleep mode)."""
        self._end_copies([job for job in self._saves if not job.copied])
        for load in self._loads:
            for task, _ in load.parts:
                task.wait_status(Stage.RELEASED)  # the deadline of its task bounds it
        for step_load in self._copying:
            step_load.drain()

    def close(self) -> None:
        """Flushes within ``save_wait_ms`` and closes the store."""
        self._wait(self._saves, Stage.PERSISTED)
        self._finish_saves()
        if self._saves:
            logger.warning("%d saves were not finished in time and are lost", len(self._saves))
        for job in self._saves:
            self._give_up(job.ids, job.promises)  # ids that were stored all the same are found, marked or not
        self._holds.close()
        self._converters.close()
        self._store.close()
