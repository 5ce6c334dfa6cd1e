"""The worker side: moves whole blocks between vLLM's KV memory and the store.

Owns the tasks in flight and decides when vLLM may be told that they are over. Decides nothing about
which blocks move. Called on the worker's model thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from ucm.errors import Busy, Status, UcmError
from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.geometry import AddressTable, Layout
from ucm.integration.vllm.metadata import StepMetadata, Transfer, WorkerReport
from ucm.integration.vllm.rank import Rank
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.streams import ComputeStream
from ucm.store import Stage, block_ids

MS_PER_S: Final = 1000

logger = logging.getLogger("vllm.ucm.worker")


class LoadJob:
    """The load of one request."""

    __slots__ = ("started", "task", "transfer")

    def __init__(self, transfer: Transfer, task: Any) -> None:
        self.transfer = transfer
        self.task = task
        """None where the store refused the load."""
        self.started = time.monotonic()


class SaveJob:
    """One save of one request."""

    __slots__ = ("copied", "started", "step", "task", "transfer")

    def __init__(self, transfer: Transfer, task: Any, step: int) -> None:
        self.transfer = transfer
        self.task = task
        self.step = step
        self.started = time.monotonic()
        self.copied = False


class WorkerSide:
    """The worker's half of the connector."""

    def __init__(
        self, config: ConnectorConfig, rank: Rank, layout: Layout, store: Any, stream: ComputeStream,
        block_tokens: int,
    ) -> None:  # fmt: skip
        self._config = config
        self._rank = rank
        self._store = store
        self._stream = stream
        self._block_tokens = block_tokens
        self._part_bytes = layout.part_bytes
        self._addresses = AddressTable(
            (one for layer in layout.layers for one in layer.slices), layout.block_count
        )
        self._loads: list[LoadJob] = []
        self._saves: list[SaveJob] = []
        self._held: set[str] = set()
        self._step = 0
        """The step that is running."""
        self._submitted_step = 0
        """The saves of steps up to this one were submitted."""
        self._invalid: set[int] = set()
        self.stats = UcmStats()

    # -- the steps of a forward pass ------------------------------------------------------------

    def start_loads(self, step: StepMetadata) -> None:
        """Submits this step's loads, all requests at once, and the saves of finished requests."""
        self._step = step.number
        if not step.saves:
            self._submitted_step = step.number
        self._submit_saves(step.late)
        self._held.update(step.held)
        for transfer in step.loads:
            ids = block_ids(transfer.ids)
            task = None
            try:
                # The load may only overwrite memory that the compute stream no longer uses.
                task = self._store.load(
                    ids, self._addresses.matrix(transfer.slots), event=self._stream.record()
                )
            except UcmError as error:
                logger.warning("load of %s was refused: %s", transfer.request, error)
            self.stats.add("loads")
            self._loads.append(LoadJob(transfer, task))

    def save_step(self, step: StepMetadata) -> None:
        """Submits this step's saves; their copies wait for the step's computation."""
        self._submit_saves(step.saves)
        self._submitted_step = step.number
        if step.blocking:
            self._wait_persisted(set(step.blocking))

    def _submit_saves(self, transfers: list[Transfer]) -> None:
        if not transfers or not self._rank.saves:
            return
        event = self._stream.record()
        if not self._config.enable_event_sync:
            self._stream.synchronize()
        for transfer in transfers:
            self._save(transfer, event)

    def _save(self, transfer: Transfer, event: int | None) -> None:
        ids = block_ids(transfer.ids)
        try:
            task = self._store.save(ids, self._addresses.matrix(transfer.slots), event=event)
        except UcmError as error:
            self.stats.add("save_dropped_blocks", len(ids))
            if not isinstance(error, Busy):
                logger.warning("save for %s was refused: %s", transfer.request, error)
            self._give_up(ids)
            return
        self.stats.add("saves")
        self._saves.append(SaveJob(transfer, task, self._step))

    def _give_up(self, ids: Any) -> None:
        """Ends the wait of servers to which these blocks were promised."""
        try:
            self._store.abandon(ids)
        except UcmError as error:
            logger.debug("blocks could not be abandoned: %s", error)

    def _wait_persisted(self, requests: set[str]) -> None:
        deadline = time.monotonic() + self._config.save_wait_ms / MS_PER_S
        for job in self._saves:
            if job.transfer.request in requests:
                left = max(0, int((deadline - time.monotonic()) * MS_PER_S))
                job.task.wait_status(Stage.PERSISTED, left)

    # -- what is over ---------------------------------------------------------------------------

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose copies are done and whose memory may go; requests whose loads are over."""
        received = self._finish_loads()
        self._finish_saves()
        busy = {job.transfer.request for job in self._saves if not job.copied}
        sent = {request for request in self._held if request not in busy}
        self._held -= sent
        return sent or None, received or None

    def _finish_loads(self) -> set[str]:
        received: set[str] = set()
        left: list[LoadJob] = []
        for job in self._loads:
            # RELEASED, not LOADED: after it no copy can land in these blocks any more.
            if job.task is not None and job.task.poll(Stage.RELEASED) == Status.PENDING:
                left.append(job)
                continue
            received.add(job.transfer.request)
            self._account(job)
        self._loads = left
        return received

    def _account(self, job: LoadJob) -> None:
        slots = job.transfer.slots
        if job.task is None:
            good = np.zeros(len(slots), dtype=bool)
        else:
            good = job.task.statuses() == Status.OK
            if not good.all():
                logger.warning(
                    "request %s: %d of %d blocks could not be loaded and are computed: %s",
                    job.transfer.request, int((~good).sum()), len(slots), job.task.error(),
                )  # fmt: skip
        bad = np.flatnonzero(~good)
        self._invalid.update(slots[i] for i in bad)
        loaded = int(good.sum())
        useful = int(bad[0]) if len(bad) else len(slots)
        self.stats.add("load_seconds", time.monotonic() - job.started)
        self.stats.add("loaded_blocks", loaded)
        self.stats.add("loaded_bytes", loaded * self._part_bytes)
        if len(bad):
            self.stats.add("load_failed_blocks", len(bad))
        if self._rank.index == 0:
            self.stats.add("verified_loaded_tokens", useful * self._block_tokens)

    def _finish_saves(self) -> None:
        left: list[SaveJob] = []
        for job in self._saves:
            if not job.copied:
                job.copied = self._is_copied(job)
            if not job.copied or job.task.poll(Stage.PERSISTED) == Status.PENDING:
                left.append(job)
                continue
            good = job.task.statuses() == Status.OK
            saved = int(good.sum())
            self.stats.add("save_seconds", time.monotonic() - job.started)
            self.stats.add("saved_blocks", saved)
            self.stats.add("saved_bytes", saved * self._part_bytes)
            if saved < len(good):
                self.stats.add("save_failed_blocks", len(good) - saved)
                logger.warning("%d blocks were not saved: %s", len(good) - saved, job.task.error())
                self._give_up(block_ids(job.transfer.ids)[~good])
        self._saves = left

    @staticmethod
    def _is_copied(job: SaveJob) -> bool:
        status = job.task.poll(Stage.COPIED)
        if status == Status.OK:
            return True
        # A save that failed may still be reading: only RELEASED says that it is not.
        return bool(status != Status.PENDING and job.task.poll(Stage.RELEASED) != Status.PENDING)

    def report(self) -> WorkerReport:
        """How far the copies are. Every rank reports in every step, so that the slowest counts."""
        pending = [job.step for job in self._saves if not job.copied]
        return WorkerReport(min(pending) - 1 if pending else self._submitted_step)

    def take_invalid(self) -> set[int]:
        """Blocks that failed to load since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_stats(self) -> UcmStats | None:
        """The counters since the last call."""
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, UcmStats()
        return stats

    # -- memory that goes away ------------------------------------------------------------------

    def preempted(self, requests: Iterable[str]) -> None:
        """vLLM took these requests' blocks back: nothing may write to them before their copies."""
        wanted = set(requests)
        jobs = [job for job in self._saves if not job.copied and job.transfer.request in wanted]
        if jobs:
            self.stats.add("preemption_waits", len(jobs))
            self._wait_copied(jobs)

    def _wait_copied(self, jobs: list[SaveJob]) -> None:
        deadline = time.monotonic() + self._config.save_wait_ms / MS_PER_S
        for job in jobs:
            left = max(0, int((deadline - time.monotonic()) * MS_PER_S))
            status = job.task.wait_status(Stage.COPIED, left)
            if status != Status.OK:
                # What has not begun is dropped, what has begun is waited for: a copy that goes on
                # while the block is written again would store wrong bytes under a valid name.
                job.task.cancel()
                job.task.wait_status(Stage.RELEASED, -1)
            job.copied = True

    def close(self) -> None:
        """Flushes within ``save_wait_ms`` and closes the store."""
        deadline = time.monotonic() + self._config.save_wait_ms / MS_PER_S
        for job in self._saves:
            left = max(0, int((deadline - time.monotonic()) * MS_PER_S))
            job.task.wait_status(Stage.PERSISTED, left)
        self._finish_saves()
        if self._saves:
            logger.warning("%d saves were not finished in time and are lost", len(self._saves))
        self._store.close()
