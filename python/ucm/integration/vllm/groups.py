"""What vLLM's KV cache configuration says before any tensor exists: groups of layers, and their blocks.

Owns the decision which kinds of KV memory are transferred. Both sides read the same configuration. Knows no
tensor.

A hybrid model has several groups, for instance layers of full attention and layers with a sliding window.
Each numbers its blocks apart, and blocks that left a window are given back while the request runs. A block
of the store is the KV of all layers for a run of tokens, of whichever group: so servers share blocks whether
vLLM groups the layers or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ucm.integration.vllm.geometry import GeometryError

REFUSED_SPECS: Final = (
    "SlidingWindowMLA", "ChunkedLocal", "Mamba", "Encoder", "Cross", "HiSparse", "HiddenState",
    "CircularBuffer", "RSWA", "TQ",
)  # fmt: skip

WINDOW: Final = "SlidingWindow"

ONE_GROUP: Final = (
    "--disable-hybrid-kv-cache-manager makes one group of all layers, where vLLM can treat them alike"
)


@dataclass(frozen=True)
class GroupShape:
    """The KV cache groups of a model."""

    groups: dict[str, int]
    """Of each layer the number of its group."""
    count: int
    """Groups."""
    windowed: bool
    """Whether block tables have gaps: there are several groups, or blocks leave a window."""
    zeroed: bool
    """Whether vLLM sets blocks to zero as it hands them out, which may be before the worker hears of it."""
    block_tokens: int
    part_bytes: int
    block_count: int
    page: tuple[int, int, int] | None
    """KV heads, head size and bytes of an element of this rank, where all layers have the same."""

    @property
    def names(self) -> tuple[str, ...]:
        """All layers."""
        return tuple(self.groups)


def group_shape(kv_cache_config: Any, *, can_fail_requests: bool) -> GroupShape:
    """The groups of a model. ``can_fail_requests``: vLLM takes load failures by request, not only by block,
    which says nothing where groups number their blocks apart."""
    listed = list(kv_cache_config.kv_cache_groups)
    kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in listed)
    if len(listed) > 1 and not can_fail_requests:
        raise GeometryError(
            f"the model has {len(listed)} KV cache groups ({kinds}), and this vLLM cannot be told of loads "
            f"that fail in one of them (0.32 can); {ONE_GROUP}"
        )
    tokens = {int(group.kv_cache_spec.block_size) for group in listed}
    groups: dict[str, int] = {}
    pages: set[tuple[int, int, int] | None] = set()
    total, windows = 0, False
    for number, group in enumerate(listed):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = specs[name] if specs else group.kv_cache_spec
            kind = type(spec).__name__
            if kind.startswith(REFUSED_SPECS) or (kind.startswith(WINDOW) and not can_fail_requests):
                raise GeometryError(f"{name}: KV memory of kind {kind} is not supported")
            windows |= kind.startswith(WINDOW)
            groups[name] = number
            total += int(getattr(spec, "real_page_size_bytes", spec.page_size_bytes))
            pages.add(_page_of(spec))
    if len(tokens) != 1:
        raise GeometryError(
            f"the KV cache groups ({kinds}) have blocks of {sorted(tokens)} tokens; one number is needed; "
            f"{ONE_GROUP}"
        )
    return GroupShape(
        groups,
        len(listed),
        windows or len(listed) > 1,
        bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False)),
        tokens.pop(),
        total,
        int(kv_cache_config.num_blocks),
        pages.pop() if len(pages) == 1 else None,
    )


def _page_of(spec: Any) -> tuple[int, int, int] | None:
    try:
        return int(spec.num_kv_heads), int(spec.head_size), int(spec.dtype.itemsize)
    except AttributeError:
        return None
