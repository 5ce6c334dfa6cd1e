"""Namespaces and refusals, from configurations that vLLM itself makes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from simulation import make_request
from tiny_model import make
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1 import kv_cache_interface as kv

from ucm import Store
from ucm.integration.vllm.attention import cuda_attention
from ucm.integration.vllm.config import parse
from ucm.integration.vllm.geometry import GeometryError
from ucm.integration.vllm.groups import group_shape
from ucm.integration.vllm.hashing import AdapterDigests, RequestExtras
from ucm.integration.vllm.namespace import NamespaceError, neighbours
from ucm.integration.vllm.order import Platform
from ucm.integration.vllm.platform import find_namespace, refuse_other_backends
from ucm.integration.vllm.rank import rank_of

BLOCK = 32

EXTRAS = [
    "b83a346941f60385",
    "08d30ee0822d5932",
    "6a9819060f23f311",
    "6a9819060f23f311",
]
"""Digests of a request's extra bytes; they may never change."""


@functools.cache
def _config(model: str, arguments: str) -> Any:
    return EngineArgs(
        model=model, enforce_eager=True,
        **{"dtype": "bfloat16", "block_size": BLOCK, "max_model_len": 4096, **json.loads(arguments)},
    ).create_engine_config()  # fmt: skip


def vllm_config(model: str, **arguments: Any) -> Any:
    return copy.deepcopy(_config(model, json.dumps(arguments, sort_keys=True)))


def ucm_config(**keys: Any) -> Any:
    engine = {"store_pipeline": "Cache|Posix", "storage_backends": "/nowhere", **keys}
    return parse({"ucm_connectors": [{"ucm_connector_config": engine}]}, "")


def namespace(config: Any, **keys: Any) -> Any:
    return find_namespace(config, ucm_config(**keys), int(config.cache_config.block_size))


def test_equal_servers_share(model: str, tmp_path: Path) -> None:
    """Two processes of one configuration, and a copy of the model elsewhere, are one namespace."""
    mine = namespace(vllm_config(model))
    assert mine == namespace(vllm_config(model))
    copied = str(make(tmp_path / "copied"))
    assert namespace(vllm_config(copied)) == mine
    assert namespace(vllm_config(copied), model_id="m") == namespace(vllm_config(model), model_id="m")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"block_size": 64}, "block_size"),
        ({"hf_overrides": {"rope_theta": 500000.0}}, "model"),
        (
            {"hf_overrides": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}},
            "model",
        ),
        ({"pipeline_parallel_size": 2}, "pp"),
        ({"tensor_parallel_size": 2}, "tp"),
        ({"load_format": "dummy"}, "weights"),
    ],
)
def test_what_decides_content(model: str, arguments: dict[str, Any], field: str) -> None:
    """One argument of vLLM changes the namespace, in the field that says so."""
    mine, other = namespace(vllm_config(model)), namespace(vllm_config(model, **arguments))
    assert mine.logical != other.logical
    assert mine.fields.get(field) != other.fields[field]


def test_made_up_weights_are_not_those_of_the_files(model: str) -> None:
    """``--load-format dummy`` shared with servers of the real weights; ``model_id`` stands for those too."""
    real, dummy = vllm_config(model), vllm_config(model, load_format="dummy")
    assert namespace(real, model_id="m").logical != namespace(dummy, model_id="m").logical


def _long_rope_model(directory: Path) -> str:
    path = make(directory)
    config = json.loads((path / "config.json").read_text())
    factors = [1.0] * (config["hidden_size"] // config["num_attention_heads"] // 2)
    config["rope_scaling"] = {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
        "original_max_position_embeddings": 2048,
    }  # fmt: skip
    config["original_max_position_embeddings"] = 2048
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_long_rope_differs_by_the_longest_sequence(model: str, tmp_path: Path) -> None:
    """vLLM turns keys by other factors where ``--max-model-len`` is above the original length, and such
    servers shared. On one side of it, and for other models, the length does not matter."""
    long_rope = _long_rope_model(tmp_path / "long")
    lengths = (1024, 2048, 2049, 4096)
    found = [namespace(vllm_config(long_rope, max_model_len=n)) for n in lengths]
    assert [one.fields["rope"] for one in found] == ["short", "short", "long", "long"]
    assert found[0] == found[1] != found[2] == found[3]
    others = [namespace(vllm_config(model, max_model_len=n)) for n in lengths]
    assert others.count(others[0]) == len(lengths)
    assert "rope" not in others[0].fields


def test_other_weights(model: str, tmp_path: Path) -> None:
    """The same configuration over other weights is another model."""
    assert (
        namespace(vllm_config(str(make(tmp_path, seed=1)))).logical != namespace(vllm_config(model)).logical
    )


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("cache_config", "calculate_kv_scales", True, "--calculate-kv-scales"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        (
            "parallel_config",
            "pipeline_parallel_size",
            3,
            r"--pipeline-parallel-size 3: the stages hold \[1, 2, 1\]",
        ),
    ],
)
def test_unsafe_configurations_are_refused(
    model: str, section: str, name: str, value: Any, words: str
) -> None:
    """What would put different bytes under one name is refused, by the flag's name."""
    config = vllm_config(model)
    object.__setattr__(getattr(config, section), name, value)
    with pytest.raises(NamespaceError, match=words):
        namespace(config)


