"""What runs here: reads vLLM's configuration into a namespace, the same on both sides and in every
process of a server.

Owns the look into ``VllmConfig``; the names it finds there differ by vLLM version. Opens no store.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Final

from ucm.integration.vllm.attention import Attention, cuda_attention, named_backend, running_backends
from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.namespace import (
    FORMAT_VERSION,
    Namespace,
    NamespaceError,
    model_fingerprint,
)
from ucm.integration.vllm.order import PRIVATE, Platform, order_name

EFFECTIVE_KEYS: Final = ("sliding_window", "max_window_layers", "layer_types", "use_sliding_window")
"""Keys of the effective HF config that flags can change without changing config.json."""


def vllm_version() -> tuple[int, int]:
    """Major and minor version of the running vLLM."""
    import vllm

    numbers = [*vllm.__version__.split("+")[0].split("."), "0", "0"][:2]
    return int(numbers[0]), int("".join(c for c in numbers[1] if c.isdigit()) or 0)


def dtype_name(dtype: Any) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def kv_dtype_name(vllm_config: Any) -> str:
    """The element type of the KV memory; ``auto`` is the model's."""
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    return dtype_name(vllm_config.model_config.dtype) if cache_dtype == "auto" else cache_dtype


def is_mla(vllm_config: Any) -> bool:
    """Whether all ranks hold the same compressed KV."""
    return bool(getattr(vllm_config.model_config, "use_mla", False))


def _rope(config: Any) -> Any:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)
    merged = dict(rope) if isinstance(rope, dict) else {"rope": str(rope)}
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    kind = merged.pop("type", None)  # the older name of rope_type
    merged.setdefault("rope_type", kind or "default")
    return merged


def _effective(model_config: Any) -> dict[str, Any]:
    """What of the effective HF config can differ from config.json, normalized over versions."""
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    overrides = getattr(model_config, "hf_overrides", None) or {}
    effective: dict[str, Any] = {"rope": _rope(text)}
    if callable(overrides):
        effective["config"] = model_config.hf_config.to_dict()
    elif overrides:
        effective["overrides"] = overrides
    for key in EFFECTIVE_KEYS:
        value = getattr(text, key, None)
        if value not in (None, False, 0):
            effective[key] = value
    if getattr(model_config, "disable_sliding_window", False):
        effective["disable_sliding_window"] = True
    return effective


def model_directory(model_config: Any) -> str | None:
    """The local directory of the model's files, without asking a hub."""
    model = str(model_config.model)
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import try_to_load_from_cache

        revision = getattr(model_config, "revision", None)
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


def _model_field(vllm_config: Any, config: ConnectorConfig) -> str:
    model = vllm_config.model_config
    if config.model_id:
        return config.model_id
    name = f"{model.model}@{getattr(model, 'revision', None) or ''}"
    return model_fingerprint(model_directory(model), name, _effective(model))


def long_rope(model_config: Any, model_len_max: int) -> str:
    """Which factors LongRoPE turns keys with, as vLLM chooses: once for a server, by the longest sequence
    that it takes. Empty for other models, whose keys do not depend on that length."""
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    rope = _rope(text)
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # or one a layer type
        if one.get("rope_type") in ("longrope", "su"):
            original = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", 0
            )
            return "long" if model_len_max > int(original or 0) else "short"
    return ""


def _choices(vllm_config: Any) -> dict[str, str]:
    """Fields that only some servers have: what flags choose that changes keys, with ``model_id`` too."""
    model = vllm_config.model_config
    fields = {"rope": long_rope(model, int(model.max_model_len))}
    load_format = getattr(getattr(vllm_config, "load_config", None), "load_format", "")
    if str(getattr(load_format, "value", load_format)) == "dummy":
        fields["weights"] = "dummy"  # made up by vLLM: the files are not read
    return {name: value for name, value in fields.items() if value}


def _draft_field(vllm_config: Any) -> str:
    spec = getattr(vllm_config, "speculative_config", None)
    if spec is None:
        return ""
    draft = getattr(spec, "draft_model_config", None)
    if draft is None or str(getattr(spec, "method", "")) in ("ngram", "suffix"):
        return ""  # it keeps no KV of its own
    name = f"{draft.model}@{getattr(draft, 'revision', None) or ''}"
    digest = model_fingerprint(model_directory(draft), name, _effective(draft))
    rope = long_rope(draft, int(vllm_config.model_config.max_model_len))
    return f"{getattr(spec, 'method', 'draft')}:{digest}{rope and ':' + rope}"


