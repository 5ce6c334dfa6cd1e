"""Saves and loads of GPU memory through an engine of their own, while the rest of the process does something.

For tests of what a running engine does to the capture of CUDA graphs: its threads work all the time, and
what they moved is compared when it is over. The traffic itself calls nothing of torch, since allocations
and copies on other threads would spoil a capture by themselves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

BLOCKS = 16
BLOCK_BYTES = 1 << 16
WAIT_S = 60

ROUNDS = {"all": 0, "while graphs were captured": 0}
"""Rounds of traffic: a save and a load of all blocks."""


def _addresses(tensor: Any) -> Any:
    import numpy as np

    rows = np.arange(BLOCKS, dtype=np.uint64) * np.uint64(BLOCK_BYTES)
    return (np.uint64(tensor.data_ptr()) + rows)[:, None].copy()


def _watch_captures() -> None:
    """Counts the rounds between a runner's first and last capture."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    for runner in (First, Second):
        original = runner.capture_model

        def watched(*args: Any, _original: Any = original, **more: Any) -> Any:
            before = ROUNDS["all"]
            out = _original(*args, **more)
            ROUNDS["while graphs were captured"] += ROUNDS["all"] - before
            return out

        runner.capture_model = watched


@contextlib.contextmanager
def traffic(directory: str) -> Iterator[None]:
    """Runs traffic until the body is done; raises if it failed or moved a wrong byte."""
    import numpy as np
    import torch

    from ucm.store import Stage, Store

    _watch_captures()
    source, target = (
        torch.empty((BLOCKS, BLOCK_BYTES), dtype=torch.uint8, device="cuda").random_(0, 256) for _ in "st"
    )
    torch.cuda.synchronize()
    stop = threading.Event()
    failures: list[BaseException] = []
    store = Store(
        storage_backends=directory, tensor_size_list=[BLOCK_BYTES], shard_size=BLOCK_BYTES,
        block_size=BLOCK_BYTES, device="cuda", cache_buffer_capacity_gb=0.25, model_id="traffic",
    )  # fmt: skip

    def work() -> None:
        try:
            while not stop.is_set():
                generator = np.random.default_rng(ROUNDS["all"])
                names = generator.integers(0, 256, (BLOCKS, 16), dtype=np.uint8)
                store.save(names, _addresses(source)).wait(Stage.COPIED, WAIT_S)
                store.load(names, _addresses(target)).wait(Stage.LOADED, WAIT_S)
                ROUNDS["all"] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.close()
    if failures:
        raise failures[0]
    torch.cuda.synchronize()
    if not torch.equal(source, target):
        raise AssertionError("what was loaded while graphs were captured is not what was saved")
