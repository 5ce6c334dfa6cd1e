"""Tensor-parallel ranks of real models by the binding: who saves which part, who can load it.

Needs neither vLLM nor torch: the KV memory is numpy arrays of the shapes that vLLM registers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm import Store
from ucm.integration.vllm.batches import Batches
from ucm.integration.vllm.geometry import Layout, build
from ucm.integration.vllm.rank import Rank, rank_of

BLOCKS = 3
"""Blocks of KV memory in each rank: the null block and two."""
IDS = [bytes([n]) * 16 for n in (1, 2)]
SLOTS = [1, 2]
NAMESPACE = {"model_id": "m", "dtype": "bfloat16", "store_pipeline": "Posix", "device": "host"}


class Tensor:
    """A numpy array with what the geometry asks of a torch tensor."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = "torch.bfloat16"

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return int(self.array.itemsize)

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)


class Worker:
    """A rank: its KV memory, its layout, its store."""

    def __init__(self, path: Path, rank: Rank, layers: int, *page: int, parts: int = 1) -> None:
        self.memory = [np.zeros((BLOCKS, *page), dtype=np.uint16) for _ in range(layers)]
        caches = {f"layers.{i}": Tensor(one) for i, one in enumerate(self.memory)}
        self.layout: Layout = build(caches, BLOCKS, self.memory[0][0].nbytes * layers, caches)
        self.rank = rank
        self.store = Store(
            storage_backends=str(path), block_size=self.layout.part_bytes, part_index=rank.part,
            part_count=rank.part_count, parts_owned=parts, cache_buffer_capacity_gb=0.06,
            shard_size=self.layout.part_bytes // parts,
            tensor_size_list=self.slices(parts), **NAMESPACE,
        )  # fmt: skip

    def slices(self, parts: int) -> list[int]:
        return [one // parts for one in self.layout.slice_lengths]

    def save(self) -> None:
        entries = Batches(self.layout, layerwise=False).whole(
            np.frombuffer(b"".join(IDS), np.uint8).reshape(-1, 16), SLOTS
        )
        if self.rank.saves:
            self.store.save(entries.ids, entries.addresses).wait()

    def load(self) -> None:
        entries = Batches(self.layout, layerwise=False).whole(
            np.frombuffer(b"".join(IDS), np.uint8).reshape(-1, 16), SLOTS
        )
        self.store.load(entries.ids, entries.addresses).wait()


def fill(layer: int, block: int, heads: range, tokens: int, width: int) -> Any:
    """The KV of some heads of one layer and block: every number names its place."""
    out = np.zeros((len(heads), tokens, width), dtype=np.uint16)
    for i, head in enumerate(heads):
        out[i] = (
            np.arange(tokens * width).reshape(tokens, width) * 7 + head * 1009 + layer * 31 + block
        ) % 65521
    return out


def scheduler(path: Path, worker: Worker) -> Store:
    """A lookup-only store, as vLLM's scheduler has it."""
    return Store(
        storage_backends=str(path), block_size=worker.layout.part_bytes, part_count=worker.rank.part_count,
        device_id=-1, lookup_refresh_ms=0, cache_buffer_capacity_gb=0.01, **NAMESPACE,
    )  # fmt: skip


LLAMA_70B = {"layers": 80, "heads": 8, "tokens": 16, "width": 2 * 128}
"""Per token and KV head 128 elements of K and of V."""


@pytest.mark.parametrize("tensor_parallel", [8, 16])
def test_ranks_of_a_gqa_model(tmp_path: Path, tensor_parallel: int) -> None:
    """A block is found when the last rank's part is in, and every rank loads the heads that it holds."""
    model = LLAMA_70B
    layers, tokens, width = model["layers"], model["tokens"], model["width"]
    ranks = [rank_of(i, tensor_parallel, model["heads"], shared=False) for i in range(tensor_parallel)]
    lookup: Store | None = None
    for rank in ranks:
        worker = Worker(tmp_path, rank, layers, 1, tokens, width)
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                memory[block] = fill(i, block, range(rank.part, rank.part + 1), tokens, width)
        lookup = lookup or scheduler(tmp_path, worker)
        if rank.saves:
            assert not lookup.lookup(IDS).any()
        worker.save()
        worker.store.close()
    assert lookup is not None
    lookup.refresh()
    assert lookup.lookup(IDS).all()
    lookup.close()
    for rank in ranks[:: tensor_parallel // 4]:
        worker = Worker(tmp_path, rank, layers, 1, tokens, width)
        worker.load()
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                assert (memory[block] == fill(i, block, range(rank.part, rank.part + 1), tokens, width)).all()
        worker.store.close()


DEEPSEEK_V3 = {"layers": 61, "tokens": 64, "width": 576}
"""MLA: 512 compressed elements and 64 of rotary position per token, the same in all ranks."""


def test_mla_of_eight_ranks_feeds_four(tmp_path: Path) -> None:
    """With MLA one rank of eight saves, and each of four loads all of it."""
    layers, tokens, width = DEEPSEEK_V3["layers"], DEEPSEEK_V3["tokens"], DEEPSEEK_V3["width"]
    eight = [rank_of(i, 8, 1, shared=True) for i in range(8)]
    assert [rank.saves for rank in eight] == [True] + [False] * 7
    for rank in eight:
        worker = Worker(tmp_path, rank, layers, tokens, width)
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                memory[block] = fill(i, block, range(1), tokens, width)[0]
        worker.save()
        worker.store.close()
    for rank in (rank_of(i, 4, 1, shared=True) for i in range(4)):
        worker = Worker(tmp_path, rank, layers, tokens, width)
        worker.load()
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                assert (memory[block] == fill(i, block, range(1), tokens, width)[0]).all()
        worker.store.close()


def test_eight_ranks_feed_four_by_the_binding(tmp_path: Path) -> None:
    """A store that owns two parts loads what two ranks of twice as many saved, head by head."""
    model = LLAMA_70B
    layers, tokens, width = model["layers"], model["tokens"], model["width"]
    for rank in (rank_of(i, 8, 8, shared=False) for i in range(8)):
        worker = Worker(tmp_path, rank, layers, 1, tokens, width)
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                memory[block] = fill(i, block, range(rank.part, rank.part + 1), tokens, width)
        worker.save()
        worker.store.close()
    for quarter in range(4):
        first = 2 * quarter
        worker = Worker(tmp_path, Rank(quarter, first, 8, True), layers, 2, tokens, width, parts=2)
        # Part by part: the shard is the head, its slices are the layers.
        ids = [one for one in IDS for _ in range(2)]
        shards = np.array([0, 1] * len(IDS), dtype=np.uint32)
        addresses = np.array(
            [[m[block, head].ctypes.data for m in worker.memory] for block in SLOTS for head in range(2)],
            dtype=np.uint64,
        )
        worker.store.load(ids, addresses, shards=shards).wait()
        for i, memory in enumerate(worker.memory):
            for block in SLOTS:
                assert (memory[block] == fill(i, block, range(first, first + 2), tokens, width)).all()
        worker.store.close()
