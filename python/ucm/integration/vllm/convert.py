"""Reading blocks that another byte order wrote: strided slices over this server's own memory.

Owns what each named order means, as loops over (K or V, token, head, element), and from that the
slices that put bytes saved in one order where another wants them. Copies nothing: the engine does.

Of a page this server knows where K and V of (token 0, head 0) begin and the strides of tokens, heads
and elements. Of the saved bytes it knows the order of the loops. A slice names its runs in saved order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ucm.integration.vllm import order
from ucm.integration.vllm.geometry import Layer, Layout, Slice

SLICES_PER_LAYER_MAX: Final = 4096
"""Where K and V lie in different directions but were saved interleaved, each row is a slice."""


@dataclass(frozen=True)
class PageShape:
    """The page of one layer in one rank."""

    tokens: int
    heads: int
    dim: int
    element: int
    """Bytes of an element."""

    @property
    def half(self) -> int:
        """Bytes of K, and of V."""
        return self.tokens * self.heads * self.dim * self.element


def page_shape(layout: Layout, mine: str, tokens: int, page: tuple[int, int, int] | None) -> PageShape | None:
    """The shape of this server's pages, where other byte orders can be read into them.

    ``page``: KV heads, head size and bytes of an element, where all layers have the same. Where the
    attention kernel has smaller blocks than vLLM, a page of one of them has to follow another: true of
    token-major orders alone, and of K and V apart only if they are apart over the whole page.
    """
    if page is None:
        return None
    if layout.kernel_blocks != 1:
        runs = {order.NHD_PACKED: 1, order.NHD_SPLIT: 2}.get(mine)
        if any(len(layer.slices) != runs for layer in layout.layers):
            return None
    return PageShape(tokens, *page)


@dataclass(frozen=True)
class Strides:
    """Where K or V of a page lies: byte offset of its first element, byte strides of its indices."""

    offset: int
    token: int
    head: int
    element: int


def _row_major(offset: int, element: int, loops: tuple[tuple[str, int], ...]) -> Strides:
    """Strides of an array whose dimensions are listed outermost first."""
    step, found = element, {}
    for name, count in reversed(loops):
        found[name] = step
        step *= count
    return Strides(offset, found["t"], found["h"], found["d"])


def _split_nhd(p: PageShape) -> tuple[Strides, Strides]:
    loops = (("t", p.tokens), ("h", p.heads), ("d", p.dim))
    return _row_major(0, p.element, loops), _row_major(p.half, p.element, loops)


def _split_hnd(p: PageShape) -> tuple[Strides, Strides]:
    loops = (("h", p.heads), ("t", p.tokens), ("d", p.dim))
    return _row_major(0, p.element, loops), _row_major(p.half, p.element, loops)


def _packed_nhd(p: PageShape) -> tuple[Strides, Strides]:
    loops = (("t", p.tokens), ("h", p.heads), ("kv", 2), ("d", p.dim))
    return _row_major(0, p.element, loops), _row_major(p.dim * p.element, p.element, loops)


def _packed_hnd(p: PageShape) -> tuple[Strides, Strides]:
    loops = (("h", p.heads), ("t", p.tokens), ("kv", 2), ("d", p.dim))
    return _row_major(0, p.element, loops), _row_major(p.dim * p.element, p.element, loops)


def _split_cpu(p: PageShape) -> tuple[Strides, Strides]:
    key = _row_major(0, p.element, (("h", p.heads), ("d", p.dim), ("t", p.tokens)))
    return key, _row_major(p.half, p.element, (("h", p.heads), ("t", p.tokens), ("d", p.dim)))


def _packed_cpu(p: PageShape) -> tuple[Strides, Strides]:
    key = _row_major(0, p.element, (("h", p.heads), ("kv", 2), ("d", p.dim), ("t", p.tokens)))
    half = p.tokens * p.dim * p.element
    return key, _row_major(half, p.element, (("h", p.heads), ("kv", 2), ("t", p.tokens), ("d", p.dim)))


MEMORY: Final[dict[str, Callable[[PageShape], tuple[Strides, Strides]]]] = {
    order.NHD_SPLIT: _split_nhd,
    order.HND_SPLIT: _split_hnd,
    order.NHD_PACKED: _packed_nhd,
    order.HND_PACKED: _packed_hnd,
    order.CPU_VEC_SPLIT: _split_cpu,
    order.CPU_VEC_PACKED: _packed_cpu,
}
"""Of each order that can be converted, where K and V lie in a page."""


@dataclass(frozen=True)
class Shape:
    """A strided slice: ``run`` bytes, repeated along ``(count, stride)``, outermost first."""

    offset: int
    """From the beginning of the page; K and V may lie in different tensors, see :func:`place`."""
    run: int
    dimensions: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Bytes of the slice in the saved block."""
        total = self.run
        for count, _ in self.dimensions:
            total *= count
        return total

    def option(self) -> dict[str, object]:
        """As the engine's option ``tensor_shape_list`` has it."""
        return {
            "run": self.run,
            "counts": [count for count, _ in self.dimensions],
            "strides": [stride for _, stride in self.dimensions],
        }


