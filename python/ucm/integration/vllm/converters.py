"""A worker's stores for blocks in other byte orders, opened when the first such block is loaded.

Owns the stores and their batches. Which orders there are, and their numbers, ``siblings.py`` says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ucm.integration.vllm.batches import Batches
from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.convert import ConversionError, PageShape, convert, readable
from ucm.integration.vllm.geometry import Layout
from ucm.integration.vllm.namespace import Namespace
from ucm.integration.vllm.rank import Rank
from ucm.integration.vllm.stores import open_converting


class Converters:
    """Stores by source."""

    def __init__(
        self, config: ConnectorConfig, namespace: Namespace, layout: Layout, rank: Rank, device: Any,
        page: PageShape | None, *, columns: int = 1,
    ) -> None:  # fmt: skip
        self._config = config
        self._namespace = namespace
        self._layout = layout
        self._rank = rank
        self._device = device
        self._page = page
        self._columns = columns
        """KV cache groups; of several each is loaded by itself, and so layer by layer."""
        self._orders = readable(namespace.order)
        self._open: dict[int, tuple[Any, Batches]] = {}

    def of(self, source: int) -> tuple[Any, Batches]:
        """The store of a source, and what makes its entries."""
        if source not in self._open:
            if self._page is None or not 0 < source <= len(self._orders):
                raise ConversionError(f"source {source} cannot be read by this worker")
            saved = self._orders[source - 1]
            converted = convert(self._layout, self._namespace.order, saved, self._page)
            namespace = dataclasses.replace(self._namespace, order=saved)
            batches = Batches(converted.layout, layerwise=self._columns > 1, columns=self._columns)
            store = open_converting(
                self._config, namespace, converted, self._rank, self._device, layerwise=batches.layerwise
            )
            self._open[source] = store, batches
        return self._open[source]

    def close(self) -> None:
        """Closes all stores."""
        for store, _ in self._open.values():
            store.close()
        self._open.clear()
