"""From registered KV tensors to addresses: every layout that vLLM has, byte for byte."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ucm.integration.vllm import geometry
from ucm.integration.vllm.geometry import AddressTable, GeometryError

BLOCKS, TOKENS, HEADS, DIM = 6, 8, 2, 4
ELEMENT = 2
PAGE = 2 * TOKENS * HEADS * DIM * ELEMENT


def numbered(*shape: int) -> Any:
    count = 1
    for n in shape:
        count *= n
    return torch.arange(count, dtype=torch.int16).reshape(shape)


def read(layout: Any, block: int) -> bytes:
    """A block's bytes, through the addresses."""
    slices = [one for layer in layout.layers for one in layer.slices]
    row = AddressTable(slices, layout.block_count).matrix([block])[0]
    return b"".join(ctypes.string_at(int(a), s.length) for a, s in zip(row, slices, strict=True))


def raw(tensor: Any) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def test_packed_and_split_pages() -> None:
    """K and V packed in one page, and K and V in two halves of a tensor."""
    packed = {f"l.{i}": numbered(BLOCKS, HEADS, TOKENS, 2 * DIM) + 1000 * i for i in range(12)}
    layout = geometry.build(packed, BLOCKS, 12 * PAGE, packed)
    assert [layer.name for layer in layout.layers] == [f"l.{i}" for i in range(12)]
    assert read(layout, 3) == b"".join(raw(packed[f"l.{i}"][3]) for i in range(12))
    split = {"l.0": numbered(2, BLOCKS, TOKENS, HEADS, DIM)}
    layout = geometry.build(split, BLOCKS, PAGE, split)
    assert read(layout, 5) == raw(split["l.0"][0, 5]) + raw(split["l.0"][1, 5])


def test_five_dimensions_with_blocks_first() -> None:
    """(blocks, 2, ...): the second dimension is K and V, and is not taken for the blocks."""
    tensor = {"l.0": numbered(BLOCKS, 2, TOKENS, HEADS, DIM)}
    layout = geometry.build(tensor, BLOCKS, PAGE, tensor)
    assert read(layout, 4) == raw(tensor["l.0"][4])


def test_permuted_strides() -> None:
    """HND memory behind an NHD shape: the bytes of the page as they lie."""
    memory = numbered(2, BLOCKS, HEADS, TOKENS, DIM)
    seen = {"l.0": memory.permute(0, 1, 3, 2, 4)}
    layout = geometry.build(seen, BLOCKS, PAGE, seen)
    assert read(layout, 2) == raw(memory[0, 2]) + raw(memory[1, 2])


def test_kernel_blocks_smaller_than_blocks() -> None:
    """The kernel's blocks of half the size: two of them make one."""
    tensor = {"l.0": numbered(2 * BLOCKS, TOKENS // 2, HEADS, 2 * DIM)}
    layout = geometry.build(tensor, BLOCKS, PAGE, tensor)
    assert read(layout, 3) == raw(tensor["l.0"][6:8])
    split = {"l.0": numbered(2, 2 * BLOCKS, TOKENS // 2, HEADS, DIM)}
    layout = geometry.build(split, BLOCKS, PAGE, split)
    assert read(layout, 3) == raw(split["l.0"][0, 6:8]) + raw(split["l.0"][1, 6:8])


def test_layers_in_one_storage() -> None:
    """All layers' pages of a block beside each other, as views with a wider block stride."""
    storage = numbered(BLOCKS, 3, HEADS, TOKENS, 2 * DIM)
    views = {f"l.{i}": storage[:, i] for i in range(3)}
    layout = geometry.build(views, BLOCKS, 3 * PAGE, views)
    assert read(layout, 1) == raw(storage[1])
    halves = {f"l.{i}": storage.reshape(2 * BLOCKS, 3, HEADS, TOKENS // 2, 2 * DIM)[:, i] for i in range(3)}
    layout = geometry.build(halves, BLOCKS, 3 * PAGE, halves)
    want = b"".join(raw(halves[f"l.{i}"][2]) + raw(halves[f"l.{i}"][3]) for i in range(3))
    assert read(layout, 1) == want


def test_shared_and_tuple_tensors() -> None:
    """A layer that shares a tensor adds nothing; tuples are K and V apart."""
    tensor = numbered(BLOCKS, HEADS, TOKENS, 2 * DIM)
    layout = geometry.build({"l.0": tensor, "l.1": tensor}, BLOCKS, PAGE, ["l.0"])
    assert len(layout.layers) == 1
    pair = {"l.0": (numbered(BLOCKS, TOKENS, HEADS, DIM), numbered(BLOCKS, TOKENS, HEADS, DIM) + 500)}
    layout = geometry.build(pair, BLOCKS, PAGE, pair)
    assert read(layout, 2) == raw(pair["l.0"][0][2]) + raw(pair["l.0"][1][2])


@pytest.mark.parametrize(
    ("tensors", "expected", "names", "words"),
    [
        ({"l.0": numbered(BLOCKS + 1, HEADS, TOKENS, 2 * DIM)}, PAGE, ["l.0"], "multiple of the 6 blocks"),
        ({"l.0": numbered(BLOCKS, HEADS, TOKENS, 2 * DIM)}, PAGE + 2, ["l.0"], "bytes a block"),
        ({"l.0": numbered(BLOCKS, HEADS, TOKENS, 2 * DIM)}, PAGE, ["l.0", "l.1"], "no KV memory for l.1"),
        ({"a": numbered(BLOCKS, 4), "b": numbered(BLOCKS, 4)}, 8, ["a"], "in no KV cache group"),
        ({"l.0": numbered(BLOCKS, 300, 2)[:, :, :1]}, 600, ["l.0"], "contiguous runs"),
    ],
)
def test_refusals(tensors: Any, expected: int, names: Any, words: str) -> None:
    """What cannot be mapped exactly is refused, and the text says what and why."""
    with pytest.raises(GeometryError, match=words):
        geometry.build(tensors, BLOCKS, expected, names)


def test_two_blocks_are_ambiguous() -> None:
    """With two blocks the leading 2 could be either; that is refused, not guessed."""
    with pytest.raises(GeometryError, match="cannot be told"):
        geometry.build({"l.0": numbered(2, 2, TOKENS, HEADS, DIM)}, 2, PAGE, ["l.0"])


def test_block_numbers_are_checked() -> None:
    """A block number outside the memory never becomes an address."""
    layout = geometry.build({"l.0": numbered(BLOCKS, 4)}, BLOCKS, 8, ["l.0"])
    table = AddressTable(layout.layers[0].slices, BLOCKS)
    with pytest.raises(GeometryError):
        table.matrix([0, BLOCKS])


def test_layerwise_needs_pages() -> None:
    """Layers of odd size, or of different sizes, cannot be transferred one at a time."""
    small = geometry.build({"l.0": numbered(BLOCKS, 4)}, BLOCKS, 8, ["l.0"])
    assert "4096" in str(small.layerwise_obstacle())
    even = geometry.build({"l.0": numbered(BLOCKS, 2048)}, BLOCKS, 4096, ["l.0"])
    assert even.layerwise_obstacle() is None