def _slice(page: PageShape, where: Strides, loops: str, base: int = 0) -> Shape:
    """All of K or V (or of one head or row of it), in the order of ``loops``, for instance ``thd``."""
    counts = {"t": page.tokens, "h": page.heads, "d": page.dim}
    steps = {"t": where.token, "h": where.head, "d": where.element}
    dimensions = [(counts[name], steps[name]) for name in loops]
    run = page.element
    if dimensions and dimensions[-1][1] == page.element:
        run *= dimensions.pop()[0]
    return Shape(where.offset + base, run, tuple(dimensions))


def _interleaved(page: PageShape, key: Strides, value: Strides, loops: str) -> list[Shape]:
    """K row, V row, K row, V row...: one slice where both lie alike, else a slice for each row."""
    alike = (key.token, key.head, key.element) == (value.token, value.head, value.element)
    distance = value.offset - key.offset
    if alike and distance > 0:
        rows = _slice(page, key, loops + "d")
        outer, inner = rows.dimensions[:2], rows.dimensions[2:]
        return [Shape(rows.offset, rows.run, (*outer, (2, distance), *inner))]
    counts = {"t": page.tokens, "h": page.heads}
    first, second = loops[0], loops[1]
    out: list[Shape] = []
    for i in range(counts[first]):
        for j in range(counts[second]):
            at = {first: i, second: j}
            for where in (key, value):
                out.append(_slice(page, where, "d", at["t"] * where.token + at["h"] * where.head))
    return out


def _by_head(page: PageShape, key: Strides, value: Strides) -> list[Shape]:
    """For each head K as [dim, token], then V as [token, dim]."""
    out: list[Shape] = []
    for head in range(page.heads):
        out.append(_slice(page, key, "dt", head * key.head))
        out.append(_slice(page, value, "td", head * value.head))
    return out


SAVED: Final[dict[str, Callable[[PageShape, Strides, Strides], list[Shape]]]] = {
    order.NHD_SPLIT: lambda p, k, v: [_slice(p, k, "thd"), _slice(p, v, "thd")],
    order.HND_SPLIT: lambda p, k, v: [_slice(p, k, "htd"), _slice(p, v, "htd")],
    order.NHD_PACKED: lambda p, k, v: _interleaved(p, k, v, "th"),
    order.HND_PACKED: lambda p, k, v: _interleaved(p, k, v, "ht"),
    order.CPU_VEC_SPLIT: lambda p, k, v: [_slice(p, k, "hdt"), _slice(p, v, "htd")],
    order.CPU_VEC_PACKED: _by_head,
}
"""Of each order, how the saved bytes of a page run over K and V of this server's memory."""


class ConversionError(ValueError):
    """Blocks of that order cannot be read here."""


def readable(mine: str) -> tuple[str, ...]:
    """The other orders that a server with order ``mine`` can read."""
    return tuple(name for name in SAVED if name != mine) if mine in MEMORY else ()


def page_slices(mine: str, saved: str, page: PageShape, value_distance: int | None = None) -> list[Shape]:
    """The slices that read a page saved in order ``saved`` into memory of order ``mine``.

    ``value_distance``: bytes from K to V where they lie in different tensors.
    """
    if mine not in MEMORY or saved not in SAVED:
        raise ConversionError(f"order {saved} cannot be read by a server with order {mine}")
    key, value = MEMORY[mine](page)
    if value_distance is not None:
        value = Strides(value_distance, value.token, value.head, value.element)
    shapes = SAVED[saved](page, key, value)
    if len(shapes) > SLICES_PER_LAYER_MAX:
        raise ConversionError(
            f"order {saved} into {mine}: {len(shapes)} runs a layer are more than {SLICES_PER_LAYER_MAX}"
        )
    return shapes


@dataclass(frozen=True)
class Converted:
    """A layout whose slices read another order."""

    layout: Layout
    shapes: list[dict[str, object]]
    """``tensor_shape_list``, in the order of the layout's slices."""


def convert(layout: Layout, mine: str, saved: str, page: PageShape) -> Converted:
    """This server's memory, cut so that blocks saved in another order land right."""
    layers: list[Layer] = []
    options: list[dict[str, object]] = []
    for layer in layout.layers:
        pieces = layer.slices
        if layer.length != 2 * page.half or len(pieces) > 2 or (
            len(pieces) == 2 and (pieces[0].length != page.half or pieces[0].stride != pieces[1].stride)
        ):  # fmt: skip
            raise ConversionError(f"{layer.name}: its pages are cut up, and no other order can be read")
        distance = pieces[1].base - pieces[0].base if len(pieces) == 2 else None
        shapes = page_slices(mine, saved, page, distance)
        first = pieces[0]
        layers.append(
            Layer(
                layer.name,
                tuple(Slice(first.base + s.offset, first.stride, s.length) for s in shapes),
                layer.group,
            )
        )
        options += [shape.option() for shape in shapes]
    return Converted(Layout(tuple(layers), layout.block_count), options)
