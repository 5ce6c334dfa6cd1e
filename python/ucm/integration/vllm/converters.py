"""A worker's stores for blocks in other byte orders, opened when the first such block is loaded.

Owns the stores and their address tables. Which orders there are, and their numbers, ``siblings.py`` says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.convert import ConversionError, PageShape, convert, readable
from ucm.integration.vllm.geometry import AddressTable, Layout
from ucm.integration.vllm.namespace import Namespace
from ucm.integration.vllm.rank import Rank
from ucm.integration.vllm.stores import open_converting


class Converters:
    """Stores by source."""

    def __init__(
        self, config: ConnectorConfig, namespace: Namespace, layout: Layout, rank: Rank, device: Any,
        page: PageShape | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._namespace = namespace
        self._layout = layout
        self._rank = rank
        self._device = device
        self._page = page
        self._orders = readable(namespace.order)
        self._open: dict[int, tuple[Any, AddressTable]] = {}

    def of(self, source: int) -> tuple[Any, AddressTable]:
        """The store and the address table of a source."""
        if source not in self._open:
            if self._page is None or not 0 < source <= len(self._orders):
                raise ConversionError(f"source {source} cannot be read by this worker")
            saved = self._orders[source - 1]
            converted = convert(self._layout, self._namespace.order, saved, self._page)
            namespace = dataclasses.replace(self._namespace, order=saved)
            store = open_converting(self._config, namespace, converted, self._rank, self._device)
            slices = (one for layer in converted.layout.layers for one in layer.slices)
            self._open[source] = store, AddressTable(slices, self._layout.block_count)
        return self._open[source]

    def close(self) -> None:
        """Closes all stores."""
        for store, _ in self._open.values():
            store.close()
        self._open.clear()
