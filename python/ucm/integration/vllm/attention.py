"""Which attention kernels vLLM runs on CUDA, and how they lay out a page.

Owns the question to vLLM's own selection, asked as its attention layers ask it, so that every process of
a server gets the same answer before any layer exists; and the check, once they exist, that it was right.
Knows no names of byte orders.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.ucm")


@dataclass(frozen=True)
class Attention:
    """What the byte order of a page depends on."""

    backend: str
    """The backend's name, upper case; empty where vLLM chooses and does not tell."""
    layout: str
    """``NHD`` or ``HND``."""
    kernel_tokens: int
    """Tokens of the kernel's blocks where they are smaller than vLLM's; else 0."""


def named_backend(vllm_config: Any) -> str:
    """The backend that the user named; empty if none."""
    chosen = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    name = getattr(chosen, "name", None) or os.environ.get("VLLM_ATTENTION_BACKEND", "")
    return str(name).upper()


def cuda_attention(vllm_config: Any, block_tokens: int) -> Attention:
    """What vLLM runs, or will run, with this configuration."""
    from vllm.config import set_current_vllm_config

    # Both questions are answered from the current configuration, which only the worker's processes have.
    with set_current_vllm_config(vllm_config):
        backend = _chosen_backend(vllm_config)
        layout = _rows(_layout_name(vllm_config, backend))
        tokens = _kernel_tokens(backend, block_tokens) if backend is not None else 0
    name = named_backend(vllm_config) or ("" if backend is None else str(backend.get_name()).upper())
    return Attention(name, layout, tokens)


def _layout_name(vllm_config: Any, backend: Any) -> str:
    """vLLM's name of the order of dimensions: ``NHD``, ``HND``, or in 0.32 one like ``LBHNC``."""
    from vllm.v1.attention.backends import utils

    if hasattr(utils, "get_kv_cache_layout"):
        required = getattr(backend, "get_required_kv_cache_layout", lambda: None)()
        return str(required or utils.get_kv_cache_layout())
    resolved = vllm_config.cache_config.kv_cache_layout or os.environ.get("VLLM_KV_CACHE_LAYOUT")
    if resolved:
        return str(resolved)
    # Not resolved yet, as in the process of the HTTP server, which only shows it: what will be preferred.
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return str((getattr(backend, "supported_kv_cache_layouts", tuple)() or tuple(KVCacheLayout))[0].name)


def _rows(layout: str) -> str:
    """``NHD``: the heads of a token lie together; ``HND``: the tokens of a head."""
    return "NHD" if layout.index("N") < layout.index("H") else "HND"


def _chosen_backend(vllm_config: Any) -> Any:
    """The class of the backend; None where vLLM does not answer."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    arguments = {
        "head_size": model.get_head_size(),
        "dtype": model.dtype,
        "kv_cache_dtype": cache.cache_dtype,
        "block_size": cache.block_size,  # an argument before 0.18
        "use_mla": bool(getattr(model, "use_mla", False)),
        "use_sparse": hasattr(model.hf_config, "index_topk"),
    }
    try:
        from vllm.v1.attention.selector import get_attn_backend

        accepted = inspect.signature(get_attn_backend).parameters
        return get_attn_backend(**{name: value for name, value in arguments.items() if name in accepted})
    except Exception as error:  # it differs by version; a server must start without the answer
        logger.info("vLLM does not say which attention backend it will choose: %s", error)
        return None


def _kernel_tokens(backend: Any, block_tokens: int) -> int:
    """Tokens of the blocks into which vLLM splits its own for this backend, as it chooses them."""
    sizes: list[Any] = list(getattr(backend, "get_supported_kernel_block_sizes", list)())
    fixed = sorted((size for size in sizes if isinstance(size, int)), reverse=True)
    multiples = [int(size.base) for size in sizes if not isinstance(size, int)]
    if block_tokens in fixed or any(block_tokens % base == 0 for base in multiples):
        return 0
    return next((size for size in fixed if block_tokens % size == 0), 0)


def running_backends(vllm_config: Any, names: Iterable[str]) -> set[str]:
    """The names of the backends of layers that exist."""
    layers = vllm_config.compilation_config.static_forward_context
    asked = (getattr(layers.get(name), "get_attn_backend", None) for name in names)
    return {str(ask().get_name()).upper() for ask in asked if ask is not None}
