"""An in-memory stand-in for ``ucm.Store``, for tests of scheduling alone.

Keeps the bytes it is given, really copies them, and can be told to be slow, to fail, or to lose
blocks. It proves nothing about the engine.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucm.errors import Busy, Status, UcmError
from ucm.store import ANY_PROMISE, Stage, block_ids

STREAM = 7
"""The handle of the simulated model's stream."""


class StandinStream:
    """Stands in for the compute stream of a device, on which the simulated model computes at once."""

    is_device = True

    def record(self) -> int:
        return 1

    def synchronize(self) -> None:
        raise AssertionError("the CPU waited for the device")

    def handle(self) -> int:
        return STREAM


@dataclass
class World:
    """What stores of one test share."""

    blocks: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    partial: dict[tuple[bytes, int], dict[int, bytes]] = field(default_factory=dict)
    abandoned: set[tuple[bytes, int]] = field(default_factory=set)
    """Ids, and the promises that are broken."""
    fail_loads: set[bytes] = field(default_factory=set)
    """Ids whose load fails."""
    hold: bool = False
    """Whether tasks stay pending."""
    stuck: bool = False
    """Whether they stay so while they are waited for."""
    slow: int = 0
    """How often a task is polled before it is over by itself: its bytes are moved no earlier."""
    crowded: bool = False
    """Whether no copy gets into a queue of the device."""
    refuse_streams: bool = False
    refuse_saves: bool = False
    refuse_holds: bool = False
    hold_holds: bool = False
    """Whether holds stay pending."""
    fail_layer: int | None = None
    """Loads of this layer alone fail."""
    holds: int = 0
    """Holds that were asked for."""
    held: int = 0
    """Holds that have not ended."""
    waits: list[Stage] = field(default_factory=list)
    """Stages that the CPU waited for."""
    stream_waits: int = 0
    cancelled: int = 0
    lookups: int = 0
    loaded: int = 0
    saved: int = 0


class StandinTask:
    def __init__(self, world: World, work: Any, count: int) -> None:
        self._world, self._work, self._statuses = world, work, np.zeros(count, dtype=np.int32)
        self._done = False
        self._polls = 0

    def _run(self) -> None:
        if not self._done:
            self._statuses = self._work()
            self._done = True

    def poll(self, stage: Stage | None = None) -> Status:
        if stage == Stage.ENQUEUED:
            return Status.PENDING if self._world.crowded and not self._done else Status.OK
        if not self._done:
            self._polls += 1
            if self._world.hold or self._polls <= self._world.slow:
                return Status.PENDING
            self._run()
        bad = self._statuses[self._statuses != 0]
        if len(bad) and stage != Stage.RELEASED:
            return Status(int(bad[0]))
        return Status.OK

    def wait_status(self, stage: Stage | None = None, timeout_ms: int = -1) -> Status:
        if stage is not None:
            self._world.waits.append(stage)
        if not self._world.stuck and stage != Stage.ENQUEUED:
            self._run()
        return self.poll(stage)

    def stream_wait(self, stream: int | None) -> None:
        """What the simulated model does next comes after the copies: they are made now."""
        assert stream == STREAM
        if self._world.refuse_streams:
            raise UcmError("told to refuse", Status.DEVICE)
        self._world.stream_waits += 1
        self._run()

    def statuses(self) -> Any:
        return self._statuses

    def error(self) -> str:
        return "told to fail"

    def cancel(self) -> None:
        """Drops what has no place in a queue; what has is copied all the same."""
        self._world.cancelled += 1
        if self._world.crowded:
            self._statuses[:] = Status.CANCELLED
            self._done = True
        self._run()


class StandinHold(StandinTask):
    def poll(self, stage: Stage | None = None) -> Status:
        return Status.PENDING if self._world.hold_holds else super().poll(stage)

    def free(self) -> None:
        self._world.held -= 1


