"""Stores of servers with the same content in another byte order.

Owns which orders are read, and the lookup over them. A source is a small number: 0 is this server's own
order, ``i`` the ``i``-th that it can convert. Converts and loads nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ucm.errors import UcmError
from ucm.store import BlockIds

OWN: Final = 0
MISSING: Final = 255

RESCAN_S: Final = 5.0
"""How often directories are searched for orders that were not there before."""

logger = logging.getLogger("vllm.ucm.siblings")


class Siblings:
    """Lookup stores of the readable orders, opened when their folders appear."""

    def __init__(
        self, orders: Sequence[str], directories: Sequence[str], open_store: Callable[[str], Any]
    ) -> None:
        self._orders = orders
        self._directories = [Path(directory) for directory in directories]
        self._open = open_store
        self._stores: dict[int, Any] = {}
        self._searched = -RESCAN_S

    def _search(self) -> None:
        now = time.monotonic()
        if now - self._searched < RESCAN_S:
            return
        self._searched = now
        for source, order in enumerate(self._orders, 1):
            if source in self._stores or not self._exists(order):
                continue
            try:
                self._stores[source] = self._open(order)
                logger.info("blocks saved in byte order %s are read too", order)
            except UcmError as error:
                logger.warning("blocks saved in byte order %s cannot be looked up: %s", order, error)

    def _exists(self, order: str) -> bool:
        try:
            return any(next(d.glob(f"ucm*-{order}"), None) for d in self._directories)
        except OSError:
            return False

    def prefix(self, own: Any, ids: BlockIds) -> tuple[int, bytes]:
        """How many blocks from the first are in any order, and where each is."""
        self._search()
        hits = int(own.lookup_prefix(ids))
        if not self._stores or hits == len(ids):
            return hits, b""
        sources: npt.NDArray[np.uint8] = np.where(own.lookup(ids), OWN, MISSING).astype(np.uint8)
        for source, store in self._stores.items():
            missing = np.flatnonzero(sources == MISSING)
            if len(missing):
                found = store.lookup(ids[missing])
                sources[missing[found]] = source
        gaps = np.flatnonzero(sources == MISSING)
        hits = int(gaps[0]) if len(gaps) else len(ids)
        used = sources[:hits]
        return hits, used.tobytes() if used.any() else b""

    def close(self) -> None:
        """Closes all stores."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
