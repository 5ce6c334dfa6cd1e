"""The connector's configuration, namespaces, ranks and byte orders, without vLLM."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ucm.integration.vllm.config import ConfigError, Handoff, load
from ucm.integration.vllm.geometry import Layer, Layout, Slice
from ucm.integration.vllm.namespace import Namespace, differences, model_fingerprint
from ucm.integration.vllm.order import CPU_VEC_PACKED, CPU_VEC_SPLIT, Platform, order_name
from ucm.integration.vllm.rank import rank_of
from ucm.integration.vllm.stores import open_transfer

EXAMPLE = Path(__file__).parents[2] / "examples" / "ucm_config_example.yaml"


def test_example_is_read() -> None:
    """The example that ships is valid, for the connector and for the engine."""
    from ucm.store import Options

    config = load({"UCM_CONFIG_FILE": str(EXAMPLE)})
    assert config.enable_event_sync
    assert not config.use_layerwise
    assert config.handoff is Handoff.PROMISE
    Options(config.text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("use_layerwise: true", "ucm_connectors: missing"),
        ("ucm_connectors: []", "ucm_connector_config"),
        ("ucm_connectors: [{ucm_connector_config: {}}]\nhandoff: never", "promise, blocking"),
        ("ucm_connectors: [{ucm_connector_config: {}}]\nuse_layerwise: 3", "true or false"),
        ("ucm_connectors: [{ucm_connector_config: {}}]\nhit_ratio: 2", "0 to 1"),
        ("[", "not YAML"),
        ("just text", "no mapping"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    """A wrong file is refused with its name, the key and what is allowed."""
    path = tmp_path / "ucm.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load({"UCM_CONFIG_FILE": str(path)})
    assert str(path) in str(error.value)


def test_missing_file() -> None:
    """No file named, or none there: the text says which key is meant."""
    with pytest.raises(ConfigError, match="UCM_CONFIG_FILE"):
        load({})
    with pytest.raises(ConfigError, match="/nowhere"):
        load({"UCM_CONFIG_FILE": "/nowhere/x.yaml"})


def test_engine_refuses_unknown_top_keys() -> None:
    """A misspelled key at the top is refused by the engine, with a suggestion."""
    from ucm.errors import InvalidConfig
    from ucm.store import Options

    with pytest.raises(InvalidConfig, match="use_layerwise"):
        Options("ucm_connectors: [{ucm_connector_config: {}}]\nuse_layerwize: true\n")
    Options(
        "ucm_connectors: [{ucm_connector_config: {}}]\nstrict_load_failure: true\nhandoff: promise\n"
        "handoff_wait_ms: 5\nsave_wait_ms: 5\nsave_decode_blocks: true\nhit_ratio: 0.5\n"
    )


def model(path: Path, config: dict[str, Any], weights: bytes) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


def test_model_fingerprint_is_content(tmp_path: Path) -> None:
    """Equal files in two places are one model; one weight, one key or one override makes another."""
    weights = bytes(range(256)) * 4000
    a = model(tmp_path / "a", {"hidden_size": 1, "transformers_version": "4"}, weights)
    b = model(tmp_path / "b", {"hidden_size": 1, "transformers_version": "5"}, weights)
    c = model(tmp_path / "c", {"hidden_size": 1}, weights[:-1] + b"x")
    d = model(tmp_path / "d", {"hidden_size": 2}, weights)
    prints = [model_fingerprint(x, "name", {}) for x in (a, b, c, d)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert model_fingerprint(a, "name", {"rope": 2}) != prints[0]


def safetensors(tensors: list[bytes]) -> bytes:
    ends = [sum(map(len, tensors[: i + 1])) for i in range(len(tensors))]
    header = json.dumps({
        f"t{i}": {"dtype": "U8", "shape": [len(one)], "data_offsets": [end - len(one), end]}
        for i, (one, end) in enumerate(zip(tensors, ends, strict=True))
    } | {"__metadata__": {"format": "pt"}}).encode()  # fmt: skip
    return len(header).to_bytes(8, "little") + header + b"".join(tensors)


def test_one_tensor_that_was_trained_further_is_another_model(tmp_path: Path) -> None:
    """Samples of a file missed most of its tensors, and models that differ in one shared a namespace."""
    tensors = [bytes([i]) * 20_000 for i in range(100)]
    prints = {model_fingerprint(model(tmp_path / "base", {}, safetensors(tensors)), "name", {})}
    for i in range(100):
        trained = [*tensors[:i], b"\xff" * 20_000, *tensors[i + 1 :]]
        prints.add(model_fingerprint(model(tmp_path / str(i), {}, safetensors(trained)), "name", {}))
    assert len(prints) == 101


def test_what_lies_beside_safetensors_is_not_the_model(tmp_path: Path) -> None:
    """A training_args.bin, which vLLM does not read, made another model of a copy. Alone such files count."""
    a, b = (model(tmp_path / name, {}, safetensors([b"w" * 100])) for name in ("a", "b"))
    (Path(b) / "training_args.bin").write_bytes(b"one")
    (Path(b) / "pytorch_model.bin.index.json").write_text("{}")
    assert model_fingerprint(a, "name", {}) == model_fingerprint(b, "name", {})
    for path in (a, b):
        (Path(path) / "model.safetensors").unlink()
    assert model_fingerprint(a, "name", {}) != model_fingerprint(b, "name", {})


@pytest.mark.parametrize("content", [
    b"", b"short", (1 << 62).to_bytes(8, "little") + b"x" * 50, (9).to_bytes(8, "little") + b"no header",
    (2).to_bytes(8, "little") + b"[]", (12).to_bytes(8, "little") + b'{"t": "x"}  ',
    (31).to_bytes(8, "little") + b'{"t":{"data_offsets":[-99, 9]}}', safetensors([b"x" * 9_000])[:4_000],
])  # fmt: skip
def test_damaged_safetensors_still_have_a_fingerprint(tmp_path: Path, content: bytes) -> None:
    """The header is not believed: vLLM says better what is wrong with such a file."""
    assert model_fingerprint(model(tmp_path / "m", {}, content), "name", {})


def test_differences_are_named() -> None:
    """Namespaces that differ in one thing say in which."""
    mine = Namespace({"model": "m", "dtype": "bfloat16"}, "nhd-split")
    theirs = Namespace({"model": "m", "dtype": "float16"}, "nhd-split")
    assert differences(mine.describe(), theirs.describe()) == ["dtype"]
    assert mine.logical != theirs.logical
    assert mine.logical == Namespace(mine.fields, "hnd-split").logical


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "shared", "parts", "savers"),
    [
        (1, 8, False, 1, [0]),
        (4, 8, False, 4, [0, 1, 2, 3]),
        (8, 4, False, 4, [0, 2, 4, 6]),
        (8, 1, True, 1, [0]),
    ],
)
def test_ranks(tensor_parallel: int, heads: int, shared: bool, parts: int, savers: list[int]) -> None:
    """Every part is saved by exactly one rank, and each rank loads the part it holds."""
    ranks = [rank_of(i, tensor_parallel, heads, shared=shared) for i in range(tensor_parallel)]
    assert {rank.part_count for rank in ranks} == {parts}
    assert [rank.index for rank in ranks if rank.saves] == savers
    assert sorted(rank.part for rank in ranks if rank.saves) == list(range(parts))


def platform(**fields: Any) -> Platform:
    defaults: dict[str, Any] = {
        "device": "cpu", "backend": "CPU_ATTN", "vllm": (0, 26), "isa": "vec", "family": "gqa",
        "kv_dtype": "bfloat16", "layout": "",
    }  # fmt: skip
    return Platform(**(defaults | fields))


def test_orders() -> None:
    """What the table lists has a shared name; AMX tiles, MLA and fp8 are private."""
    assert order_name(platform()) == CPU_VEC_PACKED
    assert order_name(platform(vllm=(0, 17))) == CPU_VEC_SPLIT
    for other in ({"isa": "amx"}, {"family": "mla"}, {"kv_dtype": "fp8_e4m3"}):
        assert order_name(platform(**other)).startswith("private-cpu")
    assert order_name(platform(isa="amx")) != order_name(platform(isa="amx", vllm=(0, 32)))


@pytest.mark.parametrize(("keys", "arena_mib"), [("", 64), ("local_rank_size: 2", 128)])
def test_ranks_of_a_host_divide_its_memory(tmp_path: Path, keys: str, arena_mib: int) -> None:
    """share_buffer_enable divides the capacity by the ranks that vLLM's configuration says, or by what the
    file says."""
    text = (
        "ucm_connectors: [{ucm_connector_config: {store_pipeline: Cache|Posix, storage_backends: "
        f"{tmp_path}, cache_buffer_capacity_gb: 0.25, share_buffer_enable: true, {keys} }}}}]"
    )
    path = tmp_path / "ucm.yaml"
    path.write_text(text)
    layout = Layout((Layer("l", (Slice(0, 4096, 4096),)),), 8)
    namespace = Namespace({"model": "m", "kv_dtype": "bfloat16", "block_size": "16"}, CPU_VEC_PACKED)
    rank = dataclasses.replace(rank_of(1, 4, 4, shared=False), local_ranks=4)
    config = load({"UCM_CONFIG_FILE": str(path)})
    device = SimpleNamespace(type="cpu", index=None)
    with open_transfer(config, namespace, layout, rank, device, layerwise=False) as store:
        assert f"ucm_arena_bytes {arena_mib << 20}\n" in store.metrics(), store.metrics()