class StandinStore:
    """Has the methods of ``ucm.Store`` that the connector uses."""

    def __init__(
        self, world: World, slices: list[int], part: int = 0, part_count: int = 1, shards: int = 1
    ) -> None:
        self.world, self.slices, self.part, self.part_count = world, slices, part, part_count
        self.shards = shards
        self.closed = False

    def _present(self, one: Any) -> bool:
        key = one.tobytes()
        return all((key, part) in self.world.blocks for part in range(self.part_count))

    def lookup(self, ids: Any) -> Any:
        self.world.lookups += 1
        return np.array([self._present(one) for one in block_ids(ids)], dtype=bool)

    def lookup_prefix(self, ids: Any) -> int:
        found = self.lookup(ids)
        return int(np.argmin(found)) if not found.all() else len(found)

    def lookup_abandoned(self, ids: Any, promise: int = ANY_PROMISE) -> Any:
        broken: dict[bytes, set[int]] = {}
        for key, number in self.world.abandoned:
            broken.setdefault(key, set()).add(number)
        known = [broken.get(one.tobytes(), set()) for one in block_ids(ids)]
        return np.array([bool(one & {promise, ANY_PROMISE} if promise else one) for one in known])

    def abandon(self, ids: Any, promise: int = ANY_PROMISE) -> bool:
        self.world.abandoned.update((one.tobytes(), promise) for one in block_ids(ids))
        return True

    def save(self, ids: Any, addresses: Any, **how: Any) -> StandinTask:
        if self.world.refuse_saves:
            raise Busy("told to refuse")
        keys, rows, shards = self._entries(ids, addresses, how)
        before = [self._read(row) for row in rows]

        def work() -> Any:
            for key, row, shard, was in zip(keys, rows, shards, before, strict=True):
                data = self._read(row)
                # The simulated model has computed when it submits.
                assert data == was, "a block was written over before it was copied"
                pieces = self.world.partial.setdefault((key, self.part), {})
                pieces[shard] = data
                if len(pieces) == self.shards:
                    del self.world.partial[key, self.part]
                    self.world.blocks[key, self.part] = b"".join(pieces[i] for i in range(self.shards))
                    self.world.saved += 1
            return np.zeros(len(keys), dtype=np.int32)

        return StandinTask(self.world, work, len(keys))

    def _read(self, row: Any) -> bytes:
        return b"".join(ctypes.string_at(int(a), n) for a, n in zip(row, self.slices, strict=True))

    def hold(self, ids: Any) -> StandinHold:
        if self.world.refuse_holds:
            raise Busy("told to refuse")
        keys = [one.tobytes() for one in block_ids(ids)]
        self.world.holds += 1
        self.world.held += 1

        def work() -> Any:
            bad = [key in self.world.fail_loads or (key, self.part) not in self.world.blocks for key in keys]
            return np.where(bad, int(Status.CORRUPT), 0).astype(np.int32)

        return StandinHold(self.world, work, len(keys))

    @staticmethod
    def _entries(ids: Any, addresses: Any, how: dict[str, Any]) -> tuple[list[bytes], Any, list[int]]:
        keys = [one.tobytes() for one in block_ids(ids)]
        shards = how.get("shards")
        return keys, np.array(addresses, dtype=np.uint64), [0] * len(keys) if shards is None else list(shards)

    def load(self, ids: Any, addresses: Any, **how: Any) -> StandinTask:
        keys, rows, shards = self._entries(ids, addresses, how)

        def work() -> Any:
            statuses = np.zeros(len(keys), dtype=np.int32)
            for i, (key, row, shard) in enumerate(zip(keys, rows, shards, strict=True)):
                data = self.world.blocks.get((key, self.part))
                if data is None or key in self.world.fail_loads or self.world.fail_layer == shard:
                    statuses[i] = Status.CORRUPT
                    for address, length in zip(row, self.slices, strict=True):
                        ctypes.memset(int(address), 0xA5, length)
                    continue
                offset = int(shard) * sum(self.slices)
                for address, length in zip(row, self.slices, strict=True):
                    ctypes.memmove(int(address), data[offset : offset + length], length)
                    offset += length
                self.world.loaded += 1
            return statuses

        return StandinTask(self.world, work, len(keys))

    def hash_tokens(
        self, tokens: Any, block_tokens: int, parent: bytes | None = None, extra: bytes = b""
    ) -> Any:
        count = len(tokens) // block_tokens
        return self.hash_blocks(tokens, block_tokens, [extra] * count, parent)

    def hash_blocks(self, tokens: Any, block_tokens: int, extras: Any, parent: bytes | None = None) -> Any:
        out = []
        array = np.ascontiguousarray(tokens, dtype=np.uint32)
        for i, extra in enumerate(extras):
            piece = array[i * block_tokens : (i + 1) * block_tokens].tobytes()
            parent = hashlib.blake2b((parent or b"") + piece + extra, digest_size=16).digest()
            out.append(np.frombuffer(parent, dtype=np.uint8))
        return np.array(out, dtype=np.uint8).reshape(-1, 16)

    def close(self) -> None:
        self.closed = True
