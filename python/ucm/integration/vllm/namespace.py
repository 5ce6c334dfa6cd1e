"""Which servers share KV: the fields that decide a block's content, and their fingerprint.

Owns the list of fields, their canonical form, and the comparison that names a difference. Knows no
store; ``platform.py`` finds out what runs here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

FORMAT_VERSION: Final = 1
"""Major version of the canonical form; servers of different versions do not share."""

VOLATILE_CONFIG_KEYS: Final = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"}
)
"""Keys of config.json that say nothing about what the weights compute."""

SAFETENSORS: Final = ".safetensors"
OTHER_WEIGHTS: Final = (".bin", ".pt", ".gguf")
"""Suffixes of weights where a directory has no safetensors; beside those vLLM does not read them."""

INDEX: Final = ".index.json"
SAMPLES_PER_FILE: Final = 16
SAMPLE_BYTES: Final = 4096
TENSORS_MAX: Final = 2048
"""Tensors of a checkpoint that are sampled, evenly chosen where it has more: a model of 70e9 weights has some
700, one of many experts some ten thousand, and each costs up to three reads."""
SAMPLES_PER_TENSOR: Final = 3
TENSOR_SAMPLE_BYTES: Final = 256
"""Read at the start, in the middle and at the end of a tensor; of a file more, and more of it."""
HEADER_BYTES_MAX: Final = 100_000_000
"""The longest header that safetensors itself takes."""


class NamespaceError(ValueError):
    """The configuration cannot share or reuse KV safely."""


@dataclass(frozen=True)
class Namespace:
    """The logical namespace: ``fields`` decide the content of blocks."""

    fields: Mapping[str, str]
    order: str

    @property
    def text(self) -> str:
        """The fields in canonical form."""
        return canonical_json(dict(self.fields)).decode()

    @functools.cached_property
    def logical(self) -> str:
        """The fingerprint of the fields, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    def describe(self) -> dict[str, str]:
        """All fields, the fingerprint and the order, as labels."""
        return {"logical": self.logical, "order": self.order, **self.fields}

    def engine_options(self) -> dict[str, Any]:
        """The options that make the engine's namespace the same."""
        return {
            "model_id": self.fields["model"],
            "dtype": self.fields["kv_dtype"],
            "block_tokens": int(self.fields["block_size"]),
            # In words, not as a fingerprint: the engine writes it beside the blocks, see neighbours().
            "namespace_extra": self.text,
            "order": self.order,
        }


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The names of the fields in which two namespaces differ."""
    keys = sorted((set(mine) | set(theirs)) - {"logical"})
    return [key for key in keys if mine.get(key, "") != theirs.get(key, "")]


DESCRIPTION: Final = "ucm*/namespace.json"
"""Where the engine describes each namespace of a directory."""

NEIGHBOURS_MAX: Final = 64
"""Namespaces of a directory that are compared with a server's own."""


def neighbours(
    mine: Namespace, directories: Iterable[str]
) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Other namespaces in these directories: the path, and for each differing field this server's value
    and the other's. What cannot be read is left out: it is only told of."""
    own = {"order": mine.order, **mine.fields}
    for directory in directories:
        for path in sorted(Path(directory).glob(DESCRIPTION))[:NEIGHBOURS_MAX]:
            try:
                described = json.loads(path.read_text(encoding="utf-8"))
                other = {"order": str(described["order"]), **json.loads(described["namespace_extra"])}
            except (OSError, ValueError, KeyError, TypeError):
                continue
            fields = {name: (own.get(name, ""), other.get(name, "")) for name in differences(own, other)}
            if fields:
                yield str(path.parent), fields


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def config_digest(directory: str) -> str | None:
    """Digest of the model's own config.json, without its volatile keys."""
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    return _digest(canonical_json({k: v for k, v in data.items() if k not in VOLATILE_CONFIG_KEYS}))


def weights_digest(directory: str) -> str:
    """Digest of the weight index, the files' sizes, and samples of their content.

    Of safetensors every tensor is sampled, up to :data:`TENSORS_MAX`, so that weights differ of which only
    some were trained further; the names of the directory and of the host do not matter.
    """
    parts: list[bytes] = []
    listed = sorted(os.listdir(directory))
    tensors: list[tuple[str, int, int]] = []
    safetensors = [n for n in listed if n.endswith(SAFETENSORS)]
    for name in (n for n in listed if n.endswith(INDEX)):
        if not safetensors or not name.endswith(tuple(suffix + INDEX for suffix in OTHER_WEIGHTS)):
            with open(os.path.join(directory, name), "rb") as file:
                parts.append(file.read())
    for name in safetensors or (n for n in listed if n.endswith(OTHER_WEIGHTS)):
        path = os.path.join(directory, name)
        size = os.path.getsize(path)
        parts += [name.encode(), size.to_bytes(8, "little")]
        with open(path, "rb", buffering=0) as whole:
            parts += _samples(whole, 0, size, SAMPLE_BYTES, SAMPLES_PER_FILE)
        if name.endswith(SAFETENSORS):
            tensors += [(path, start, length) for start, length in _tensors(path, size)]
    every = max(1, math.ceil(len(tensors) / TENSORS_MAX))
    for path, chosen in itertools.groupby(tensors[::every], key=lambda one: one[0]):
        with open(path, "rb", buffering=0) as shard:
            for _, start, length in chosen:
                parts += _samples(shard, start, length, TENSOR_SAMPLE_BYTES, SAMPLES_PER_TENSOR)
    return _digest(*parts)


def _tensors(path: str, size: int) -> Iterator[tuple[int, int]]:
    """Where the tensors of a safetensors file lie: offset and length in bytes, in their order in the file.
    None where it is no such file."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(HEADER_BYTES_MAX, size):
            return
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            spans = sorted(
                (int(one["data_offsets"][0]), int(one["data_offsets"][1])) for one in header.values()
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            return
    first = 8 + header_bytes
    yield from ((first + a, b - a) for a, b in spans if 0 <= a <= b <= size - first)


def _samples(file: IO[bytes], start: int, length: int, size: int, count: int) -> Iterator[bytes]:
    """``count`` pieces of ``size`` bytes, evenly from the first to the last; all in one where it is short."""
    if length <= size * count:
        count, size = 1, length
    for i in range(count):
        file.seek(start + (length - size) * i // max(1, count - 1))
        yield file.read(size)


def model_fingerprint(directory: str | None, fallback: str, effective: Mapping[str, Any]) -> str:
    """Stands for the model's content: config, weights, and what the command line changed.

    Where the files cannot be read, the name that was given and the effective config stand in.
    """
    changed = canonical_json(effective)
    if directory is not None and os.path.isdir(directory):
        config = config_digest(directory)
        if config is not None:
            return _digest(config.encode(), weights_digest(directory).encode(), changed)
    return _digest(b"unread", fallback.encode(), changed)
