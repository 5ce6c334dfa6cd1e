"""The chained block ids of one request, computed once and extended as tokens are confirmed.

Owns the ids; knows which tokens they cover; looks nothing up.
"""

from __future__ import annotations

from array import array
from typing import Any, Final, Protocol

import numpy as np

from ucm.integration.vllm.hashing import RequestExtras
from ucm.store import BlockIds

ID_BYTES = 16

TOKEN: Final = "I"
"""The array module's name of what numpy calls uintc: 32 bits wherever vLLM runs. It makes an array of a list
in an eighth of the time that numpy takes."""


class Hasher(Protocol):
    """What hashes: ``ucm.Store``, or a stand-in in tests."""

    def hash_tokens(
        self, tokens: Any, block_tokens: int, parent: bytes | None = None, extra: bytes = b""
    ) -> BlockIds: ...

    def hash_blocks(
        self, tokens: Any, block_tokens: int, extras: Any, parent: bytes | None = None
    ) -> BlockIds: ...


class BlockChain:
    """Ids of the full blocks of a request's confirmed tokens."""

    def __init__(self, hasher: Hasher, extras: RequestExtras, block_tokens: int) -> None:
        self._hasher = hasher
        self._extras = extras
        self._block_tokens = block_tokens
        self._ids = np.zeros((0, ID_BYTES), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ids)

    def upto(self, request: Any, blocks: int) -> BlockIds:
        """The ids of the first ``blocks`` blocks; hashes only what is new."""
        have = len(self._ids)
        if blocks > have:
            size = self._block_tokens
            confirmed = array(TOKEN, request.all_token_ids[have * size : blocks * size])
            if len(confirmed) < (blocks - have) * size:
                raise ValueError(
                    f"request {request.request_id}: {blocks} blocks of {size} tokens asked, "
                    f"{request.num_tokens} tokens confirmed"
                )
            tokens = np.frombuffer(confirmed, dtype=np.uintc)
            parent = self._ids[-1].tobytes() if have else None
            if self._extras.plain:
                new = self._hasher.hash_tokens(tokens, size, parent)
            else:
                extras = [self._extras.of(block) for block in range(have, blocks)]
                new = self._hasher.hash_blocks(tokens, size, extras, parent)
            self._ids = np.concatenate([self._ids, new]) if have else new
        return self._ids[:blocks]
