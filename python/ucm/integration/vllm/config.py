"""The connector's configuration: the UCM YAML file named in ``kv_connector_extra_config``.

Owns the top-level keys that the connector reads. The whole file goes to the engine as it stands: the
engine knows every key, the connector's too, and refuses an unknown one with a suggestion.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Final

import yaml

CONFIG_FILE_KEY: Final = "UCM_CONFIG_FILE"
ENGINE_BLOCK: Final = "ucm_connectors"
DEFAULT_PIPELINE: Final = "Cache|Posix"


class Handoff(Enum):
    """When a prefill's announced blocks can be loaded elsewhere."""

    PROMISE = "promise"
    """The answer announces them; the decode server waits for them to be published."""
    BLOCKING = "blocking"
    """The step that finishes a prompt waits until its blocks are persisted."""


@dataclass(frozen=True)
class ConnectorConfig:
    """Top-level keys of the YAML file, validated."""

    text: str
    """The whole file."""
    enable_event_sync: bool = True
    """Saves wait on the device for an event instead of stopping the host."""
    use_layerwise: bool = False
    """Transfer layer by layer instead of whole blocks."""
    save_decode_blocks: bool = True
    """Save blocks that fill up while decoding."""
    strict_load_failure: bool = False
    """Keep vLLM's ``kv_load_failure_policy: fail``; default: recompute."""
    handoff: Handoff = Handoff.PROMISE
    handoff_wait_ms: int = 5000
    """How long a decode server waits for blocks that a prefill server announced."""
    persist_token_threshold: int = 0
    """Prompts of fewer tokens are neither saved nor loaded."""
    load_tokens_threshold: int = 0
    """Fewer external hit tokens than this are computed instead of loaded."""
    metrics_config_path: str = ""
    """Accepted; the metrics are vLLM's own, under its ``/metrics``."""
    hit_ratio: float = 1.0
    """At most this share of a prompt's blocks is loaded; below 1 for experiments only."""
    save_wait_ms: int = 5000
    """Bound of every wait for saves: preemption, blocking handoff, shutdown."""
    instance: str = ""
    """Not a key: vLLM's engine id, the same in all processes of a server."""
    backends: tuple[str, ...] = ()
    """The engine's directories; empty where nothing is kept in files."""
    model_id: str = ""
    """A key of the engine. Replaces the fingerprint of config and weights: equal ids, equal models."""
    namespace_extra: str = ""
    """A key of the engine. Any text that separates namespaces, for instance a tenant."""
    lookup_refresh_ms: int = 100
    """A key of the engine. How often a waiting request looks again."""
    timeout_ms: int = 30_000
    """A key of the engine. Deadline of each transfer."""
    local_rank_size: int = 0
    """A key of the engine. Ranks of this host; 0: as many as vLLM's configuration says."""
    has_cache: bool = True
    """Not a key: whether blocks can be held in DRAM."""


class ConfigError(ValueError):
    """The file cannot be used; the text names the key and what is allowed."""


ENGINE_KEYS: Final = ("model_id", "namespace_extra", "lookup_refresh_ms", "timeout_ms", "local_rank_size")
"""Keys of the engine's mapping that the connector has to know too."""

_TOP_KEYS: Final = tuple(
    f.name
    for f in fields(ConnectorConfig)
    if f.name not in ("text", "instance", "backends", "has_cache", *ENGINE_KEYS)
)


def _value(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, Enum):
        kind = type(default)
        try:
            return kind(str(value).lower())
        except ValueError:
            allowed = ", ".join(member.value for member in kind)
            raise ConfigError(f"{name}: {value!r} is not one of {allowed}") from None
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{name}: {value!r} is not true or false")
    if isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise ConfigError(f"{name}: {value!r} is not a whole number, 0 or more")
    if isinstance(default, float):
        if isinstance(value, (int, float)) and 0 <= value <= 1:
            return float(value)
        raise ConfigError(f"{name}: {value!r} is not a number from 0 to 1")
    return "" if value is None else str(value)


def _engine_mapping(data: Mapping[str, Any]) -> Mapping[str, Any]:
    block = data.get(ENGINE_BLOCK)
    if block is None:
        raise ConfigError(f"{ENGINE_BLOCK}: missing; see examples/ucm_config_example.yaml")
    entry = block[0] if isinstance(block, list) and block else block
    inner = entry.get("ucm_connector_config") if isinstance(entry, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{ENGINE_BLOCK}: its first entry needs a mapping ucm_connector_config")
    return inner


def parse(data: Mapping[str, Any], text: str) -> ConnectorConfig:
    """Reads the connector's keys from the mapping of a UCM YAML file."""
    engine = _engine_mapping(data)
    defaults = ConnectorConfig(text=text)
    values = {
        name: _value(name, source[name], getattr(defaults, name))
        for names, source in ((_TOP_KEYS, data), (ENGINE_KEYS, engine))
        for name in names
        if source.get(name) is not None
    }
    listed = engine.get("storage_backends") or ()
    backends = listed.split(":") if isinstance(listed, str) else [str(one) for one in listed]
    pipeline = str(engine.get("store_pipeline") or DEFAULT_PIPELINE)
    if "Posix" not in pipeline:
        backends = []
    return ConnectorConfig(
        text=text, backends=tuple(filter(None, backends)), has_cache="Cache" in pipeline, **values
    )


def load(extra_config: Mapping[str, Any]) -> ConnectorConfig:
    """Reads the file that ``kv_connector_extra_config`` names, or the mapping it holds itself."""
    path = extra_config.get(CONFIG_FILE_KEY)
    if path is None:
        if ENGINE_BLOCK in extra_config:
            return parse(extra_config, yaml.safe_dump(dict(extra_config), sort_keys=False))
        raise ConfigError(f'kv_connector_extra_config needs "{CONFIG_FILE_KEY}": "/path/to/ucm_config.yaml"')
    try:
        with open(os.path.expanduser(str(path)), encoding="utf-8") as file:
            text = file.read()
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path} is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path} holds no mapping")
    try:
        return parse(data, text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
