"""How blocks become the entries of a batch: whole, or one entry per layer.

Owns the order of entries and the way back from entry statuses to blocks. Submits nothing.

Block numbers (*slots*) have a row for each block and a column for each KV cache group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ucm.integration.vllm.geometry import NULL_BLOCK, AddressTable, Layout
from ucm.store import BlockIds


@dataclass(frozen=True)
class Entries:
    """Arguments of a save or a load."""

    ids: BlockIds
    shards: npt.NDArray[np.uint32] | None
    addresses: npt.NDArray[np.uint64]


class Batches:
    """Makes entries for one store."""

    def __init__(self, layout: Layout, *, layerwise: bool, columns: int = 1) -> None:
        assert layerwise or columns == 1
        self.layerwise = layerwise
        self.columns = columns
        """KV cache groups."""
        self._groups = [layer.group for layer in layout.layers] if layerwise else [0]
        count = layout.block_count
        everything = [one for layer in layout.layers for one in layer.slices]
        tables = [AddressTable(layer.slices, count) for layer in layout.layers]
        self._tables = tables if layerwise else [AddressTable(everything, count)]
        self.layers: dict[str, int] = {layer.name: i for i, layer in enumerate(layout.layers)}
        """The number of each layer that has memory of its own."""

    def whole(self, ids: BlockIds, slots: Any) -> Entries:
        """Whole blocks, block after block."""
        slots = self.rows(slots)
        rows = [
            table.matrix(slots[:, group]) for table, group in zip(self._tables, self._groups, strict=True)
        ]
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
        return Entries(ids, shards, self._tables[number].matrix(self.rows(slots)[:, self._groups[number]]))

    def needed(self, ids: BlockIds, slots: Any) -> tuple[Entries, npt.NDArray[np.intp]]:
        """Blocks without the layers whose group has no place for them, and the block of each entry: a layer
        with a window needs nothing of a block that lies before it."""
        entries = self.whole(ids, slots)
        there = self.rows(slots)[:, self._groups] != NULL_BLOCK
        owners = np.repeat(np.arange(len(ids)), there.shape[1])
        if there.all():
            return entries, owners
        kept = there.reshape(-1)
        shards = None if entries.shards is None else entries.shards[kept]
        return Entries(entries.ids[kept], shards, entries.addresses[kept]), owners[kept]

    def rows(self, slots: Any) -> npt.NDArray[np.int64]:
        """Block numbers, a row for each block."""
        return np.asarray(slots, dtype=np.int64).reshape(-1, self.columns)


def good_blocks(statuses: npt.NDArray[np.int32], blocks: int) -> npt.NDArray[np.bool_]:
    """For each block whether all of its entries are OK."""
    good: npt.NDArray[np.bool_] = (statuses.reshape(blocks, -1) == 0).all(axis=1)
    return good
