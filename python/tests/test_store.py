"""``ucm.Store`` against the real library."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ucm
from ucm import errors
from ucm.store import Options, Stage

SLICE = 64 * 1024
SLICES = 4
BLOCK_TOKENS = 16


def options(directory: Any, **more: Any) -> dict[str, Any]:
    return {
        "storage_backends": str(directory),
        "device": "host",
        "tensor_size_list": [SLICE] * SLICES,
        "block_size": SLICE * SLICES,
        "cache_buffer_capacity_gb": 0.0625,
        "segment_size_mb": 4,
        "block_tokens": BLOCK_TOKENS,
        "model_id": "test",
        "timeout_ms": 20000,
    } | more


def pages(count: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SLICES, SLICE), dtype=np.uint8)


def table(memory: Any) -> Any:
    base = memory.__array_interface__["data"][0]
    steps = np.arange(memory.shape[0] * SLICES, dtype=np.uint64) * SLICE
    return (base + steps).reshape(-1, SLICES)


def test_round_trip(tmp_path: Path) -> None:
    """What is saved is found and loaded again, by the same store and by a new one."""
    memory = pages(8)
    with ucm.Store(**options(tmp_path)) as store:
        ids = store.hash_tokens(range(8 * BLOCK_TOKENS), BLOCK_TOKENS)
        assert ids.shape == (8, 16)
        assert not store.lookup(ids).any()
        task = store.save(ids, table(memory))
        task.wait()
        assert task.poll(Stage.RELEASED) == errors.Status.OK
        assert (task.statuses() == 0).all()
        assert store.lookup_prefix(ids) == 8
    with ucm.Store(**options(tmp_path)) as store:
        store.refresh()
        assert store.lookup(ids).all()
        copy = np.zeros_like(memory)
        store.load(ids, table(copy)).wait()
        assert (copy == memory).all()


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    """numpy arrays, torch tensors, DLPack objects and integers name memory alike."""
    torch = pytest.importorskip("torch")
    source = torch.arange(SLICES * SLICE, dtype=torch.int64).to(torch.uint8).reshape(SLICES, SLICE)

    class OnlyDlpack:
        def __init__(self, tensor: Any) -> None:
            self._tensor = tensor

        def __dlpack__(self, **how: Any) -> Any:
            return self._tensor.__dlpack__(**how)

        def __dlpack_device__(self) -> Any:
            return self._tensor.__dlpack_device__()

    with ucm.Store(**options(tmp_path)) as store:
        rows = [source[0], source[1].numpy(), OnlyDlpack(source[2]), source[3].data_ptr()]
        ids = [b"0123456789abcdef"]
        store.save(ids, [rows]).wait()
        target = np.zeros((SLICES, SLICE), dtype=np.uint8)
        store.load(ids, [list(target)]).wait()
        assert (target == source.numpy()).all()
        with pytest.raises(ValueError, match="contiguous"):
            store.save(ids, [[source[:, ::2]] * SLICES])


def test_asyncio(tmp_path: Path) -> None:
    """Saves and loads are awaited through the completion fd, many at once, without a thread."""
    memory, copy = pages(16), np.zeros((16, SLICES, SLICE), dtype=np.uint8)

    async def work(store: ucm.Store) -> None:
        ids = store.hash_tokens(range(16 * BLOCK_TOKENS), BLOCK_TOKENS)
        where = table(memory)
        await asyncio.gather(*(store.save_async(ids[i : i + 1], where[i : i + 1]) for i in range(16)))
        threads = threading.active_count()
        there = table(copy)
        await asyncio.gather(*(store.load_async(ids[i : i + 1], there[i : i + 1]) for i in range(16)))
        assert threading.active_count() == threads
        with pytest.raises(errors.NotFound):
            await store.load_async([b"x" * 16], there[:1])

    with ucm.Store(**options(tmp_path)) as store:
        asyncio.run(work(store))
    assert (copy == memory).all()


def test_await_of_a_task_without_notify_ends(tmp_path: Path) -> None:
    """``await store.save(...)`` hung for ever: nothing tells of the end of a task without ``notify``."""
    memory, copy = pages(2), np.zeros((2, SLICES, SLICE), dtype=np.uint8)

    async def work(store: ucm.Store) -> None:
        ids = store.hash_tokens(range(2 * BLOCK_TOKENS), BLOCK_TOKENS)
        await store.save(ids, table(memory))
        await store.hold(ids)
        await store.load(ids, table(copy))
        await store.load(ids, table(copy), notify=True)
        with pytest.raises(errors.NotFound):
            await store.load([b"x" * 16] * 2, table(copy))

    with ucm.Store(**options(tmp_path)) as store:
        asyncio.run(asyncio.wait_for(work(store), 20))
    assert (copy == memory).all()


def test_await_ends_when_the_store_is_closed(tmp_path: Path) -> None:
    """A task that is awaited without ``notify`` learns that its store is gone."""

    async def work(store: ucm.Store) -> None:
        task = store.load([b"x" * 16], table(np.zeros((1, SLICES, SLICE), np.uint8)))
        store.close()
        with pytest.raises(errors.UcmError):
            await task

    asyncio.run(asyncio.wait_for(work(ucm.Store(**options(tmp_path))), 20))


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    """A status becomes its exception, with the engine's sentence."""
    with pytest.raises(errors.InvalidConfig, match="storage_backends"):
        ucm.Store(**options(tmp_path), storage_backend="x")
    with pytest.raises(errors.InvalidConfig):
        Options().set("io_depth", "many")
    with ucm.Store(**options(tmp_path)) as store:
        copy = np.zeros((2, SLICES, SLICE), dtype=np.uint8)
        task = store.load([b"a" * 16, b"b" * 16], table(copy))
        with pytest.raises(errors.NotFound):
            task.wait()
        assert set(task.statuses()) == {errors.Status.NOT_FOUND}
        with pytest.raises(ValueError, match="rows"):
            store.load([b"a" * 16], table(copy))
        with pytest.raises(ValueError, match="16"):
            store.lookup(b"short")
    with pytest.raises(errors.UcmError):
        store.lookup([b"a" * 16])
    store.close()


