"""Which part of a block this process holds.

Owns the arithmetic of tensor and pipeline parallelism; knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """A rank of a pipeline stage and its part of a block."""

    index: int
    """Over all stages."""
    part: int
    """The part that it loads."""
    part_count: int
    """Parts of a block."""
    saves: bool
    """Whether it saves its part: of ranks that hold the same, one does."""
    local_ranks: int = 1
    """Ranks of this host, which divide its memory."""


def rank_of(
    index: int, tensor_parallel: int, kv_heads: int, *, shared: bool, stage: int = 0, stages: int = 1
) -> Rank:
    """The rank ``index`` of ``tensor_parallel`` in a pipeline stage. ``shared``: all ranks of a stage hold
    the same KV (MLA).

    With fewer KV heads than ranks, neighbouring ranks hold the same head. The parts of a block are those of
    the first stage, then those of the second, and so on.
    """
    parts = 1 if shared else min(tensor_parallel, kv_heads)
    if tensor_parallel % parts:
        raise ValueError(f"{kv_heads} KV heads cannot be spread evenly over {tensor_parallel} ranks")
    copies = tensor_parallel // parts
    return Rank(
        stage * tensor_parallel + index, stage * parts + index // copies, stages * parts, index % copies == 0
    )
