"""Opens the store of each side with the options that vLLM's configuration implies.

Owns the translation of a layout, a rank and a namespace into options of the engine. Transfers
nothing.
"""

from __future__ import annotations

from typing import Any, Final

from ucm.integration.vllm.config import ConnectorConfig
from ucm.integration.vllm.geometry import Layout
from ucm.integration.vllm.namespace import Namespace
from ucm.integration.vllm.rank import Rank
from ucm.store import Options, Store

ENGINE_DEVICES: Final = {"cpu": "host", "cuda": "cuda", "npu": "ascend"}
"""The engine's name of a torch device."""

LOOKUP_ONLY: Final = -1


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
        "tensor_size_list": [part_bytes],
        "shard_size": part_bytes,
        "block_size": part_bytes,
        "part_index": 0,
        "part_count": part_count,
        "parts_owned": 1,
    }
    return Store(_options(config, namespace, values))


def open_transfer(
    config: ConnectorConfig, namespace: Namespace, layout: Layout, rank: Rank, device: Any,
    *, layerwise: bool,
) -> Store:  # fmt: skip
    """A worker's store."""
    if device.type not in ENGINE_DEVICES:
        raise ValueError(f"device {device.type} is not supported: {', '.join(ENGINE_DEVICES)} are")
    slices = [s.length for s in layout.layers[0].slices] if layerwise else layout.slice_lengths
    values = {
        "device": ENGINE_DEVICES[device.type],
        "device_id": 0 if device.index is None else device.index,
        "tensor_size_list": slices,
        "shard_size": sum(slices),
        "block_size": layout.part_bytes,
        "part_index": rank.part,
        "part_count": rank.part_count,
        "parts_owned": 1,
    }
    return Store(_options(config, namespace, values))
