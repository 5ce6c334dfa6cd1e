"""KV saved in each byte order, loaded into every other that is required, element by element.

The saved bytes are written by the real engine from one memory and read by it into another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ucm
from ucm.integration.vllm import geometry, order
from ucm.integration.vllm.convert import MEMORY, ConversionError, PageShape, convert, page_shape, readable
from ucm.integration.vllm.geometry import AddressTable, Layer, Layout, Slice

PAGE = PageShape(tokens=16, heads=3, dim=8, element=2)
BLOCKS, LAYERS = 4, 2


def value(block: int, layer: int, kv: int, t: Any, h: Any, d: Any) -> Any:
    return ((((block * LAYERS + layer) * 2 + kv) * 16 + t) * 3 + h) * 8 + d


def written(name: str, block: int, layer: int) -> Any:
    """A page in an order, written by loops: the definition that the strides are checked against."""
    t, h, d = np.meshgrid(np.arange(16), np.arange(3), np.arange(8), indexing="ij")
    k, v = (value(block, layer, kv, t, h, d).astype(np.uint16) for kv in (0, 1))  # [t, h, d]
    pages = {
        order.NHD_SPLIT: [k, v],
        order.HND_SPLIT: [k.transpose(1, 0, 2), v.transpose(1, 0, 2)],
        order.NHD_PACKED: [np.stack([k, v], axis=2)],
        order.HND_PACKED: [np.stack([k, v], axis=2).transpose(1, 0, 2, 3)],
        order.CPU_VEC_SPLIT: [k.transpose(1, 2, 0), v.transpose(1, 0, 2)],
        order.CPU_VEC_PACKED: [
            piece for head in range(3) for piece in (k[:, head].T, v[:, head])
        ],
    }  # fmt: skip
    return np.concatenate([np.ascontiguousarray(piece).ravel() for piece in pages[name]])


class Memory:
    """Paged KV memory of a server with one order; K and V in one page, or in two tensors."""

    def __init__(self, name: str, apart: bool) -> None:
        self.name, elements = name, 2 * PAGE.half // 2
        self.apart = apart
        shape = (LAYERS, 2, BLOCKS, elements // 2) if apart else (LAYERS, BLOCKS, elements)
        self.array = np.zeros(shape, dtype=np.uint16)

    def page(self, block: int, layer: int) -> Any:
        return self.array[layer, :, block].reshape(-1) if self.apart else self.array[layer, block]

    def fill(self) -> None:
        for block in range(BLOCKS):
            for layer in range(LAYERS):
                page = written(self.name, block, layer)
                if self.apart:
                    self.array[layer, :, block] = page.reshape(2, -1)
                else:
                    self.array[layer, block] = page

    def layout(self) -> Layout:
        layers = []
        for layer in range(LAYERS):
            base = self.array[layer].__array_interface__["data"][0]
            if self.apart:
                halves = [base, self.array[layer, 1].__array_interface__["data"][0]]
                slices = tuple(Slice(at, PAGE.half, PAGE.half) for at in halves)
            else:
                slices = (Slice(base, 2 * PAGE.half, 2 * PAGE.half),)
            layers.append(Layer(f"l.{layer}", slices))
        return Layout(tuple(layers), BLOCKS)


def memories(name: str) -> list[Memory]:
    split = name.endswith("-split")
    return [Memory(name, apart) for apart in ((False, True) if split else (False,))]


def store(directory: Path, name: str, **geometry: Any) -> ucm.Store:
    return ucm.Store(
        storage_backends=str(directory), device="host", model_id="m", order=name, block_tokens=16,
        block_size=LAYERS * 2 * PAGE.half, shard_size=LAYERS * 2 * PAGE.half,
        cache_buffer_capacity_gb=0.0625, segment_size_mb=4, **geometry,
    )  # fmt: skip


def table(layout: Layout) -> Any:
    return AddressTable((s for layer in layout.layers for s in layer.slices), BLOCKS).matrix(range(BLOCKS))


IDS = [bytes([i]) * 16 for i in range(BLOCKS)]


@pytest.mark.parametrize("saved", sorted(MEMORY))
def test_every_order_into_every_other(tmp_path: Path, saved: str) -> None:
    """Blocks saved in one order land in every other, K and V packed or apart, each element right."""
    for source in memories(saved)[-1:]:
        source.fill()
        with store(tmp_path, saved, tensor_size_list=source.layout().slice_lengths) as writer:
            writer.save(IDS, table(source.layout())).wait()
    for mine in (name for name in MEMORY if name != saved):
        assert saved in readable(mine)
        for target in memories(mine):
            converted = convert(target.layout(), mine, saved, PAGE)
            with store(tmp_path, saved, tensor_shape_list=converted.shapes) as reader:
                reader.refresh()
                reader.load(IDS, table(converted.layout)).wait()
            for block in range(BLOCKS):
                for layer in range(LAYERS):
                    assert (target.page(block, layer) == written(mine, block, layer)).all(), (mine, block)


KERNEL_BLOCKS = 2
KERNEL_PAGE = (PAGE.tokens // KERNEL_BLOCKS, PAGE.heads)
"""Tokens and heads of the page of a kernel whose blocks are half as long as vLLM's."""