def refuse_unsafe(vllm_config: Any) -> None:
    """Refuses what would put different bytes under one name."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if getattr(cache, "calculate_kv_scales", False):
        raise NamespaceError(
            "--calculate-kv-scales: the scales depend on the first prompt that a server sees, so its "
            "KV means something else on every server; use scales from the checkpoint"
        )
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if int(getattr(parallel, name, 1) or 1) > 1:
            raise NamespaceError(f"{flag}: context parallelism interleaves tokens over ranks; not supported")
    stages = int(parallel.pipeline_parallel_size)
    if stages > 1:
        counts = [layers_of(vllm_config, stage) for stage in range(stages)]
        if len(set(counts)) > 1:
            raise NamespaceError(
                f"--pipeline-parallel-size {stages}: the stages hold {counts} layers, but the parts of a "
                "block have one size; choose a number of stages that divides the layers, or set "
                "VLLM_PP_LAYER_PARTITION"
            )


def local_ranks(vllm_config: Any) -> int:
    """Ranks that share this host and its memory, those of other data-parallel engines included."""
    parallel = vllm_config.parallel_config
    ranks = int(parallel.local_world_size) * max(1, int(parallel.data_parallel_size_local))
    if str(parallel.distributed_executor_backend) == "ray":
        import torch

        # Ray places ranks on hosts that the configuration does not name: no more than there are devices.
        ranks = min(ranks, max(1, torch.accelerator.device_count()))
    return ranks


def layers_of(vllm_config: Any, stage: int) -> int:
    """Layers of a pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    layers = int(vllm_config.model_config.get_total_num_hidden_layers())
    first, end = get_pp_indices(layers, stage, int(vllm_config.parallel_config.pipeline_parallel_size))
    return int(end) - int(first)


def cpu_isa(vllm_config: Any, block_tokens: int) -> str:
    """The instruction set that vLLM's CPU kernels choose, as they choose it."""
    from vllm.v1.attention.backends import cpu_attn

    model = vllm_config.model_config
    choose: Any = cpu_attn._get_attn_isa
    arguments: list[Any] = [model.dtype, block_tokens, model.get_head_size()]
    if choose.__code__.co_argcount > len(arguments):
        arguments.append(str(vllm_config.cache_config.cache_dtype))
    return str(choose(*arguments))


def find_platform(vllm_config: Any, block_tokens: int) -> Platform:
    """What the byte order depends on, here."""
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    if device == "cuda" and current_platform.is_rocm():
        device = "rocm"
    if device == "cuda":
        attention = cuda_attention(vllm_config, block_tokens)
    else:
        attention = Attention("CPU_ATTN" if device == "cpu" else named_backend(vllm_config), "", 0)
    return Platform(
        device=device,
        backend=attention.backend,
        kernel_tokens=attention.kernel_tokens,
        vllm=vllm_version(),
        isa=cpu_isa(vllm_config, block_tokens) if device == "cpu" else "",
        family="mla" if is_mla(vllm_config) else "gqa",
        kv_dtype=kv_dtype_name(vllm_config),
        layout=attention.layout,
    )


def refuse_other_backends(vllm_config: Any, namespace: Namespace, platform: Platform, names: Any) -> None:
    """Refuses layers whose kernels write another byte order than the namespace names."""
    if platform.device != "cuda" or namespace.order.startswith(PRIVATE):
        return
    for backend in running_backends(vllm_config, names):
        if order_name(dataclasses.replace(platform, backend=backend)) != namespace.order:
            raise NamespaceError(
                f"the attention layers run on {backend}, whose byte order is not {namespace.order}; "
                f"start vLLM with --attention-backend {backend}"
            )


def find_namespace(vllm_config: Any, config: ConnectorConfig, block_tokens: int) -> Namespace:
    """The namespace of this server."""
    refuse_unsafe(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    fields = {
        "format": str(FORMAT_VERSION),
        "model": _model_field(vllm_config, config),
        "dtype": dtype_name(model.dtype),
        "kv_dtype": kv_dtype_name(vllm_config),
        "quantization": str(getattr(model, "quantization", None) or ""),
        "block_size": str(block_tokens),
        "tp": "1" if is_mla(vllm_config) else str(parallel.tensor_parallel_size),
        "pp": str(parallel.pipeline_parallel_size),
        "draft": _draft_field(vllm_config),
        "extra": config.namespace_extra,
        **_choices(vllm_config),
    }
    return Namespace(fields, order_name(find_platform(vllm_config, block_tokens)))
