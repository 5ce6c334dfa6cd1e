"""The names of byte orders: how the bytes of a page lie, which shape and stride do not tell.

Owns one explicit table from platform, attention backend, vLLM version, ISA, model family and KV
dtype to a name. What the table does not list gets a private name, which no other server shares
unless it is the same in all of these. Converts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NHD_SPLIT: Final = "nhd-split"
"""Per layer K then V, each [token, head, dim]."""
HND_PACKED: Final = "hnd-packed"
"""Per layer, per head, per token: K row then V row."""
NHD_PACKED: Final = "nhd-packed"
"""Per layer, per token, per head: K row then V row."""
HND_SPLIT: Final = "hnd-split"
"""Per layer K then V, each [head, token, dim]."""
CPU_VEC_SPLIT: Final = "cpu-vec-split"
"""Per layer K then V; K is [head, dim, token], V is [head, token, dim]."""
CPU_VEC_PACKED: Final = "cpu-vec-packed"
"""Per layer, per head: K as [dim, token], then V as [token, dim]."""


@dataclass(frozen=True)
class Platform:
    """What the byte order of a page depends on."""

    device: str
    """``cpu``, ``cuda``, ``rocm``, ``npu`` or ``xpu``."""
    backend: str
    """The attention backend's name, upper case."""
    vllm: tuple[int, int]
    """Major and minor version."""
    isa: str
    """On a CPU the kernels' instruction set: ``vec``, ``vec16``, ``amx``, ``neon``...; else empty."""
    family: str
    """``gqa`` or ``mla``."""
    kv_dtype: str
    """Element type of the KV memory."""
    layout: str
    """``NHD`` or ``HND`` where vLLM lets it be chosen; else empty."""
    kernel_tokens: int = 0
    """Tokens of the kernel's blocks where they are smaller than vLLM's; else 0."""


PACKED_SINCE: Final = (0, 26)
"""From this version K and V of a token lie together on CUDA and on the CPU."""

PLAIN_DTYPES: Final = frozenset({"bfloat16", "float16", "float32"})
VECTOR_ISAS: Final = frozenset({"vec"})
CUDA_BACKENDS: Final = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"})
ASCEND_BACKENDS: Final = frozenset({"ASCEND", "ASCEND_ATTN"})


TOKEN_MAJOR: Final = frozenset({NHD_SPLIT, NHD_PACKED})
"""Orders in which a page of smaller kernel blocks has the same bytes as a page of one."""


def order_name(platform: Platform) -> str:
    """The name of the byte order; equal names mean equal bytes."""
    name = _shared_name(platform) or private_name(platform)
    if platform.kernel_tokens and name not in TOKEN_MAJOR:
        name += f"-k{platform.kernel_tokens}"
    return name


def _shared_name(platform: Platform) -> str | None:
    """The name in the table."""
    if platform.family == "gqa" and platform.kv_dtype in PLAIN_DTYPES:
        packed = platform.vllm >= PACKED_SINCE
        if platform.device == "cpu" and platform.isa in VECTOR_ISAS:
            return CPU_VEC_PACKED if packed else CPU_VEC_SPLIT
        if platform.device == "cuda" and platform.backend in CUDA_BACKENDS:
            if packed:
                return HND_PACKED if platform.layout == "HND" else NHD_PACKED
            if platform.backend == "FLASH_ATTN":
                return HND_SPLIT if platform.layout == "HND" else NHD_SPLIT
        if platform.device == "npu" and platform.backend in ASCEND_BACKENDS:
            return NHD_SPLIT
    return None


PRIVATE: Final = "private-"
"""How private names begin."""


def private_name(platform: Platform) -> str:
    """A name that only an equal platform has."""
    major, minor = platform.vllm
    words = [
        platform.device, platform.backend, f"{major}.{minor}", platform.isa,
        platform.family, platform.kv_dtype, platform.layout,
    ]  # fmt: skip
    return PRIVATE + "-".join(word.lower().replace(" ", "_") for word in words if word)
