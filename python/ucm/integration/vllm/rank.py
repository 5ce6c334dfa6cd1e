"""Which part of a block this process holds.

Owns the arithmetic of tensor parallelism; knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """A tensor-parallel rank and its part of a block."""

    index: int
    part: int
    """The part that it loads."""
    part_count: int
    """Parts of a block."""
    saves: bool
    """Whether it saves its part: of ranks that hold the same, one does."""


def rank_of(index: int, tensor_parallel: int, kv_heads: int, *, shared: bool) -> Rank:
    """The rank ``index`` of ``tensor_parallel``. ``shared``: all ranks hold the same KV (MLA).

    With fewer KV heads than ranks, neighbouring ranks hold the same head.
    """
    parts = 1 if shared else min(tensor_parallel, kv_heads)
    if tensor_parallel % parts:
        raise ValueError(f"{kv_heads} KV heads cannot be spread evenly over {tensor_parallel} ranks")
    copies = tensor_parallel // parts
    return Rank(index, index // copies, parts, index % copies == 0)
