"""Opens the store of each side with the options that vLLM's configuration implies.

Owns the translation of a layout, a rank and a namespace into options of the engine. Transfers
nothing.
"""

from __future__ import annotations

from typing import Any, Final

from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.convert import Converted
from ucm.integration.vllm.geometry import Layout
from ucm.integration.vllm.namespace import Namespace
from ucm.integration.vllm.rank import Rank
from ucm.store import Options, Store

ENGINE_DEVICES: Final = {"cpu": "host", "cuda": "cuda", "npu": "ascend"}
"""The engine's name of a torch device."""

LOOKUP_ONLY: Final = -1

STAGED_BLOCKS: Final = 32
"""Blocks in flight in a store that only converts."""

STAGED_BYTES_MIN: Final = 1 << 26


def _options(config: ConnectorConfig, namespace: Namespace, values: dict[str, Any]) -> Options:
    options = Options(config.text)
    options.update(namespace.engine_options())
    if config.instance:
        options.set("unique_id", config.instance)  # the scheduler's store sees its workers' DRAM
    options.update(values)
    return options


def open_lookup(config: ConnectorConfig, namespace: Namespace, part_bytes: int, part_count: int) -> Store:
    """The scheduler's store: looks up and hashes, transfers nothing."""
    values = {
        "device": "host",
        "device_id": LOOKUP_ONLY,
        "block_size": part_bytes,
        "part_index": 0,
        "part_count": part_count,
        "parts_owned": 1,
    }
    return Store(_options(config, namespace, values))


def _transfer_values(config: ConnectorConfig, part_bytes: int, rank: Rank, device: Any) -> dict[str, Any]:
    if device.type not in ENGINE_DEVICES:
        raise ValueError(f"device {device.type} is not supported: {', '.join(ENGINE_DEVICES)} are")
    return {
        "device": ENGINE_DEVICES[device.type],
        "device_id": 0 if device.index is None else device.index,
        "block_size": part_bytes,
        "part_index": rank.part,
        "part_count": rank.part_count,
        "parts_owned": 1,
        "local_rank_size": config.local_rank_size or rank.local_ranks,
    }


def open_transfer(
    config: ConnectorConfig, namespace: Namespace, layout: Layout, rank: Rank, device: Any,
    *, layerwise: bool,
) -> Store:  # fmt: skip
    """A worker's store."""
    slices = [s.length for s in layout.layers[0].slices] if layerwise else layout.slice_lengths
    values = _transfer_values(config, layout.part_bytes, rank, device)
    values |= {"tensor_size_list": slices, "shard_size": sum(slices)}
    return Store(_options(config, namespace, values))


def open_converting(
    config: ConnectorConfig, namespace: Namespace, converted: Converted, rank: Rank, device: Any,
    *, layerwise: bool,
) -> Store:  # fmt: skip
    """A worker's store for blocks that were saved in the namespace's byte order, not in its own.

    It stages and keeps nothing: a block that was read is saved again in this server's own order.
    """
    layout, shapes = converted.layout, converted.shapes
    part_bytes = shard_bytes = layout.part_bytes
    if layerwise:
        shard_bytes = layout.layers[0].length
        shapes = shapes[: len(layout.layers[0].slices)]
        if shapes * len(layout.layers) != converted.shapes:
            raise ValueError("the layers' pages differ, and blocks in another byte order are not read")
    values = _transfer_values(config, part_bytes, rank, device)
    values |= {
        "tensor_shape_list": shapes,
        "shard_size": shard_bytes,
        "store_pipeline": "Posix",
        "cache_buffer_capacity_gb": max(STAGED_BLOCKS * part_bytes, STAGED_BYTES_MIN) / (1 << 30),
        "share_buffer_enable": False,
    }
    return Store(_options(config, namespace, values))
