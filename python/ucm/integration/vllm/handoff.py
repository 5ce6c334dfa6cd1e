"""The promise that a prefill server gives and a decode server waits for.

Owns the form of ``kv_transfer_params["ucm"]`` and its checks. Announced ids are only ever compared
with ids that this server computed itself; nothing is loaded because a message says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ucm.integration.vllm.namespace import Namespace, differences

KEY: Final = "ucm"
VERSION: Final = 1


@dataclass(frozen=True)
class Promise:
    """What a prefill server announced for a prompt."""

    namespace: Mapping[str, str]
    tokens: int
    blocks: int
    last_block: str
    writer: str


def announce(namespace: Namespace, block_tokens: int, ids: Any, writer: str) -> dict[str, Any]:
    """The announcement for the blocks with these ids."""
    return {
        "version": VERSION,
        "namespace": namespace.describe(),
        "tokens": len(ids) * block_tokens,
        "blocks": len(ids),
        "last_block_id": ids[-1].tobytes().hex() if len(ids) else "",
        "writer": writer,
    }


def read(params: Any) -> Promise | None:
    """The promise in a request's ``kv_transfer_params``; None if there is none that can be read."""
    entry = params.get(KEY) if isinstance(params, Mapping) else None
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
        )
    except (KeyError, TypeError, ValueError):
        return None
    return promise if promise.blocks > 0 and promise.tokens > 0 else None


class Wait:
    """A request's wait for its promise."""

    def __init__(self, promise: Promise, wait_ms: int) -> None:
        self.promise = promise
        self.started = time.monotonic()
        self.deadline = self.started + wait_ms / 1000
        self.waited = False

    def mismatches(self, mine: Namespace, ids: Any) -> list[str]:
        """In what the announcement differs from what this server computed; empty if in nothing.

        A different byte order alone is no mismatch of content, but blocks in it are not found here.
        """
        fields = differences(mine.describe(), self.promise.namespace)
        if fields:
            return fields
        last = self.promise.blocks - 1
        if last < len(ids) and ids[last].tobytes().hex() != self.promise.last_block:
            return ["tokens"]
        return []
