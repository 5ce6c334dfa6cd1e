"""What besides tokens decides the KV of a block, in one canonical form.

Owns the encoding of LoRA content, multimodal items, cache salt and prompt embeddings into the extra
bytes of a block. The encoding depends on no vLLM version and on no hash seed; two servers that
give a block the same extras and the same tokens give it the same id. Knows no store.

Encoding of one block: a sequence of records, each a tag byte, a little-endian u32 length, and that
many bytes; records stand in the order of their tags. No record: no bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

TAG_LORA: Final = 1
"""32 bytes: digest of the adapter's content."""
TAG_MULTIMODAL: Final = 2
"""i64 offset of the item relative to the block, u32 length, then the item's hash."""
TAG_SALT: Final = 3
"""The request's cache salt; only in the first block, the chain carries it on."""
TAG_EMBEDS: Final = 4
"""32 bytes: digest of the embeddings that stand in for this block's tokens."""

TAG_EPOCH: Final = 5
"""Which weights, where they were changed while the server ran; only in the first block."""

FILE_CHUNK_BYTES: Final = 1 << 20

ADAPTER_FILES: Final = (".safetensors", ".bin", ".pt", ".json")

_Files: TypeAlias = tuple[tuple[str, int, int], ...]
"""Of each file its path, the time of its last change in nanoseconds, and its size in bytes."""

logger = logging.getLogger("vllm.ucm.hashing")


def record(tag: int, content: bytes) -> bytes:
    """One record of the encoding."""
    return struct.pack("<BI", tag, len(content)) + content


class AdapterDigests:
    """Digests of LoRA adapters, read once for each state of their files."""

    def __init__(self) -> None:
        self._known: dict[_Files, bytes] = {}
        self._loaded: dict[tuple[int, str], _Files | None] = {}
        """Of each adapter of vLLM, by number and path, the files that it loaded. None: no telling which."""

    def of(self, lora: Any) -> bytes:
        """32 bytes that stand for the adapter's content.

        vLLM keeps an adapter that it has loaded, whatever becomes of its files, and reads them again when it
        had to evict it, or where the request says ``load_inplace``. Which of the two it has is not known
        here: once the files have changed otherwise, each request gets bytes of its own and shares nothing.
        """
        key = (int(getattr(lora, "lora_int_id", 0)), str(lora.lora_path))
        path = self._resolve(key[1])
        if path is None and key not in self._loaded:
            logger.warning(
                "LoRA %s: its files at %s cannot be read here, so its name and path stand for its "
                "content in block ids", lora.lora_name, lora.lora_path,
            )  # fmt: skip
            text = f"unread\0{lora.lora_name}\0{lora.lora_path}"
            return hashlib.sha256(text.encode()).digest()
        if path is not None:
            self._observe(key, lora, path)
        loaded = self._loaded[key]
        return os.urandom(hashlib.sha256().digest_size) if loaded is None else self._known[loaded]

    def _observe(self, key: tuple[int, str], lora: Any, path: str) -> None:
        names = sorted(
            entry.path for entry in os.scandir(path)
            if entry.is_file() and entry.name.endswith(ADAPTER_FILES)
        )  # fmt: skip
        files = tuple((name, os.stat(name).st_mtime_ns, os.stat(name).st_size) for name in names)
        if key not in self._loaded or getattr(lora, "load_inplace", False):
            if files not in self._known:
                self._known[files] = self._read(path, names)
            self._loaded[key] = files
        elif self._loaded[key] not in (files, None):
            logger.warning(
                "LoRA %s: its files at %s have changed since it was loaded, so its blocks are not reused any "
                "more; load it in place (load_inplace), or under another name", lora.lora_name, path,
            )  # fmt: skip
            self._loaded[key] = None

    @staticmethod
    def _resolve(path: str) -> str | None:
        if os.path.isdir(path):
            return path
        try:
            from vllm.lora.utils import get_adapter_absolute_path

            absolute = get_adapter_absolute_path(path)
        except Exception:  # a hub that cannot be reached must not fail the request
            return None
        return absolute if os.path.isdir(absolute) else None

    @staticmethod
    def _read(path: str, files: list[str]) -> bytes:
        digest = hashlib.sha256(b"lora\0")
        for name in files:
            digest.update(record(0, os.path.relpath(name, path).encode()))
            digest.update(struct.pack("<Q", os.path.getsize(name)))
            with open(name, "rb") as file:
                while chunk := file.read(FILE_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.digest()


def embeds_digest(rows: Any) -> bytes:
    """Digest of some rows of a prompt-embedding tensor, by dtype, shape and bytes."""
    import torch

    rows = rows.detach().cpu().contiguous()
    head = f"{str(rows.dtype).removeprefix('torch.')}{tuple(rows.shape)}".encode()
    raw = rows.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(record(0, head) + raw).digest()


class RequestExtras:
    """The extra bytes of each block of one request."""

    def __init__(
        self, request: Any, block_tokens: int, lora_digest: Callable[[Any], bytes], epoch: bytes = b""
    ) -> None:
        self._block_tokens = block_tokens
        lora = getattr(request, "lora_request", None)
        self._lora = record(TAG_LORA, lora_digest(lora)) if lora is not None else b""
        salt = getattr(request, "cache_salt", None)
        self._epoch = record(TAG_EPOCH, epoch) if epoch else b""
        self._salt = record(TAG_SALT, str(salt).encode()) if salt else b""
        self._embeds = getattr(request, "prompt_embeds", None)
        self._items = sorted(
            (int(f.mm_position.offset), int(f.mm_position.length), _item_hash(f))
            for f in getattr(request, "mm_features", None) or ()
        )
        self.plain = not (self._lora or self._salt or self._items or self._epoch or self._embeds is not None)
        """Whether every block's extra bytes are empty."""

    def _multimodal(self, start: int, end: int) -> Iterator[bytes]:
        for offset, length, item in self._items:
            if offset < end and offset + length > start:
                yield record(TAG_MULTIMODAL, struct.pack("<qI", offset - start, length) + item)

    def of(self, block: int) -> bytes:
        """The extra bytes of block number ``block``."""
        if self.plain:
            return b""
        start = block * self._block_tokens
        end = start + self._block_tokens
        parts = [self._lora, *self._multimodal(start, end)]
        if block == 0:
            parts.append(self._salt)
        if self._embeds is not None and start < len(self._embeds):
            parts.append(record(TAG_EMBEDS, embeds_digest(self._embeds[start:end])))
        if block == 0:
            parts.append(self._epoch)
        return b"".join(parts)


def _item_hash(feature: Any) -> bytes:
    # identifier carries a LoRA prefix in some versions; mm_hash, where it is known, never does.
    return str(getattr(feature, "mm_hash", None) or feature.identifier).encode()
