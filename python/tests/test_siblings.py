"""Other byte orders' stores: found at the start and later, and never waited for by a lookup."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm.integration.vllm import siblings
from ucm.integration.vllm.siblings import Siblings

PATIENCE_S = 30
IDS = np.arange(4 * 16, dtype=np.uint8).reshape(4, 16)
HANGS = ["the directory", "the store"]
"""What does not answer."""


class Blocks:
    """A store that has some of the blocks."""

    def __init__(self, *present: int) -> None:
        self.present = [number in present for number in range(len(IDS))]
        self.closed = False

    def lookup(self, ids: Any) -> Any:
        return np.array([self.present[int(one[0]) // 16] for one in ids])

    def lookup_prefix(self, ids: Any) -> int:
        found = self.lookup(ids)
        return int(np.argmin(found)) if not found.all() else len(found)

    def close(self) -> None:
        self.closed = True


def folder(directory: Path, order: str) -> None:
    (directory / f"ucm1-0123-{order}").mkdir()


class Gate:
    """Something that hangs, whoever comes through it, until it is opened."""

    def __init__(self) -> None:
        self.entered, self.may_go = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []

    def pass_through(self) -> None:
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.may_go.wait(PATIENCE_S), "nobody opened the gate: a lookup waits behind it"

    def open(self) -> None:
        """And waits until everybody is gone."""
        self.may_go.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)


def hanging(
    monkeypatch: pytest.MonkeyPatch, directory: Path, what: str, gate: Gate
) -> tuple[Siblings, dict[str, Blocks]]:
    """Siblings of the orders a and b, of which a was found; the search for b hangs."""
    monkeypatch.setattr(siblings, "RESCAN_S", 0)
    stores = {"a": Blocks(0, 2), "b": Blocks(3)}
    folder(directory, "a")

    def open_store(order: str) -> Blocks:
        if order == "b" and what == "the store":
            gate.pass_through()
        return stores[order]

    found = Siblings(["a", "b"], [str(directory)], open_store)
    exists = found._exists

    def slow(order: str) -> bool:
        if what == "the directory":
            gate.pass_through()
        return exists(order)

    monkeypatch.setattr(found, "_exists", slow)
    folder(directory, "b")
    return found, stores


@pytest.mark.parametrize("what", HANGS)
def test_a_search_that_hung_stopped_the_scheduler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """While the search for new orders hangs, lookups answer from those that are known, and start no second
    search; what it finds in the end is used."""
    gate, own = Gate(), Blocks(1)
    found, stores = hanging(monkeypatch, tmp_path, what, gate)
    for _ in range(3):
        assert found.prefix(own, IDS) == (3, bytes([1, 0, 1]))
        assert gate.entered.wait(PATIENCE_S)
    assert len(gate.threads) == 1
    gate.open()
    assert found.prefix(own, IDS) == (4, bytes([1, 0, 1, 2]))
    found.close()
    assert stores["a"].closed
    assert stores["b"].closed


@pytest.mark.parametrize("what", HANGS)
def test_closed_while_a_search_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    """Closing does not wait for it; and a store that it opens after all is closed."""
    gate, opened = Gate(), Blocks(1)
    found, stores = hanging(monkeypatch, tmp_path, what, gate)
    found.prefix(opened, IDS)
    assert gate.entered.wait(PATIENCE_S)
    found.close()
    assert stores["a"].closed
    assert not stores["b"].closed
    gate.open()
    assert stores["b"].closed
    assert not found._stores


def test_blocks_of_no_other_order_cost_nothing(tmp_path: Path) -> None:
    """Where no other order can be read, its own store is asked alone, and only once."""
    found = Siblings([], [str(tmp_path)], lambda order: Blocks())
    assert found.prefix(Blocks(0, 1, 3), IDS) == (2, b"")
