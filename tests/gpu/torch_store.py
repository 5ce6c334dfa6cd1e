"""The whole store under PyTorch on a real GPU: order, graphs, two processes, eviction, speed.

`cargo xtask gpu-test` runs it, with UCM_LIBRARY and PYTHONPATH set. Every part says its goal; a part
that fails is told, and the program's status counts the failures.
"""

from __future__ import annotations

import argparse
import ctypes as C
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy as np
import torch

from ucm import _native
from ucm.store import Stage, Store, check

LAYERS = 28
SLICE = 128 << 10  # Qwen2.5-7B, block of 128 tokens, K and V apart
SLOW_CYCLES = 60_000_000  # some tens of milliseconds


def ids(count: int, salt: int) -> np.ndarray:
    """Block ids that differ by place and by salt."""
    generator = np.random.default_rng(salt)
    return generator.integers(0, 256, (count, 16), dtype=np.uint8)


class Cache:
    """A paged KV cache: one tensor a layer and kind, as a framework allocates it."""

    def __init__(self, blocks: int, slice_bytes: int = SLICE, slices: int = 2 * LAYERS) -> None:
        self.tensors = [
            torch.empty((blocks, slice_bytes), dtype=torch.uint8, device="cuda") for _ in range(slices)
        ]
        self.slice_bytes = slice_bytes
        self.bases = np.array([t.data_ptr() for t in self.tensors], dtype=np.uint64)

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        offsets = blocks.astype(np.uint64)[:, None] * np.uint64(self.slice_bytes)
        return np.ascontiguousarray(self.bases[None, :] + offsets)

    def randomize(self) -> None:
        for tensor in self.tensors:
            tensor.random_(0, 256)

    def equal(self, blocks: np.ndarray, other: Cache, others: np.ndarray) -> bool:
        mine = torch.from_numpy(blocks.astype(np.int64)).cuda()
        theirs = torch.from_numpy(others.astype(np.int64)).cuda()
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(torch.equal(a[mine], b[theirs]) for a, b in pairs)


def options(directory: str, cache: Cache, **more: object) -> dict[str, object]:
    size = cache.slice_bytes * len(cache.tensors)
    return {
        "storage_backends": directory,
        "tensor_size_list": [cache.slice_bytes] * len(cache.tensors),
        "shard_size": size,
        "block_size": size,
        "device": "cuda",
        "cache_buffer_capacity_gb": 2,
        "model_id": "gpu-test",
        **more,
    }


def saves_wait_for_kernels(directory: str) -> None:
    """Goal: a save sees what a kernel wrote that was still running when it was submitted, on a side stream and on
    the default stream; without the event it does not, so the test would catch a missing wait."""
    source, target = Cache(32), Cache(32)
    blocks = np.arange(32)
    with Store(**options(directory, source)) as store:
        for case, (stream, told) in enumerate(
            (s, t) for t in (True, False) for s in (torch.cuda.Stream(), torch.cuda.default_stream())
        ):
            names = ids(32, 100 + case)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLOW_CYCLES)
                source.randomize()
                event = torch.cuda.Event()
                event.record(stream)
            task = store.save(names, source.addresses(blocks), event=event.cuda_event if told else None)
            del event
            task.wait(Stage.PERSISTED, 60)
            torch.cuda.synchronize()
            load = store.load(names, target.addresses(blocks[::-1]))
            load.stream_wait(torch.cuda.current_stream().cuda_stream)
            right = target.equal(blocks[::-1].copy(), source, blocks)
            load.wait(Stage.LOADED, 60)
            assert right == told, f"case {case}: the event decides the bytes"


def streams_wait_layer_by_layer(directory: str) -> None:
    """Goal: layer 0 can be awaited on the stream while later layers are still read from the drive."""
    source, target = Cache(16), Cache(16)
    source.randomize()
    torch.cuda.synchronize()
    names, blocks = ids(16, 7), np.arange(16)
    part = 2 * SLICE
    layered = options(directory, source, shard_size=part, tensor_size_list=[SLICE] * 2, model_id="layers")
    rows = source.addresses(blocks)
    with Store(**layered) as store:
        for layer in range(LAYERS):
            shards = np.full(16, layer, dtype=np.uint32)
            store.save(names, rows[:, 2 * layer : 2 * layer + 2].copy(), shards=shards)
        deadline = time.monotonic() + 60
        while not store.lookup(names).all():
            assert time.monotonic() < deadline, "the blocks are never found"
            time.sleep(0.01)
    to = target.addresses(blocks)
    stream = torch.cuda.Stream()
    with Store(**layered) as store, torch.cuda.stream(stream):
        loads = [
            store.load(names, to[:, 2 * layer : 2 * layer + 2].copy(), shards=np.full(16, layer, dtype=np.uint32))
            for layer in range(LAYERS)
        ]
        seen = []
        for layer, load in enumerate(loads):
            load.stream_wait(stream.cuda_stream)
            seen.append([t.clone() for t in target.tensors[2 * layer : 2 * layer + 2]])
        stream.synchronize()
        for layer, pair in enumerate(seen):
            for clone, tensor in zip(pair, source.tensors[2 * layer : 2 * layer + 2], strict=True):
                assert torch.equal(clone, tensor), f"layer {layer} was read before it was loaded"
        for load in loads:
            load.wait(Stage.LOADED, 60)


