"""What a block's bytes are in vLLM's KV memory, after it was saved or loaded there.

For tests on devices whose kernels round differently from run to run: tokens may then part, but a block that
was loaded is, byte for byte, the one that was saved. Listens to a connector without touching its order of
work: memory is read when a phase is over, and blocks are not reused by then.
"""

from __future__ import annotations

import hashlib
from typing import Any

ID_BYTES = 16

SAVED: dict[str, int] = {}
LOADED: dict[str, int] = {}
"""The slot of each block, by its id."""

_memory: dict[str, Any] = {}
_shape: list[int] = []


def listen() -> None:
    """From now on remembers which blocks are saved and loaded."""
    from ucm.integration.vllm.ucm_connector import UCMConnector
    from ucm.integration.vllm.worker import WorkerSide

    register, submit, account = (
        UCMConnector.register_kv_caches, WorkerSide._submit_rest, WorkerSide._account,
    )  # fmt: skip

    def registered(self: Any, kv_caches: dict[str, Any]) -> None:
        _memory.update(kv_caches)
        _shape[:] = [self._shape.block_count]
        register(self, kv_caches)

    def submitted(self: Any, job: Any) -> None:
        SAVED.update({bytes(one).hex(): int(slot) for one, slot in zip(job.ids, job.slots, strict=True)})
        submit(self, job)

    def accounted(self: Any, transfer: Any, good: Any, *more: Any) -> None:
        for number, slot in enumerate(transfer.slots):
            if good[number]:
                LOADED[transfer.ids[number * ID_BYTES : (number + 1) * ID_BYTES].hex()] = int(slot)
        account(self, transfer, good, *more)

    UCMConnector.register_kv_caches = registered  # type: ignore[method-assign]
    WorkerSide._submit_rest = submitted  # type: ignore[method-assign]
    WorkerSide._account = accounted  # type: ignore[method-assign]


def digest(slot: int) -> str:
    """Of one block, all layers."""
    import torch

    whole = hashlib.sha256()
    for name in sorted(_memory):
        tensor = _memory[name]
        rows = tensor.shape[0] // _shape[0]  # a block is several of the kernel's
        part = tensor[slot * rows : (slot + 1) * rows].contiguous()
        whole.update(part.view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


def take() -> dict[str, dict[str, str]]:
    """The digests of what was saved and loaded since the last call."""
    out = {}
    for kind, slots in (("saved", SAVED), ("loaded", LOADED)):
        out[kind] = {name: digest(slot) for name, slot in slots.items()}
        slots.clear()
    return out
