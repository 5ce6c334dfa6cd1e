"""The promise that a prefill server gives and a decode server waits for.

Owns the form of ``kv_transfer_params["ucm"]`` and its checks. Announced ids are only ever compared
with ids that this server computed itself; nothing is loaded because a message says so.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ucm.integration.vllm.convert import readable
from ucm.integration.vllm.namespace import Namespace, differences
from ucm.store import ANY_PROMISE

KEY: Final = "ucm"
VERSION: Final = 1
NUMBER_BITS: Final = 64


def new_number() -> int:
    """A number for the promise of one request.

    Blocks that a writer gave up under an earlier promise may come under this one. Random numbers tell the two
    apart where several writers promise, restart, and have no common clock.
    """
    return secrets.randbits(NUMBER_BITS) or 1


@dataclass(frozen=True)
class Promise:
    """What a prefill server announced for a prompt."""

    namespace: Mapping[str, str]
    tokens: int
    blocks: int
    last_block: str
    writer: str
    number: int
    """The one under which its writer gives blocks up; ``ANY_PROMISE``: it told none."""


def announce(namespace: Namespace, block_tokens: int, ids: Any, writer: str, number: int) -> dict[str, Any]:
    """The announcement for the blocks with these ids."""
    return {
        "version": VERSION,
        "namespace": namespace.describe(),
        "tokens": len(ids) * block_tokens,
        "blocks": len(ids),
        "last_block_id": ids[-1].tobytes().hex() if len(ids) else "",
        "writer": writer,
        "promise": f"{number:x}",
    }


def _one(entry: Any) -> Promise | None:
    if not isinstance(entry, Mapping) or entry.get("version") != VERSION:
        return None
    namespace = entry.get("namespace")
    if not isinstance(namespace, Mapping):
        return None
    try:
        promise = Promise(
            {str(k): str(v) for k, v in namespace.items()},
            int(entry["tokens"]),
            int(entry["blocks"]),
            str(entry["last_block_id"]),
            str(entry.get("writer", "")),
            int(str(entry.get("promise", f"{ANY_PROMISE:x}")), 16),
        )
    except (KeyError, TypeError, ValueError):
        return None
    valid = promise.blocks > 0 and promise.tokens > 0 and 0 <= promise.number < 1 << NUMBER_BITS
    return promise if valid else None


def read(params: Any) -> list[Promise]:
    """The promises in a request's ``kv_transfer_params``; what cannot be read is left out.

    A router that split a request with several prompts sends one for each under ``promises``, since
    vLLM gives all of them the same parameters.
    """
    entry = params.get(KEY) if isinstance(params, Mapping) else None
    if not isinstance(entry, Mapping):
        return []
    listed = entry.get("promises")
    entries = listed if isinstance(listed, list) else [entry]
    return [promise for promise in map(_one, entries) if promise is not None]


class Wait:
    """A request's wait for its promise."""

    def __init__(self, promises: list[Promise], wait_ms: int) -> None:
        self.promises = promises
        self.started = time.monotonic()
        self.deadline = self.started + wait_ms / 1000
        self.waited = False
        self.kept: list[Promise] | None = None
        """Promises of this prompt that are not broken; None: not yet compared."""

    @property
    def blocks(self) -> int:
        """How many blocks of this prompt are promised."""
        return max((promise.blocks for promise in self.kept or ()), default=0)

    def compare(self, mine: Namespace, ids: Any) -> list[str]:
        """Finds the promise for these ids; gives in what it differs, if none can be waited for.

        Neither a promise for another prompt of the same request is a difference, nor a byte order
        that can be converted.
        """
        self.kept = []
        for promise in self.promises:
            fields = differences(mine.describe(), promise.namespace)
            if promise.namespace.get("order", "") in readable(mine.order):
                fields = [field for field in fields if field != "order"]
            if fields:
                self.kept = []
                return fields
            last = promise.blocks - 1
            if last < len(ids) and ids[last].tobytes().hex() == promise.last_block:
                self.kept.append(promise)
        return ["tokens"] if not self.kept and len(self.promises) == 1 else []
