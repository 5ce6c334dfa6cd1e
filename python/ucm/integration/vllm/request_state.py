"""What the scheduler side knows of one live request: data alone, decided upon in ``scheduler.py``."""

from __future__ import annotations

from typing import Any, Final

from ucm.integration.vllm import handoff
from ucm.integration.vllm.chain import BlockChain
from ucm.integration.vllm.holds import Held
from ucm.store import ANY_PROMISE

NO_GAP: Final = 1 << 62
"""A block number that no request reaches."""


class RequestState:
    """What the scheduler side knows of one request."""

    __slots__ = (
        "cap", "chain", "explained", "failure", "frozen", "gap", "held", "hits", "in_step", "load_first",
        "load_slots", "lookup_at", "lookup_key", "promise", "request", "save_step", "saved", "sources",
        "table", "told", "wait", "whole",
    )  # fmt: skip

    def __init__(
        self, request: Any, chain: BlockChain, wait: handoff.Wait | None, promise: int = ANY_PROMISE
    ) -> None:
        self.request = request
        self.chain = chain
        self.wait = wait
        self.promise = promise
        """The number under which its blocks are promised, and given up."""
        self.table: list[list[int]] = []
        """vLLM's block numbers of each KV cache group, as far as they were scheduled."""
        self.saved = 0
        """Blocks before this one are saved, or were handed to the worker to save."""
        self.gap = NO_GAP
        """The first block that is not in the store and cannot be saved: its memory left a window before."""
        self.save_step = 0
        """The last step that saves from this request's memory; 0: none does."""
        self.lookup_key: tuple[int, int] = (-1, -1)
        self.lookup_at = 0.0
        self.sources = b""
        """Which byte order each of them is in; empty: all in this server's."""
        self.hits = 0
        """Blocks that can be loaded, after the ones that vLLM has itself."""
        self.cap: int | None = None
        """Blocks from this one on failed to load and are not asked for again."""
        self.load_first = 0
        self.load_slots: list[int] | None = None
        """The blocks of the load that is under way, of every group in turn."""
        self.in_step = False
        """Whether that load is part of a step; else vLLM keeps the request waiting for it."""
        self.held: Held | None = None
        """The hold for the load to come."""
        self.whole = False
        """It loads whole blocks, since they could not be held."""
        self.failure = ""
        """Why the last lookup failed; empty: it did not."""
        self.told = False
        """Whether the log says what was hit."""
        self.explained = False
        """Whether the log says why nothing is loaded."""
        self.frozen = False
        """The weights changed while it ran: it neither loads nor saves."""

    def cap_at(self, block: int) -> None:
        """Loading failed at this block: what failed once is computed, asking again could fail for ever."""
        self.cap = block if self.cap is None else min(self.cap, block)
        self.saved = min(self.saved, block)
