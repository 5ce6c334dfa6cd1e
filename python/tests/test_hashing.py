"""The canonical extra bytes of blocks: equal under every vLLM version, different where content is."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace as Object
from typing import Any

import pytest

from ucm.integration.vllm.hashing import AdapterDigests, RequestExtras, record

BLOCK = 16


def request(**fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "lora_request": None, "cache_salt": None, "prompt_embeds": None, "mm_features": []
    }  # fmt: skip
    return Object(**(defaults | fields))


def item(identifier: str, offset: int, length: int, mm_hash: str | None = None) -> Any:
    return Object(identifier=identifier, mm_hash=mm_hash, mm_position=Object(offset=offset, length=length))


def extras(asked: Any, blocks: int = 4) -> list[bytes]:
    made = RequestExtras(asked, BLOCK, lambda lora: hashlib.sha256(lora.lora_name.encode()).digest())
    return [made.of(block) for block in range(blocks)]


def test_vectors() -> None:
    """The encoding is fixed: these bytes may never change."""
    asked = request(
        cache_salt="tenant-a", mm_features=[item("cafe", 10, 20)], lora_request=Object(lora_name="x")
    )
    assert [hashlib.sha256(one).hexdigest()[:16] for one in extras(asked)] == [
        "cc21b301f1ec525f",
        "0c4a7ee2011a3eb8",
        "e3816c4011e299ed",
        "e3816c4011e299ed",
    ]
    assert extras(request()) == [b""] * 4


def test_only_the_blocks_that_an_item_touches() -> None:
    """An image changes the blocks it lies in; where it lies in them counts."""
    plain, image = extras(request()), extras(request(mm_features=[item("a", 20, 20)]))
    assert [a != b for a, b in zip(plain, image, strict=True)] == [False, True, True, False]
    assert image[1] != extras(request(mm_features=[item("a", 21, 20)]))[1]
    assert image[1] != extras(request(mm_features=[item("b", 20, 20)]))[1]


def test_salt_is_in_the_first_block() -> None:
    """The salt separates tenants from the first block on; the chain carries it to the others."""
    assert extras(request(cache_salt="a"))[0] != extras(request(cache_salt="b"))[0]
    assert extras(request(cache_salt="a"))[1:] == [b""] * 3


def test_prefix_of_identifier_does_not_matter() -> None:
    """Versions that put a LoRA's name before the identifier give the same bytes."""
    assert extras(request(mm_features=[item("lora:h", 0, 4, "h")])) == extras(
        request(mm_features=[item("h", 0, 4, "h")])
    )


def test_records_cannot_be_confused() -> None:
    """No two sequences of records have the same bytes."""
    assert record(1, b"ab") + record(1, b"") != record(1, b"a") + record(1, b"b")


def test_adapter_content_counts_not_its_name(tmp_path: Any) -> None:
    """Two directories with equal files are one adapter; a changed weight is another."""
    digests = AdapterDigests()
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        content = b"weights" if name != "three" else b"Weights"
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)

    def of(name: str) -> bytes:
        return digests.of(Object(lora_name=name, lora_path=str(tmp_path / name)))

    assert of("one") == of("two") != of("three")


def test_files_replaced_under_a_loaded_adapter(tmp_path: Any) -> None:
    """vLLM went on with the old weights, and their KV was stored as that of the new ones. Which of them it
    has is known again when it is told to load them, or loads them under another number."""
    (tmp_path / "adapter_config.json").write_text("{}")
    file = tmp_path / "adapter_model.safetensors"
    digests = AdapterDigests()

    def of(number: int, **more: Any) -> bytes:
        return digests.of(Object(lora_name="x", lora_int_id=number, lora_path=str(tmp_path), **more))

    file.write_bytes(b"old")
    old = of(1)
    assert of(1) == old
    file.write_bytes(b"newer")
    new = AdapterDigests().of(Object(lora_name="x", lora_int_id=1, lora_path=str(tmp_path)))
    unsure = [of(1), of(1)]
    assert len({old, new, *unsure}) == 4
    assert of(2) == new
    assert of(1, load_inplace=True) == new
    assert of(1) == new
    file.write_bytes(b"old")
    assert of(1, load_inplace=True) == old


def test_files_that_are_gone_are_still_loaded(tmp_path: Any) -> None:
    """An adapter whose directory is removed under the running server stays what vLLM has loaded."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    digests, lora = AdapterDigests(), Object(lora_name="x", lora_int_id=1, lora_path=str(path))
    before = digests.of(lora)
    path.rename(tmp_path / "elsewhere")
    assert digests.of(lora) == before


def test_prompt_embeddings() -> None:
    """Embeddings stand for the tokens of their own block only."""
    torch = pytest.importorskip("torch")
    rows = torch.arange(40 * 4, dtype=torch.float32).reshape(40, 4)
    changed = rows.clone()
    changed[20] += 1
    a, b = extras(request(prompt_embeds=rows)), extras(request(prompt_embeds=changed))
    assert [x != y for x, y in zip(a, b, strict=True)] == [False, True, False, False]
    assert a[3] == b""