def test_parts_of_pipeline_stages() -> None:
    """Each rank of each stage has its own part of a block; with MLA each stage has one."""
    ranks = [rank_of(i, 2, 8, shared=False, stage=s, stages=2) for s in range(2) for i in range(2)]
    assert [(r.index, r.part, r.part_count) for r in ranks] == [(i, i, 4) for i in range(4)]
    shared = [rank_of(i, 2, 1, shared=True, stage=s, stages=2) for s in range(2) for i in range(2)]
    assert [(r.part, r.part_count, r.saves) for r in shared] == [
        (0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False),
    ]  # fmt: skip


def test_extras_of_a_real_request(tmp_path: Path) -> None:
    """An adapter, an image and a salt in this version's own classes give the bytes that all versions give."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    image = MultiModalFeatureSpec(
        data=None, modality="image", identifier="any:cafe", mm_hash="cafe",
        mm_position=PlaceholderRange(offset=10, length=20),
    )  # fmt: skip
    asked = make_request(
        "r", list(range(64)), cache_salt="tenant-a", mm_features=[image],
        lora_request=LoRARequest(lora_name="any", lora_int_id=1, lora_path=str(tmp_path)),
    )  # fmt: skip
    extras = RequestExtras(asked, 16, AdapterDigests().of)
    assert [hashlib.sha256(extras.of(block)).hexdigest()[:16] for block in range(4)] == EXTRAS


def full(heads: int = 2, **more: Any) -> Any:
    return kv.FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16, **more
    )


def window() -> Any:
    return kv.SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=64
    )


def state() -> Any:
    return kv.MambaSpec(block_size=BLOCK, shapes=((16, 64),), dtypes=(torch.float32,))


def groups(*specs: Any) -> Any:
    listed = [kv.KVCacheGroupSpec([f"layers.{i}"], spec) for i, spec in enumerate(specs)]
    return kv.KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=listed)


@pytest.mark.parametrize("able", [False, True])
def test_groups_are_taken_or_refused_by_name(able: bool) -> None:
    """Several groups, and windows, where vLLM can be told of a request whose load failed; never memory that
    is no block of tokens, nor groups whose blocks have different numbers of tokens."""

    def shape(*specs: Any) -> Any:
        return group_shape(groups(*specs), can_fail_requests=able)

    page = 2 * 2 * BLOCK * 32 * 2
    one = shape(full())
    assert (one.part_bytes, one.count, one.windowed) == (page, 1, False)
    if able:
        two = shape(full(), window())
        assert (two.part_bytes, two.count, two.windowed) == (2 * page, 2, True)
        assert two.groups == {"layers.0": 0, "layers.1": 1}
        assert shape(window()).windowed
        assert not two.zeroed
        mixed = dataclasses.replace(full(), dtype=torch.float32)
        assert shape(full(), mixed).zeroed == hasattr(kv.KVCacheConfig, "has_mixed_precision_kv_cache")
        with pytest.raises(GeometryError, match=r"layers.1: KV memory of kind MambaSpec"):
            shape(full(), state())
        with pytest.raises(GeometryError, match=r"blocks of \[\d+, \d+\] tokens.*disable-hybrid"):
            shape(full(), dataclasses.replace(window(), block_size=2 * BLOCK))
    else:
        with pytest.raises(
            GeometryError, match=r"2 KV cache groups \(FullAttentionSpec, SlidingWindowSpec\)"
        ):
            shape(full(), window())
        with pytest.raises(GeometryError, match=r"2 KV cache groups \(FullAttentionSpec, MambaSpec\)"):
            shape(full(), state())
        with pytest.raises(GeometryError, match=r"layers.0: KV memory of kind SlidingWindowSpec"):
            shape(window())
    with pytest.raises(GeometryError, match=r"layers.0: KV memory of kind MambaSpec"):
        shape(state())


def test_log_names_the_difference(model: str, tmp_path: Path) -> None:
    """Of two namespaces in one directory that differ in one thing, the thing is found, with both values."""
    other = namespace(vllm_config(model, dtype="float32"))
    options = {
        "store_pipeline": "Posix",
        "cache_buffer_capacity_gb": 0.02,
        "block_size": 4096,
        "device": "host",
    }
    memory = torch.zeros(4096, dtype=torch.uint8)
    with Store(storage_backends=str(tmp_path), **options, **other.engine_options()) as store:
        store.save([bytes(16)], [[memory.data_ptr()]]).wait()
    assert list(neighbours(other, [str(tmp_path)])) == []
    mine = dataclasses.replace(other, fields={**other.fields, "dtype": "bfloat16"})
    [(path, fields)] = neighbours(mine, [str(tmp_path)])
    assert Path(path).parent == tmp_path
    assert fields == {"dtype": ("bfloat16", "float32")}


class _Sixteens:
    base = 16


def _backend(name: str, sizes: list[Any], layout: str | None = None) -> Any:
    return type(name, (), {
        "get_name": staticmethod(lambda: name),
        "get_supported_kernel_block_sizes": staticmethod(lambda: sizes),
        "get_required_kv_cache_layout": classmethod(lambda _: layout),
        "supported_kv_cache_layouts": classmethod(
            lambda _: [SimpleNamespace(name="BLHNC" if layout == "HND" else "LBNHC")]
        ),
    })  # fmt: skip


def test_layout_that_the_engine_resolved_counts(model: str) -> None:
    """vLLM 0.32 resolves one layout for a server, and no longer has the function that named it before: on
    CUDA the connector did not start."""
    config = vllm_config(model)
    if hasattr(config.cache_config, "kv_cache_layout"):
        for name, rows in (("LBNHC", "NHD"), ("BLHNC", "HND"), ("LBHNC", "HND"), ("BLNHC", "NHD")):
            config.cache_config.kv_cache_layout = name
            assert cuda_attention(config, BLOCK).layout == rows


@pytest.mark.parametrize(("backend", "tokens", "expected"), [
    (_backend("FLASH_ATTN", [_Sixteens]), 128, ("FLASH_ATTN", "NHD", 0)),
    (_backend("FLASHINFER", [16, 32, 64]), 128, ("FLASHINFER", "NHD", 64)),
    (_backend("FLASHINFER", [16, 32, 64]), 32, ("FLASHINFER", "NHD", 0)),
    (_backend("FLASHINFER", [16, 32, 64], "HND"), 128, ("FLASHINFER", "HND", 64)),
    (_backend("FLASHINFER", [16, 32, 64, 128], "HND"), 128, ("FLASHINFER", "HND", 0)),
])  # fmt: skip
def test_attention_is_asked_of_vllm(
    monkeypatch: pytest.MonkeyPatch, model: str, backend: Any, tokens: int, expected: tuple[str, str, int]
) -> None:
    """What vLLM will choose is known in processes that have no layers and no current configuration."""
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import utils

    def choose(*, head_size: int, dtype: Any, kv_cache_dtype: str, use_mla: bool) -> Any:
        assert get_current_vllm_config() is config
        return backend

    config = vllm_config(model)
    monkeypatch.setattr(selector, "get_attn_backend", choose)
    if hasattr(utils, "get_kv_cache_layout"):
        utils.get_kv_cache_layout.cache_clear()
    found = cuda_attention(config, tokens)
    assert (found.backend, found.layout, found.kernel_tokens) == expected


def test_a_server_starts_where_vllm_does_not_say_what_it_chooses(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    from vllm.v1.attention import selector

    monkeypatch.delattr(selector, "get_attn_backend")
    assert cuda_attention(vllm_config(model), BLOCK).backend == ""


def test_layers_on_another_backend_are_refused(model: str) -> None:
    """Blocks would be saved under the name of a byte order that they do not have."""

    class Layer:
        def get_attn_backend(self) -> Any:
            return _backend("FLEX_ATTENTION", [])

    config = vllm_config(model)
    config.compilation_config.static_forward_context["layer"] = Layer()
    platform = Platform("cuda", "FLASH_ATTN", (0, 26), "", "gqa", "bfloat16", "NHD")
    found = namespace(config)
    private = dataclasses.replace(found, order="private-cuda")
    refuse_other_backends(config, private, platform, ["layer"])  # shared with nobody
    named = dataclasses.replace(found, order="nhd-packed")
    with pytest.raises(NamespaceError, match="--attention-backend FLEX_ATTENTION"):
        refuse_other_backends(config, named, platform, ["layer", "no layer"])
    other = dataclasses.replace(platform, device="cpu")
    refuse_other_backends(config, named, other, ["layer"])
