"""How blocks become the entries of a batch: whole, or one entry per layer.

Owns the order of entries and the way back from entry statuses to blocks. Submits nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ucm.integration.vllm.geometry import AddressTable, Layout
from ucm.store import BlockIds


@dataclass(frozen=True)
class Entries:
    """Arguments of a save or a load."""

    ids: BlockIds
    shards: npt.NDArray[np.uint32] | None
    addresses: npt.NDArray[np.uint64]


class Batches:
    """Makes entries for one store."""

    def __init__(self, layout: Layout, *, layerwise: bool) -> None:
        self.layerwise = layerwise
        count = layout.block_count
        everything = [one for layer in layout.layers for one in layer.slices]
        tables = [AddressTable(layer.slices, count) for layer in layout.layers]
        self._tables = tables if layerwise else [AddressTable(everything, count)]
        self.layers: dict[str, int] = {layer.name: i for i, layer in enumerate(layout.layers)}
        """The number of each layer that has memory of its own."""

    def whole(self, ids: BlockIds, slots: Any) -> Entries:
        """Whole blocks, block after block."""
        rows = [table.matrix(slots) for table in self._tables]
        if not self.layerwise:
            return Entries(ids, None, rows[0])
        layers = len(rows)
        return Entries(
            np.repeat(ids, layers, axis=0),
            np.tile(np.arange(layers, dtype=np.uint32), len(ids)),
            np.stack(rows, axis=1).reshape(len(ids) * layers, -1),
        )

    def layer(self, number: int, ids: BlockIds, slots: Any) -> Entries:
        """One layer of blocks."""
        shards = np.full(len(ids), number, dtype=np.uint32)
        return Entries(ids, shards, self._tables[number].matrix(slots))


def good_blocks(statuses: npt.NDArray[np.int32], blocks: int) -> npt.NDArray[np.bool_]:
    """For each block whether all of its entries are OK."""
    good: npt.NDArray[np.bool_] = (statuses.reshape(blocks, -1) == 0).all(axis=1)
    return good