def graphs_are_captured(directory: str) -> None:
    """Goal: `torch.cuda.graph` captures and replays while the engine saves and loads on other threads."""
    cache, other = Cache(16), Cache(16)
    cache.randomize()
    torch.cuda.synchronize()
    blocks, stop, rounds = np.arange(16), threading.Event(), [0]
    with Store(**options(directory, cache)) as store:

        def traffic() -> None:
            while not stop.is_set():
                names = ids(16, 1000 + rounds[0])
                store.save(names, cache.addresses(blocks)).wait(Stage.COPIED, 60)
                store.load(names, other.addresses(blocks)).wait(Stage.LOADED, 60)
                rounds[0] += 1

        a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
        b = a @ a
        torch.cuda.synchronize()
        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for _ in range(20):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    b = a @ a
                    b = b + a
                graph.replay()
                torch.cuda.synchronize()
        finally:
            stop.set()
            thread.join()
        assert rounds[0] > 0
        assert torch.equal(b, a @ a + a)
        assert cache.equal(blocks, other, blocks)


def two_processes(directory: str) -> None:
    """Goal: a block saved by one process on the GPU is loaded by another on the same GPU, byte for byte."""
    cache = Cache(16)
    with Store(**options(directory, cache)):
        child = [sys.executable, __file__, "--child", directory]
        subprocess.run([*child, "save"], check=True, timeout=120)
        subprocess.run([*child, "load"], check=True, timeout=120)


def child(directory: str, role: str) -> None:
    torch.manual_seed(5)
    source, blocks, names = Cache(16), np.arange(16), ids(16, 55)
    source.randomize()
    torch.cuda.synchronize()
    if role == "save":
        with Store(**options(directory, source)) as store:
            store.save(names, source.addresses(blocks)).wait(Stage.PERSISTED, 60)
        return
    target = Cache(16)
    with Store(**options(directory, target)) as store:
        store.load(names, target.addresses(blocks)).wait(Stage.LOADED, 60)
        assert target.equal(blocks, source, blocks)


def random_traffic(directory: str) -> None:
    """Goal: 10,000 random saves (2,000) and loads, most of them evicted from DRAM in between; every byte of each
    block that is loaded is compared."""
    source, target = Cache(256, 4096, 16), Cache(256, 4096, 16)
    source.randomize()
    torch.cuda.synchronize()
    generator = np.random.default_rng(3)
    saved: dict[int, int] = {}
    names = ids(2048, 11)
    small = options(directory, source, cache_buffer_capacity_gb=0.03, model_id="random")
    with Store(**small) as store:
        for round_ in range(8200):
            number, place = int(generator.integers(2048)), int(generator.integers(256))
            if number not in saved:
                store.save(names[[number]], source.addresses(np.array([place]))).wait(Stage.PERSISTED, 60)
                saved[number] = place
            known = list(saved)
            number = known[int(generator.integers(len(known)))]
            place = int(generator.integers(256))
            load = store.load(names[[number]], target.addresses(np.array([place])))
            load.wait(Stage.LOADED, 60)
            assert target.equal(np.array([place]), source, np.array([saved[number]])), f"round {round_}"


def timed_submit(store: Store, kind: str, names: np.ndarray, addresses: np.ndarray, event: int | None) -> float:
    """Submits a batch whose arrays are ready, waits for it, and gives the microseconds of the native call alone: what
    the binding does before and after it is no part of the engine."""
    call, stage = {"save": (store._lib.ucm_save, Stage.COPIED), "load": (store._lib.ucm_load, Stage.LOADED)}[kind]
    batch = _native.Batch(
        C.sizeof(_native.Batch), names.ctypes.data, None, addresses.ctypes.data, len(names), event, 0, 0, 0
    )
    task = C.c_void_p()
    place, out = C.byref(batch), C.byref(task)
    begin = time.perf_counter()
    status = call(store._handle, place, out)
    micros = (time.perf_counter() - begin) * 1e6
    check(status)
    try:
        check(store._lib.ucm_task_wait(task, int(stage), 60_000))
    finally:
        store._lib.ucm_task_free(task)
    return micros


