"""Holds: blocks that the workers bring into memory before a request is told that it may load them.

Owns the scheduler's side of layer-wise loading. A load inside a step must not depend on storage, because
under asynchronous scheduling the next step is scheduled before its failure is seen. So the workers first
read, verify and keep the blocks, and only then vLLM hears of them. Knows no request by content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ucm.integration.vllm.metadata import REFUSED, Hold, StepMetadata
from ucm.store import BlockIds

GRACE: Final = 2
"""The workers end a hold by the store's deadline; the scheduler waits this many times as long."""


class Held:
    """One hold."""

    __slots__ = ("asked", "deadline", "first", "number", "ready")

    def __init__(self, number: int, first: int, asked: int, deadline: float) -> None:
        self.number = number
        self.first = first
        """The first block."""
        self.asked = asked
        """Blocks that were asked for."""
        self.deadline = deadline
        self.ready: int | None = None
        """How many of them, from the first, are in the memory of every rank; ``REFUSED``; None: not known."""

    def covers(self, first: int) -> bool:
        """Whether it can serve a load that begins at this block."""
        return self.first <= first < self.first + self.asked

    @property
    def end(self) -> int:
        """The block after the last that is ready."""
        return self.first + max(self.ready or 0, 0)

    @property
    def is_refused(self) -> bool:
        """Whether a worker had no room."""
        return self.ready == REFUSED

    @property
    def is_short(self) -> bool:
        """Whether blocks are missing that were asked for."""
        return self.ready is not None and 0 <= self.ready < self.asked


class Holds:
    """All holds that have not ended, by number."""

    def __init__(self, timeout_ms: int) -> None:
        self._patience = GRACE * timeout_ms / 1000
        self._last = 0
        self._open: dict[int, Held] = {}

    def ask(self, step: StepMetadata, ids: BlockIds, first: int, now: float) -> Held:
        """Asks the workers to hold blocks."""
        self._last += 1
        held = self._open[self._last] = Held(self._last, first, len(ids), now + self._patience)
        step.holds.append(Hold(held.number, ids.tobytes()))
        return held

    def answered(self, reports: Mapping[int, int]) -> None:
        """What all ranks report."""
        for number, ready in reports.items():
            held = self._open.get(number)
            if held is not None:
                held.ready = ready

    def release(self, step: StepMetadata, held: Held | None) -> None:
        """A hold that will not be loaded."""
        if held is not None and self._open.pop(held.number, None) is not None:
            step.released.append(held.number)

    def loaded(self, held: Held) -> None:
        """A hold whose blocks are loaded in the coming step; the workers end it by themselves."""
        self._open.pop(held.number, None)
