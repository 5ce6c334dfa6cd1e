"""Stores of servers with the same content in another byte order.

Owns which orders are read, and the lookup over them. A source is a small number: 0 is this server's own
order, ``i`` the ``i``-th that it can convert. Converts and loads nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ucm.store import BlockIds

OWN: Final = 0
MISSING: Final = 255

RESCAN_S: Final = 5.0
"""How often directories are searched for orders that were not there before."""

logger = logging.getLogger("vllm.ucm.siblings")


class Siblings:
    """Lookup stores of the readable orders, opened when their folders appear.

    The first search is over before anything is looked up. Later ones have a thread of their own: a directory
    that does not answer, or a store that takes long to open, must not keep whoever looks up.
    """

    def __init__(
        self, orders: Sequence[str], directories: Sequence[str], open_store: Callable[[str], Any]
    ) -> None:
        self._orders = orders
        self._directories = [Path(directory) for directory in directories]
        self._open = open_store
        self._lock = threading.Lock()
        """Of what both threads change."""
        self._stores: dict[int, Any] = {}
        self._closed = False
        self._searching = False
        self._search()

    def _search(self) -> None:
        try:
            for source, order in enumerate(self._orders, 1):
                if source not in self._stores and not self._closed and self._exists(order):
                    self._add(source, order)
        finally:
            self._searched = time.monotonic()
            self._searching = False

    def _add(self, source: int, order: str) -> None:
        try:
            store = self._open(order)
        except Exception as error:  # of one order, which does not keep the others from being looked for
            logger.warning("blocks saved in byte order %s cannot be looked up: %s", order, error)
            return
        with self._lock:
            closed = self._closed
            if not closed:
                self._stores[source] = store
        if closed:
            store.close()
        else:
            logger.info("blocks saved in byte order %s are read too", order)

    def _search_aside(self) -> None:
        if self._searching or len(self._stores) == len(self._orders):
            return
        if time.monotonic() - self._searched >= RESCAN_S:
            self._searching = True
            try:
                threading.Thread(target=self._search, name="ucm-siblings", daemon=True).start()
            except RuntimeError as error:  # the host has no thread left: the next lookup tries again
                self._searching = False
                logger.warning("blocks in other byte orders are not looked for: %s", error)

    def _exists(self, order: str) -> bool:
        try:
            return any(next(d.glob(f"ucm*-{order}"), None) for d in self._directories)
        except OSError:
            return False

    def prefix(self, own: Any, ids: BlockIds) -> tuple[int, bytes]:
        """How many blocks from the first are in any order, and where each is."""
        self._search_aside()
        hits = int(own.lookup_prefix(ids))
        with self._lock:
            stores = dict(self._stores)
        if not stores or hits == len(ids):
            return hits, b""
        sources: npt.NDArray[np.uint8] = np.where(own.lookup(ids), OWN, MISSING).astype(np.uint8)
        for source, store in stores.items():
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
        with self._lock:
            self._closed = True
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()