def registered(arrays: list[Any]) -> Layout:
    """The layout of one array a layer, as vLLM registers it."""
    torch = pytest.importorskip("torch")
    tensors = {f"l.{i}": torch.from_numpy(array.view(np.int16)) for i, array in enumerate(arrays)}
    return geometry.build(tensors, BLOCKS, LAYERS * 2 * PAGE.half, tensors)


@pytest.mark.parametrize("mine", [order.NHD_PACKED, order.NHD_SPLIT])
def test_loads_into_smaller_kernel_blocks_failed(tmp_path: Path, mine: str) -> None:
    """FlashInfer with blocks of 128 tokens has kernel blocks of 64: blocks in other orders were counted as
    hits, and none could be loaded. In token-major orders they land right, each element."""
    target = memories(mine)[-1]
    if target.apart:
        shape: tuple[int, ...] = (2, KERNEL_BLOCKS * BLOCKS, *KERNEL_PAGE, PAGE.dim)
    else:
        shape = (KERNEL_BLOCKS * BLOCKS, *KERNEL_PAGE, 2 * PAGE.dim)
    layout = registered([array.reshape(shape) for array in target.array])
    assert layout.kernel_blocks == KERNEL_BLOCKS
    page = page_shape(layout, mine, PAGE.tokens, (PAGE.heads, PAGE.dim, PAGE.element))
    assert page == PAGE
    for saved in readable(mine):
        source, directory = memories(saved)[-1], tmp_path / saved
        source.fill()
        with store(directory, saved, tensor_size_list=source.layout().slice_lengths) as writer:
            writer.save(IDS, table(source.layout())).wait()
        target.array[:] = 0
        converted = convert(layout, mine, saved, page)
        with store(directory, saved, tensor_shape_list=converted.shapes) as reader:
            reader.refresh()
            reader.load(IDS, table(converted.layout)).wait()
        for block in range(BLOCKS):
            for layer in range(LAYERS):
                assert (target.page(block, layer) == written(mine, block, layer)).all(), (saved, block)


def test_kernel_blocks_that_cut_up_a_page_are_not_converted() -> None:
    """K and V of each kernel block in turn, or heads before tokens: a page is not what its order says."""
    shape = (KERNEL_BLOCKS * BLOCKS, 2, *KERNEL_PAGE, PAGE.dim)
    layout = registered([np.zeros(shape, dtype=np.uint16) for _ in range(LAYERS)])
    assert layout.kernel_blocks == KERNEL_BLOCKS
    heads = (PAGE.heads, PAGE.dim, PAGE.element)
    assert page_shape(layout, order.NHD_SPLIT, PAGE.tokens, heads) is None
    assert page_shape(layout, order.HND_PACKED, PAGE.tokens, heads) is None
    assert page_shape(layout, order.NHD_PACKED, PAGE.tokens, None) is None


def test_refused_pairs() -> None:
    """Private orders neither read nor are read."""
    assert readable("private-cpu-amx") == ()
    with pytest.raises(ConversionError, match="private"):
        convert(Memory(order.NHD_SPLIT, True).layout(), order.NHD_SPLIT, "private-npu-nz", PAGE)
    with pytest.raises(ConversionError, match="private"):
        convert(Memory(order.NHD_SPLIT, True).layout(), "private-npu-nz", order.NHD_SPLIT, PAGE)
