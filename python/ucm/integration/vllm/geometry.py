"""Where a block's bytes lie in the KV memory that vLLM registered.

Owns the mapping from (layer, block number) to addresses: which tensors there are, which dimension
counts blocks, what is contiguous, which layers share memory. Whatever cannot be mapped exactly is
refused with the tensor's name, shape and strides. Knows no store and no byte order: the bytes of a
page are taken as they lie.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PAGE_BYTES: Final = 4096
"""Layer-wise shards are multiples of this."""

NULL_BLOCK: Final = 0
"""vLLM's block that holds nothing."""

SLICES_PER_LAYER_MAX: Final = 256
"""More runs than this per layer and block would be a copy of crumbs."""


class GeometryError(ValueError):
    """The registered KV memory cannot be mapped exactly."""


@dataclass(frozen=True)
class Slice:
    """One contiguous run of bytes per block: block ``b`` has it at ``base + b * stride``."""

    base: int
    stride: int
    length: int


@dataclass(frozen=True)
class Layer:
    """The slices of one layer, in the order in which their bytes are stored."""

    name: str
    slices: tuple[Slice, ...]
    group: int = 0
    """Its KV cache group: groups number their blocks apart, in memory that they may share."""

    @property
    def length(self) -> int:
        """Bytes of one block in this layer."""
        return sum(one.length for one in self.slices)


@dataclass(frozen=True)
class Layout:
    """All layers of one rank."""

    layers: tuple[Layer, ...]
    block_count: int
    kernel_blocks: int = 1
    """Blocks of the attention kernel that make one of vLLM's."""

    @property
    def part_bytes(self) -> int:
        """Bytes of one block in this rank."""
        return sum(layer.length for layer in self.layers)

    @property
    def slice_lengths(self) -> list[int]:
        """Lengths of all slices of a block, layer by layer."""
        return [one.length for layer in self.layers for one in layer.slices]

    def layerwise_obstacle(self) -> str | None:
        """Why layers cannot be transferred one at a time; None if they can."""
        shapes = {tuple(one.length for one in layer.slices) for layer in self.layers}
        if len(shapes) > 1:
            return "its layers have slices of different sizes"
        if self.layers[0].length % PAGE_BYTES:
            return f"a layer has {self.layers[0].length} bytes a block, no multiple of {PAGE_BYTES}"
        return None


class AddressTable:
    """Computes pointer matrices for runs of blocks."""

    def __init__(self, slices: Iterable[Slice], block_count: int) -> None:
        listed = list(slices)
        self._base = np.array([one.base for one in listed], dtype=np.uint64)
        self._stride = np.array([one.stride for one in listed], dtype=np.uint64)
        self._block_count = block_count

    def matrix(self, slots: Any) -> npt.NDArray[np.uint64]:
        """One row per block number, one column per slice."""
        numbers = np.asarray(slots, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self._block_count):
            raise GeometryError(f"a block number is outside 0 to {self._block_count - 1}")
        rows = numbers.astype(np.uint64)[:, None]
        table: npt.NDArray[np.uint64] = self._base + rows * self._stride
        return table


def layer_order(name: str) -> tuple[Any, ...]:
    """Sorts layer names by the numbers in them, so that layer 10 comes after layer 9."""
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name))


def _describe(name: str, tensor: Any) -> str:
    return (
        f"{name}: shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}, "
        f"{str(tensor.dtype).removeprefix('torch.')}"
    )


def _block_dimension(name: str, tensor: Any, block_count: int) -> tuple[int, int]:
    """Which dimension counts blocks, and how many kernel blocks make a block."""
    shape = tuple(tensor.shape)
    # vLLM's layouts count blocks first, or second after a leading (K, V) dimension of 2.
    if len(shape) >= 3 and shape[0] == 2 and shape[1] >= block_count and shape[1] % block_count == 0:
        if shape[0] >= block_count:
            raise GeometryError(
                f"{_describe(name, tensor)}: with {block_count} blocks it cannot be told whether the "
                "first dimension counts blocks or K and V; give vLLM more KV memory"
            )
        return 1, shape[1] // block_count
    if shape and shape[0] >= block_count and shape[0] % block_count == 0:
        return 0, shape[0] // block_count
    raise GeometryError(
        f"{_describe(name, tensor)}: no leading dimension is a multiple of the {block_count} blocks"
    )