def submission(directory: str) -> None:
    """Goal: submitting 64 blocks of 56 slices returns in under 100 microseconds, whatever its event."""
    cache = Cache(64)
    cache.randomize()
    addresses, event = cache.addresses(np.arange(64)), torch.cuda.Event()
    slow = []
    for kind in ("save", "load"):
        for state in ("none", "done", "pending"):
            times = []
            with Store(**options(directory, cache, store_pipeline="Cache|Empty")) as store:
                names = ids(64, 31)
                if kind == "load":
                    store.save(names, addresses).wait(Stage.COPIED, 60)
                for round_ in range(50):
                    if kind == "save":
                        names = ids(64, 2000 + round_)
                    if state == "pending":
                        torch.cuda._sleep(1_000_000)
                    event.record()
                    if state == "done":
                        event.synchronize()
                    handle = None if state == "none" else event.cuda_event
                    times.append(timed_submit(store, kind, names, addresses, handle))
            median = statistics.median(times)
            print(f"  {kind}, event {state}: 64 x 56 slices: median {median:.0f} us, worst {max(times):.0f} us")
            if median >= 100:
                slow.append((kind, state))
    assert not slow, slow


def speed(directory: str) -> None:
    """Goal: prints what the store reaches between GPU and DRAM, as a share of one plain copy in the same run."""
    for slice_bytes, slices in ((2 << 20, 3), (256 << 10, 28), (128 << 10, 56), (32 << 10, 224)):
        cache = Cache(64, slice_bytes, slices)
        cache.randomize()
        host = torch.empty(448 << 20, dtype=torch.uint8, pin_memory=True)
        flat = torch.empty(448 << 20, dtype=torch.uint8, device="cuda")
        blocks = np.arange(64)
        addresses = cache.addresses((blocks * 37) % 64)
        ours: dict[str, list[float]] = {"save": [], "load": []}
        plain: dict[str, list[float]] = {"save": [], "load": []}
        more = {"store_pipeline": "Cache|Empty", "cache_buffer_capacity_gb": 8, "model_id": str(slice_bytes)}
        with Store(**options(directory, cache, **more)) as store:
            for round_ in range(9):
                names = ids(64, 3000 + round_)
                for kind in ("save", "load"):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    (host.copy_(flat, non_blocking=True) if kind == "save" else flat.copy_(host, non_blocking=True))
                    torch.cuda.synchronize()
                    plain[kind].append(host.numel() / (time.perf_counter() - begin))
                    begin = time.perf_counter()
                    if kind == "save":
                        store.save(names, addresses).wait(Stage.COPIED, 60)
                    else:
                        store.load(names, addresses).wait(Stage.LOADED, 60)
                    ours[kind].append(64 * slice_bytes * slices / (time.perf_counter() - begin))
        for kind in ("save", "load"):
            a, b = statistics.median(ours[kind]), statistics.median(plain[kind])
            print(f"  {slice_bytes >> 10:5} KiB slices, {kind}: {a / 1e9:.1f} GB/s = {a / b:.3f} of {b / 1e9:.1f}")


def compute_goes_on(directory: str) -> None:
    """Goal: prints how much a bf16 matmul loop is slowed by saves alongside."""
    cache = Cache(64)
    cache.randomize()
    addresses = cache.addresses(np.arange(64))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def loop() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(150):
            torch.matmul(a, b)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    more = {"store_pipeline": "Cache|Empty", "cache_buffer_capacity_gb": 2}
    with Store(**options(directory, cache, **more)) as store:
        alone, together, moved = [], [], [0]
        loop()
        for round_ in range(7):
            alone.append(loop())
            stop = threading.Event()

            def traffic(stop: threading.Event = stop, round_: int = round_) -> None:
                count = 0
                while not stop.is_set():
                    names = ids(64, 100_000 + 1000 * round_ + count)
                    store.save(names, addresses).wait(Stage.COPIED, 60)
                    count += 1
                moved[0] += count

            thread = threading.Thread(target=traffic)
            thread.start()
            together.append(loop())
            stop.set()
            thread.join()
        x, y = statistics.median(alone), statistics.median(together)
        rate = moved[0] * 64 * 56 * SLICE / (sum(together) / 1e3) / 1e9
        print(f"  matmul loop {x:.1f} ms alone, {y:.1f} ms with saves at {rate:.0f} GB/s: {100 * (y / x - 1):+.2f} %")


PARTS = [
    saves_wait_for_kernels,
    streams_wait_layer_by_layer,
    graphs_are_captured,
    two_processes,
    random_traffic,
    submission,
    speed,
    compute_goes_on,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--directory", help="where the storage backends are made")
    parser.add_argument("parts", nargs="*")
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return 0
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    failures = 0
    for part in PARTS:
        if arguments.parts and part.__name__ not in arguments.parts:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            begin = time.monotonic()
            try:
                part(os.path.join(directory, "store"))
                print(f"ok     {part.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
            except Exception:
                failures += 1
                print(f"FAILED {part.__name__}", flush=True)
                traceback.print_exc(file=sys.stdout)
    return failures


if __name__ == "__main__":
    sys.exit(main())