def test_batch_with_missing_blocks_loads_the_others(tmp_path: Path) -> None:
    """One entry that is missing fails alone."""
    memory = pages(3)
    ids = [bytes([i]) * 16 for i in range(3)]
    with ucm.Store(**options(tmp_path)) as store:
        store.save([ids[0], ids[2]], table(memory)[[0, 2]]).wait()
        copy = np.zeros_like(memory)
        task = store.load(ids, table(copy))
        task.wait_status(Stage.RELEASED)
        assert list(task.statuses()) == [0, errors.Status.NOT_FOUND, 0]
        assert (copy[0] == memory[0]).all()
        assert (copy[2] == memory[2]).all()


def test_streams_wait_for_saves_and_for_loads_alike(tmp_path: Path) -> None:
    """Goal: after stream_wait of a save its memory may be written over, whatever becomes of the save; of a
    load that lacks a block it raises. On the host the CPU waits."""
    memory = pages(4)
    ids = [bytes([i]) * 16 for i in range(4)]
    with ucm.Store(**options(tmp_path)) as store:
        save = store.save(ids, table(memory))
        save.stream_wait()
        assert save.poll(Stage.ENQUEUED) == save.poll(Stage.COPIED) == errors.Status.OK
        memory[:] = 0
        cancelled = store.save([b"x" * 16], table(memory)[:1])
        cancelled.cancel()
        cancelled.stream_wait()
        save.wait()
        copy = np.zeros_like(memory)
        load = store.load(ids, table(copy))
        load.stream_wait()
        assert load.poll(Stage.ENQUEUED) == errors.Status.OK
        assert (copy == pages(4)).all()
        with pytest.raises(errors.NotFound):
            store.load([b"y" * 16], table(copy)[:1]).stream_wait()


def test_layers(tmp_path: Path) -> None:
    """Saved layer by layer in any order, found when the last layer is in, loaded whole."""
    memory = pages(2)
    ids = [bytes([i]) * 16 for i in range(2)]
    layered = {"tensor_size_list": [SLICE], "shard_size": SLICE}
    with ucm.Store(**options(tmp_path, **layered)) as store:
        where = table(memory)
        for layer in (2, 0, 3, 1):
            assert not store.lookup(ids).any()
            tasks = store.save(ids, where[:, layer : layer + 1], shards=[layer] * 2)
            tasks.wait(Stage.COPIED)
        tasks.wait()
        assert store.lookup(ids).all()
    with ucm.Store(**options(tmp_path)) as store:
        copy = np.zeros_like(memory)
        store.load(ids, table(copy)).wait()
        assert (copy == memory).all()


def test_other_process_sees_it(tmp_path: Path) -> None:
    """A lookup-only store in another process finds what this one publishes."""
    memory = pages(1)
    code = """
import sys, time, ucm
store = ucm.Store(storage_backends=sys.argv[1], device="host", device_id=-1, model_id="test",
                  block_tokens=16, block_size=int(sys.argv[2]), cache_buffer_capacity_gb=0.0625)
print("open", flush=True)
end = time.monotonic() + 20
while not store.lookup([b"q" * 16]).all():
    assert time.monotonic() < end, "never seen"
    time.sleep(0.05)
print("seen", flush=True)
"""
    with ucm.Store(**options(tmp_path)) as store:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(SLICE * SLICES)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        store.save([b"q" * 16], table(memory)).wait()
        assert child.stdout.readline() == "seen\n"
        assert child.wait(10) == 0


