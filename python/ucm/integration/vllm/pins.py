"""Blocks that vLLM may not give to another request, since a save still copies from them.

Owns references on vLLM's blocks. A block that leaves a sliding window is free at once, in the middle of its
request, and one that vLLM sets to zero for its next owner is written to before the worker hears of a
preemption; a save of it that has not been copied would store what is written there. Knows no request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from ucm.integration.vllm.geometry import NULL_BLOCK


class Pins:
    """Referenced blocks by step."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._pinned: deque[tuple[int, list[Any]]] = deque()

    def bind(self, pool: Any) -> None:
        """The scheduler's block pool."""
        self._pool = pool

    def pin(self, step: int, slots: Iterable[int]) -> None:
        """Keeps blocks until the copies of a step are done."""
        blocks = [self._pool.blocks[slot] for slot in slots if slot != NULL_BLOCK]
        self._pool.touch(blocks)
        self._pinned.append((step, blocks))

    def release(self, copied_step: int) -> None:
        """The copies of all steps up to this one are done."""
        while self._pinned and self._pinned[0][0] <= copied_step:
            self._pool.free_blocks(self._pinned.popleft()[1])
