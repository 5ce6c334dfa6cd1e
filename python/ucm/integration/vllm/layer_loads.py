"""Layer-wise loading in a worker: holds before a step, and the load inside it.

Owns the tasks of both. A hold brings blocks into the engine's DRAM, verified; the load inside a step is
then copies from there alone, and layer N waits only for its own. Decides nothing about which blocks move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ucm.errors import Status, UcmError
from ucm.integration.vllm.batches import Batches
from ucm.integration.vllm.metadata import REFUSED, Hold, Transfer
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.streams import ComputeStream
from ucm.store import Stage, block_ids

logger = logging.getLogger("vllm.ucm.worker")


class WorkerHolds:
    """The holds that the scheduler asked for and has not ended."""

    def __init__(self, store: Any, *, possible: bool) -> None:
        self._store = store
        self._possible = possible
        self._tasks: dict[int, Any] = {}
        self._ready: dict[int, int] = {}

    def begin(self, holds: Iterable[Hold], released: Iterable[int]) -> None:
        """A step's holds."""
        for number in released:
            self.end(number)
        for hold in holds:
            try:
                if not self._possible:
                    raise UcmError("blocks are not loaded layer by layer here", Status.UNSUPPORTED)
                self._tasks[hold.number] = self._store.hold(block_ids(hold.ids))
            except UcmError as error:
                logger.debug("hold %d was refused: %s", hold.number, error)
                self._ready[hold.number] = REFUSED

    def take(self, number: int) -> Any:
        """The task of a hold that is loaded now; it ends when the task is dropped."""
        self._ready.pop(number, None)
        return self._tasks.pop(number, None)

    def end(self, number: int) -> None:
        """Lets go of the blocks."""
        task = self.take(number)
        if task is not None:
            task.free()

    def report(self, stats: UcmStats) -> dict[int, int]:
        """Of all holds whose reading is over, how many blocks are held."""
        for number, task in self._tasks.items():
            if number not in self._ready and task.poll(Stage.LOADED) != Status.PENDING:
                self._ready[number] = self._count(task)
                stats.add("holds")
        for number, ready in self._ready.items():
            if ready == REFUSED and number in self._tasks:
                self._tasks.pop(number).free()
                stats.add("holds_refused")
        return dict(self._ready)

    @staticmethod
    def _count(task: Any) -> int:
        try:
            statuses = task.statuses()
        except UcmError:  # the store is closed
            return REFUSED
        if (statuses == Status.BUSY).any():
            return REFUSED
        bad = np.flatnonzero(statuses)
        if len(bad):
            logger.warning(
                "%d of %d blocks cannot be loaded and are computed: %s", len(bad), len(statuses), task.error()
            )
        return int(bad[0]) if len(bad) else len(statuses)

    def close(self) -> None:
        """Ends all."""
        for number in list(self._tasks):
            self.end(number)


class StepLoad:
    """The load of all requests whose held blocks a step loads."""

    def __init__(
        self, transfers: list[Transfer], holds: list[Any], store: Any, batches: Batches, event: Any
    ) -> None:
        self.transfers = transfers
        self.started = time.monotonic()
        self.reason = ""
        self._holds = holds
        ids = block_ids(b"".join(one.ids for one in transfers))
        slots = [slot for one in transfers for slot in one.slots]
        self.good = np.ones(len(ids), dtype=bool)
        """For each block whether all of its layers that were waited for are right."""
        self._waiting: dict[int, Any] = {}
        """The tasks of layers that nobody has waited for."""
        for number in batches.layers.values():
            entries = batches.layer(number, ids, slots)
            try:
                self._waiting[number] = store.load(
                    entries.ids, entries.addresses, shards=entries.shards, event=event
                )
            except UcmError as error:
                self._fail(str(error))
        self._copying: list[Any] = []
        """The tasks of layers whose copies the stream waits for."""

    def _fail(self, reason: str) -> None:
        self.good[:] = False
        self.reason = reason

    def wait(self, number: int, stream: ComputeStream) -> None:
        """Makes the compute stream wait for one layer."""
        task = self._waiting.pop(number, None)
        if task is None:
            return
        try:
            if stream.is_device:
                task.stream_wait(stream.handle())
                self._copying.append(task)
                return
            failed = task.wait_status(Stage.LOADED) != Status.OK
        except UcmError:
            failed = True
        if failed:
            task.wait_status(Stage.LOADED)  # until every entry has ended
            task.wait_status(Stage.RELEASED)
            self.reason = self.reason or task.error()
            self.good &= self._statuses(task)

    def wait_all(self, stream: ComputeStream) -> None:
        """The layers whose hook was not called, or is called later."""
        for number in list(self._waiting):
            self.wait(number, stream)

    @staticmethod
    def _statuses(task: Any) -> npt.NDArray[np.bool_]:
        try:
            good: npt.NDArray[np.bool_] = task.statuses() == Status.OK
        except UcmError:  # the store is closed
            good = np.zeros(task.count, dtype=bool)
        return good

    def drain(self) -> None:
        """Waits for all copies."""
        for task in self._copying:
            task.wait_status(Stage.RELEASED)

    def is_over(self) -> bool:
        """Whether no copy is under way; then the holds end."""
        if any(task.poll(Stage.RELEASED) == Status.PENDING for task in self._copying):
            return False
        for task in self._holds:
            task.free()
        self._holds = []
        return True
