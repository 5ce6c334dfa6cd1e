"""The connector's configuration: the UCM YAML file named in ``kv_connector_extra_config``.

Owns the top-level keys of the file. The ``ucm_connectors`` block is the engine's and goes to it as
it stands; its keys are checked there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Final

import yaml

CONFIG_FILE_KEY: Final = "UCM_CONFIG_FILE"
ENGINE_BLOCK: Final = "ucm_connectors"

UPSTREAM_IGNORED: Final[dict[str, str]] = {
    "load_only_first_rank": "every rank loads what it needs; for MLA one rank saves",
    "ucm_sparse_config": "sparse attention is not part of this engine",
    "enable_record_traces": "use vLLM's tracing",
}


class Handoff(Enum):
    """When a prefill's announced blocks can be loaded elsewhere."""

    PROMISE = "promise"
    """The answer announces them; the decode server waits for them to be published."""
    BLOCKING = "blocking"
    """The step that finishes a prompt waits until its blocks are persisted."""


@dataclass(frozen=True)
class ConnectorConfig:
    """Top-level keys of the YAML file, validated."""

    engine_yaml: str
    """The engine's own mapping, as YAML text."""
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
    model_id: str = ""
    """Replaces the fingerprint of config and weights: equal ids mean equal models."""
    namespace_extra: str = ""
    """Any text that separates namespaces, for instance a tenant."""
    metrics_config_path: str = ""
    """Accepted; the metrics are vLLM's own, under its ``/metrics``."""
    hit_ratio: float = 1.0
    """At most this share of a prompt's blocks is loaded; below 1 for experiments only."""
    lookup_refresh_ms: int = 100
    """How often a waiting request looks again."""
    save_wait_ms: int = 5000
    """Bound of every wait for copies: preemption, sleep, shutdown."""
    warnings: tuple[str, ...] = field(default=(), compare=False)


class ConfigError(ValueError):
    """The file cannot be used; the text names the key and what is allowed."""


_KNOWN: Final = tuple(
    f.name for f in fields(ConnectorConfig) if f.name not in ("engine_yaml", "warnings")
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
        raise ConfigError(f"{name}: {value!r} is not a number of milliseconds, 0 or more")
    if isinstance(default, float):
        if isinstance(value, (int, float)) and 0 <= value <= 1:
            return float(value)
        raise ConfigError(f"{name}: {value!r} is not a number from 0 to 1")
    return "" if value is None else str(value)


def _engine_mapping(data: Mapping[str, Any]) -> Mapping[str, Any]:
    block = data.get(ENGINE_BLOCK)
    if block is None:
        raise ConfigError(f"{ENGINE_BLOCK}: missing; see examples/ucm_config_example.yaml")
    if isinstance(block, list):
        if len(block) != 1:
            raise ConfigError(f"{ENGINE_BLOCK}: {len(block)} entries; exactly one store is used")
        block = block[0]
    inner = block.get("ucm_connector_config") if isinstance(block, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{ENGINE_BLOCK}: the entry needs a mapping ucm_connector_config")
    return inner


def parse(data: Mapping[str, Any]) -> ConnectorConfig:
    """Validates the mapping of a UCM YAML file."""
    engine = _engine_mapping(data)
    defaults = ConnectorConfig(engine_yaml="")
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in data.items():
        if name == ENGINE_BLOCK:
            continue
        if name in UPSTREAM_IGNORED:
            warnings.append(f"{name} is accepted and has no effect: {UPSTREAM_IGNORED[name]}")
            continue
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, [*_KNOWN, ENGINE_BLOCK], 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_KNOWN)}"
            raise ConfigError(f"{name}: unknown key{hint}")
        values[name] = _value(name, value, getattr(defaults, name))
    # These two are also keys of the engine; either place will do.
    for shared in ("model_id", "namespace_extra", "lookup_refresh_ms"):
        if shared in engine and shared not in values:
            values[shared] = _value(shared, engine[shared], getattr(defaults, shared))
    return ConnectorConfig(
        engine_yaml=yaml.safe_dump(dict(engine), sort_keys=False),
        warnings=tuple(warnings),
        **values,
    )


def load(extra_config: Mapping[str, Any]) -> ConnectorConfig:
    """Reads the file that ``kv_connector_extra_config`` names, or the mapping it holds itself."""
    path = extra_config.get(CONFIG_FILE_KEY)
    if path is None:
        if ENGINE_BLOCK in extra_config:
            return parse(extra_config)
        raise ConfigError(
            f'kv_connector_extra_config needs "{CONFIG_FILE_KEY}": "/path/to/ucm_config.yaml"'
        )
    try:
        with open(os.path.expanduser(str(path)), encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path} is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{CONFIG_FILE_KEY}: {path} holds no mapping")
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