def _runs(dims: list[tuple[int, int]], element: int) -> tuple[list[int], int]:
    """Offsets and length of the contiguous runs of dimensions given as (count, byte stride)."""
    ordered = sorted((d for d in dims if d[0] > 1), key=lambda d: d[1])
    run = element
    while ordered and ordered[0][1] == run:
        run *= ordered.pop(0)[0]
    offsets = [0]
    for count, stride in reversed(ordered):
        if stride < run:
            return [], 0
        offsets = [o + i * stride for o in offsets for i in range(count)]
    return sorted(offsets), run


def _tensor_slices(name: str, tensor: Any, block_count: int) -> list[Slice]:
    element = int(tensor.element_size())
    dimension, kernel_blocks = _block_dimension(name, tensor, block_count)
    strides = [int(s) * element for s in tensor.stride()]
    base = int(tensor.data_ptr())
    page_dims = [
        (int(n), s) for i, (n, s) in enumerate(zip(tensor.shape, strides, strict=True)) if i > dimension
    ]
    outer = [i * strides[0] for i in range(int(tensor.shape[0]))] if dimension == 1 else [0]
    stride = strides[dimension]
    offsets, run = _runs([*page_dims, (kernel_blocks, stride)], element)
    if not offsets or len(offsets) * len(outer) > SLICES_PER_LAYER_MAX:
        raise GeometryError(f"{_describe(name, tensor)}: a block is no small set of contiguous runs")
    return [Slice(base + lead + offset, stride * kernel_blocks, run) for lead in outer for offset in offsets]


def build(
    kv_caches: Mapping[str, Any], block_count: int, expected_bytes: int, names: Iterable[str],
    groups: Mapping[str, int] | None = None,
) -> Layout:  # fmt: skip
    """The layout of what vLLM registered.

    ``names`` are the layers of all KV cache groups, in any order, and ``groups`` says which group each is in
    (absent: there is one); layers that share a tensor with one before them in their group add nothing.
    ``expected_bytes`` is what the scheduler side computed for a block of this rank; another sum is refused,
    since the two sides would name different namespaces.
    """
    groups = groups or {}
    wanted = sorted(names, key=layer_order)
    missing = [name for name in wanted if name not in kv_caches]
    if missing:
        raise GeometryError(f"vLLM registered no KV memory for {', '.join(missing[:4])}")
    layers: list[Layer] = []
    seen: set[tuple[int, tuple[Slice, ...]]] = set()
    extra = sorted(set(kv_caches) - set(wanted), key=layer_order)
    for name in [*wanted, *extra]:
        entry = kv_caches[name]
        tensors = list(entry) if isinstance(entry, (tuple, list)) else [entry]
        slices = tuple(one for tensor in tensors for one in _tensor_slices(name, tensor, block_count))
        group = groups.get(name, 0)
        if (group, slices) in seen:
            continue  # this layer shares the memory of another
        if name in extra:
            if any(slices == other for _, other in seen):
                continue
            raise GeometryError(f"{name}: registered, but in no KV cache group")
        seen.add((group, slices))
        layers.append(Layer(name, slices, group))
    layout = Layout(tuple(layers), block_count, _kernel_blocks(kv_caches, block_count))
    if layout.part_bytes != expected_bytes:
        raise GeometryError(
            f"the registered tensors hold {layout.part_bytes} bytes a block, vLLM's KV cache "
            f"configuration says {expected_bytes}"
            + "".join(f"; {_describe(n, t)}" for n, t in list(kv_caches.items())[:1] if hasattr(t, "shape"))
        )
    _refuse_overlap(layout)
    return layout


def _kernel_blocks(kv_caches: Mapping[str, Any], block_count: int) -> int:
    counts = {
        _block_dimension(name, tensor, block_count)[1]
        for name, entry in kv_caches.items()
        for tensor in (entry if isinstance(entry, (tuple, list)) else [entry])
    }
    if len(counts) > 1:
        raise GeometryError(f"layers split blocks into {sorted(counts)} kernel blocks; one number is needed")
    return counts.pop()


def _refuse_overlap(layout: Layout) -> None:
    runs = sorted(
        (layer.group, one.base, one.length, layer.name) for layer in layout.layers for one in layer.slices
    )
    for (group, base, length, name), (next_group, following, _, other) in itertools.pairwise(runs):
        if group == next_group and base + length > following:
            raise GeometryError(f"block 0 of {name} and of {other} overlap in memory")
