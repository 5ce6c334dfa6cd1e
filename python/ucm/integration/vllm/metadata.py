"""What the scheduler side tells the worker side for one step, and what it hears back.

Plain data that pickles small; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

WorkerMetadataBase: Any = getattr(base, "KVConnectorWorkerMetadata", object)
"""Missing before 0.18: there nothing but finished transfers travels back."""


@dataclass(slots=True)
class Transfer:
    """Blocks of one request that move between vLLM's KV memory and the store."""

    request: str
    ids: bytes
    """16 bytes per block, joined."""
    slots: list[int]
    """vLLM's block number for each."""
    sources: bytes = b""
    """For each block of a load the byte order to read, see ``siblings.py``; empty: this server's own."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One scheduler step."""

    number: int = 0
    computes: bool = False
    """Whether any token is computed; vLLM's offline engine drops statistics of steps without output."""
    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    """Of this step: their bytes are there when its computation, drafts included, is over."""
    late: list[Transfer] = field(default_factory=list)
    """Of requests that have finished: their bytes are there."""
    held: list[str] = field(default_factory=list)
    """Finished requests whose blocks stay until their copies are done."""
    preempted: list[str] = field(default_factory=list)
    """Requests whose blocks vLLM has just taken back."""
    blocking: list[str] = field(default_factory=list)
    """Requests whose saves must be persisted before this step ends."""
    new_epoch: bool = False
    """The weights changed: forget every stored block."""


@dataclass
class WorkerReport(WorkerMetadataBase):  # type: ignore[misc]
    """How far the copies of saves are: all of steps up to ``copied_step`` are done."""

    copied_step: int = 0

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """The report of several ranks: the slowest counts."""
        return WorkerReport(min(self.copied_step, other.copied_step))
