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
    kv_caches: Mapping[str, Any], block_count: int, expected_bytes: int, names: Iterable[str]
) -> Layout:
    """The layout of what vLLM registered.

    ``names`` are the layers of the one KV cache group, in any order; layers that share a tensor
    with one before them add nothing. ``expected_bytes`` is what the scheduler side computed for a
    block of this rank; another sum is refused, since the two sides would name different namespaces.
    """
    wanted = sorted(names, key=layer_order)
    missing = [name for name in wanted if name not in kv_caches]
    if missing:
        raise GeometryError(f"vLLM registered no KV memory for {', '.join(missing[:4])}")
    layers: list[Layer] = []
    seen: dict[tuple[Slice, ...], str] = {}
    extra = sorted(set(kv_caches) - set(wanted), key=layer_order)
    for name in [*wanted, *extra]:
        entry = kv_caches[name]
        tensors = list(entry) if isinstance(entry, (tuple, list)) else [entry]
        slices = tuple(one for tensor in tensors for one in _tensor_slices(name, tensor, block_count))
        if slices in seen:
            continue  # this layer shares the memory of another
        if name in extra:
            raise GeometryError(f"{name}: registered, but in no KV cache group")
        seen[slices] = name
        layers.append(Layer(name, slices))
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
    runs = sorted((one.base, one.length, layer.name) for layer in layout.layers for one in layer.slices)
    for (base, length, name), (following, _, other) in itertools.pairwise(runs):
        if base + length > following:
            raise GeometryError(f"block 0 of {name} and of {other} overlap in memory")


@dataclass(frozen=True)
class GroupShape:
    """What the KV cache configuration says before any tensor exists; both sides compute it."""

    names: tuple[str, ...]
    block_tokens: int
    part_bytes: int
    block_count: int
    page: tuple[int, int, int] | None
    """KV heads, head size and bytes of an element of this rank, where all layers have the same."""


REFUSED_SPECS: Final = (
    "SlidingWindow", "ChunkedLocal", "Mamba", "Encoder", "Cross", "HiSparse", "CircularBuffer",
    "RSWA", "TQ",
)  # fmt: skip


def group_shape(kv_cache_config: Any) -> GroupShape:
    """The one KV cache group of the model; several groups are refused."""
    groups = list(kv_cache_config.kv_cache_groups)
    if len(groups) != 1:
        kinds = ", ".join(type(g.kv_cache_spec).__name__ for g in groups)
        raise GeometryError(
            f"the model has {len(groups)} KV cache groups ({kinds}); this connector transfers models "
            "with one group. Where vLLM can treat all layers alike, "
            "--disable-hybrid-kv-cache-manager makes one of them"
        )
    spec = groups[0].kv_cache_spec
    names = tuple(groups[0].layer_names)
    layer_specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(names, spec)
    total = 0
    for name in names:
        one = layer_specs[name]
        kind = type(one).__name__
        if kind.startswith(REFUSED_SPECS):
            raise GeometryError(f"{name}: KV memory of kind {kind} is not supported")
        real = int(getattr(one, "real_page_size_bytes", one.page_size_bytes))
        total += real
    pages = {_page_of(layer_specs[name]) for name in names}
    page = pages.pop() if len(pages) == 1 else None
    return GroupShape(names, int(spec.block_size), total, int(kv_cache_config.num_blocks), page)


def _page_of(spec: Any) -> tuple[int, int, int] | None:
    try:
        return int(spec.num_kv_heads), int(spec.head_size), int(spec.dtype.itemsize)
    except AttributeError:
        return None