def test_abandoned_blocks_are_seen_elsewhere(tmp_path: Path) -> None:
    """What a writer gives up another store learns, without waiting for a deadline."""
    with ucm.Store(**options(tmp_path)) as writer, ucm.Store(**options(tmp_path)) as reader:
        writer.save([b"a" * 16], table(pages(1))).wait()
        assert not reader.lookup_abandoned([b"g" * 16]).any()
        assert writer.abandon([b"g" * 16])
        end = time.monotonic() + 10
        while not reader.lookup_abandoned([b"g" * 16]).all():
            assert time.monotonic() < end
            reader.lookup([b"g" * 16])
            time.sleep(0.05)
        assert not reader.lookup_abandoned([b"h" * 16]).any()
        assert writer.abandon([b"h" * 16], promise=2**64 - 1)
        while not reader.lookup_abandoned([b"h" * 16], promise=2**64 - 1).all():
            assert time.monotonic() < end
            reader.lookup([b"h" * 16])
            time.sleep(0.05)
        assert reader.lookup_abandoned([b"h" * 16]).all()
        assert not reader.lookup_abandoned([b"h" * 16], promise=1).any()  # promised again: it is waited for


def test_waiting_releases_the_gil(tmp_path: Path) -> None:
    """While a thread waits in the engine, Python goes on."""
    with ucm.Store(**options(tmp_path)) as store:
        count = 0

        def waits() -> None:
            store.load([b"z" * 16], table(np.zeros((1, SLICES, SLICE), np.uint8))).wait_status()

        thread = threading.Thread(target=waits)
        thread.start()
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            count += 1
        thread.join()
        assert count > 100


def test_hashing_by_block(tmp_path: Path) -> None:
    """Extra bytes of one block change its id and all after it, and none before."""
    with ucm.Store(**options(tmp_path)) as store:
        tokens = np.arange(4 * BLOCK_TOKENS, dtype=np.uint32)
        plain = store.hash_tokens(tokens, BLOCK_TOKENS)
        assert (store.hash_blocks(tokens, BLOCK_TOKENS, [b""] * 4) == plain).all()
        other = store.hash_blocks(tokens, BLOCK_TOKENS, [b"", b"", b"image", b""])
        assert [bool((a == b).all()) for a, b in zip(plain, other, strict=True)] == [True, True, False, False]
        tail = store.hash_tokens(tokens[2 * BLOCK_TOKENS :], BLOCK_TOKENS, parent=plain[1].tobytes())
        assert (tail == plain[2:]).all()


def test_metrics(tmp_path: Path) -> None:
    """The engine's metrics come as Prometheus text."""
    with ucm.Store(**options(tmp_path)) as store:
        text = store.metrics()
        assert "# TYPE" in text


def test_held_blocks_stay_until_the_task_is_freed(tmp_path: Path) -> None:
    """A hold has a status per block, keeps blocks in DRAM under pressure, and ends with its task."""
    count = 400
    memory = pages(1)
    addresses = np.broadcast_to(table(memory), (count, SLICES)).copy()
    with ucm.Store(**options(tmp_path)) as store:
        ids = store.hash_tokens(range(count * BLOCK_TOKENS), BLOCK_TOKENS)
        for first in range(0, count, 100):
            store.save(ids[first : first + 100], addresses[first : first + 100]).wait()
    with ucm.Store(**options(tmp_path)) as store:
        held = store.hold(ids[:4])
        held.wait()
        assert held.statuses().tolist() == [errors.Status.OK] * 4
        for first in range(4, count, 99):
            store.load(ids[first : first + 99], addresses[: len(ids[first : first + 99])]).wait()
        text = store.metrics()
        assert "\nucm_slots_held 4\n" in text
        misses = int(text.split("\nucm_cache_misses_total ")[1].split("\n")[0])
        assert misses == count - 4
        store.load(ids[:4], addresses[:4]).wait()
        assert f"\nucm_cache_misses_total {misses}\n" in store.metrics()
        held.free()
        assert "\nucm_slots_held 0\n" in store.metrics()
        partly = store.hold([bytes(ids[0]), b"\x01" * 16], timeout=20)
        with pytest.raises(errors.UcmError):
            partly.wait()
        assert partly.statuses().tolist() == [errors.Status.OK, errors.Status.NOT_FOUND]
    whole = options(tmp_path, store_pipeline="Posix")
    with ucm.Store(**whole) as store, pytest.raises(errors.UcmError, match="store_pipeline"):
        store.hold(ids[:1])
