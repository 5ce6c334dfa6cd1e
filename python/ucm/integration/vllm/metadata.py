"""What the scheduler side tells the worker side for one step.

Plain data that pickles small; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(slots=True)
class Transfer:
    """Blocks of one request that move between vLLM's KV memory and the store."""

    request: str
    ids: bytes
    """16 bytes per block, joined."""
    slots: list[int]
    """vLLM's block number for each."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One scheduler step."""

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
