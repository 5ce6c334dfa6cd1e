"""What the connector counts, as vLLM's connector stats and as Prometheus metrics.

Owns the names. Every counter travels as one number in ``KVConnectorStats.data``; numbers of ranks
and steps add up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS: Final[dict[str, str]] = {
    "queried_tokens": "Tokens of new requests that were looked up",
    "hbm_hit_tokens": "Tokens that vLLM's own prefix cache held",
    "hit_tokens": "Tokens promised to vLLM from the store",
    "verified_loaded_tokens": "Tokens whose KV was loaded and verified (of rank 0)",
    "loaded_blocks": "Blocks loaded and verified, of all ranks",
    "loaded_bytes": "Bytes loaded and verified, of all ranks",
    "load_seconds": "Seconds from submitting loads to their end, summed over loads",
    "converted_blocks": "Blocks read from another byte order, of all ranks",
    "load_failed_blocks": "Blocks that could not be loaded and are computed again",
    "loads": "Loads",
    "holds": "Requests whose blocks were brought into memory before a step loaded them, of all ranks",
    "holds_refused": "Of these, how many found no room and loaded whole blocks, of all ranks",
    "hold_timeouts": "Holds of which no worker told in time",
    "saved_blocks": "Blocks persisted, of all ranks",
    "saved_bytes": "Bytes persisted, of all ranks",
    "save_seconds": "Seconds from submitting saves to their end, summed over saves",
    "save_failed_blocks": "Blocks whose save failed",
    "save_dropped_blocks": "Blocks that were not saved because a queue was full",
    "saves": "Saves",
    "preemption_waits": "Preempted requests whose copies had to be waited for",
    "handoff_waits": "Requests that waited for announced blocks",
    "handoff_wait_seconds": "Seconds that they waited",
    "handoff_timeouts": "Waits that ended with handoff_wait_ms",
    "handoff_abandoned": "Waits that ended because the writer gave up",
    "steps": "Steps that computed something",
    "scheduler_seconds": "Seconds spent in the scheduler-side connector",
    "worker_seconds": "Seconds spent in the worker-side connector but for waits, of all ranks",
}
"""Name and help of each counter; on /metrics they are ``ucm_<name>_total``."""

MISMATCH_PREFIX: Final = "handoff_mismatch:"
"""Followed by the name of the namespace field in which a handoff differed."""

METRIC_PREFIX: Final = "ucm_"

RATES: Final = 1e9


@dataclass
class UcmStats(KVConnectorStats):
    """Counters of one interval."""

    data: dict[str, Any] = field(default_factory=dict)
    report: Any = None
    """The workers' report, where nothing else carries it. No counter: nothing of it is published."""

    def add(self, name: str, amount: float = 1) -> None:
        """Counts."""
        self.data[name] = self.data.get(name, 0) + amount

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the seconds of what is done inside."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another's counters to these."""
        for name, amount in other.data.items():
            self.add(name, amount)
        report = getattr(other, "report", None)
        if report is not None:
            self.report = report if self.report is None else self.report.aggregate(report)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the periodic log line says."""
        d = self.data
        line: dict[str, int | float] = {
            name: d[name] for name in ("hit_tokens", "verified_loaded_tokens") if name in d
        }
        for verb in ("load", "save"):
            moved = d.get("loaded_bytes" if verb == "load" else "saved_bytes", 0)
            seconds = d.get(f"{verb}_seconds", 0)
            if moved:
                line[f"{verb} GB"] = round(moved / RATES, 4)
                line[f"{verb} GB/s"] = round(moved / RATES / seconds, 3) if seconds else 0
        for name in ("load_failed_blocks", "save_failed_blocks", "save_dropped_blocks", "handoff_timeouts"):
            if d.get(name):
                line[name] = d[name]
        return line

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class UcmPromMetrics(KVConnectorPromMetrics):
    """The counters as Prometheus metrics, and what namespace this server has."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        namespace: dict[str, str],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._per_engine(self._counter_cls(METRIC_PREFIX + name, text, labelnames))
            for name, text in COUNTERS.items()
        }
        self._mismatches = self._counter_cls(
            METRIC_PREFIX + "handoff_mismatches",
            "Handoffs whose namespace differs from this server's, by field",
            [*labelnames, "field"],
        )
        if namespace:
            info = self._gauge_cls(
                METRIC_PREFIX + "namespace_info",
                "The namespace of this server: servers share KV if logical and order agree",
                [*labelnames, *namespace],
            )
            for values in per_engine_labelvalues.values():
                info.labels(*[*values, *namespace.values()]).set(1)

    def _per_engine(self, metric: Any) -> dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Counts what one step reported."""
        for name, amount in transfer_stats_data.items():
            counter = self._counters.get(name)
            if counter is not None:
                counter[engine_idx].inc(amount)
            elif name.startswith(MISMATCH_PREFIX):
                values = self.per_engine_labelvalues[engine_idx]
                self._mismatches.labels(*values, name.removeprefix(MISMATCH_PREFIX)).inc(amount)
