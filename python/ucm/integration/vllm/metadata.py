"""What the scheduler side tells the worker side for one step, and what it hears back.

Plain data that pickles small; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.core.sched import output

from ucm.store import ANY_PROMISE

WorkerMetadataBase: Any = getattr(base, "KVConnectorWorkerMetadata", object)
"""Missing before 0.18: there the report travels within the statistics."""


NO_HOLD: Final = 0
REFUSED: Final = -1
"""A worker's answer to a hold that it has no room for."""


@dataclass(slots=True)
class Transfer:
    """Blocks of one request that move between vLLM's KV memory and the store."""

    request: str
    ids: bytes
    """16 bytes per block, joined."""
    slots: list[int]
    """vLLM's block number for each, of every KV cache group in turn; ``NULL_BLOCK``: not needed there."""
    sources: bytes = b""
    """For each block of a load the byte order to read, see ``siblings.py``; empty: this server's own."""
    hold: int = NO_HOLD
    """Of a load: the hold that has the blocks in memory. They are loaded in this step, layer by layer."""
    promise: int = ANY_PROMISE
    """Of a save: the number of the promise that is broken if it fails."""


@dataclass(slots=True)
class Hold:
    """Blocks that a worker brings into memory, verified, and keeps there until they are loaded."""

    number: int
    ids: bytes


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
    holds: list[Hold] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """Holds that are not needed any more and were not loaded."""


REPORTS_IN_STATS: Final = WorkerMetadataBase is object
"""Whether vLLM has nothing else that carries a report to the scheduler side in every step."""

TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)
CAN_FAIL_REQUESTS: Final = TransferResults is not None and hasattr(output, "KVConnectorBlockState")
"""Whether vLLM takes load failures by request and shows its block tables, as models with several KV cache
groups need. 0.26 does not, 0.32 does."""

Groups: Any = base.SupportsHMA if CAN_FAIL_REQUESTS else object
"""The base class that tells vLLM that a connector takes several KV cache groups."""


@dataclass
class WorkerReport(WorkerMetadataBase):  # type: ignore[misc]
    """What the scheduler side has to know of the workers, in every step and of every rank."""

    copied_step: int = 0
    """The copies of all saves of steps up to this one are done."""
    step: int = 0
    """The step that was run; what failed in it was reported with it."""
    holds: dict[int, int] = field(default_factory=dict)
    """Of each hold that has ended, and was neither loaded nor released, how many blocks from its first are in
    memory; or ``REFUSED``."""
    failed: dict[str, int] = field(default_factory=dict)
    """Of each request whose load failed, where block numbers do not say it, how many blocks from its first
    are good."""
    connector: str = ""
    """Of which connector they are the workers: beside another one statistics go by the name of the class."""

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """The report of several ranks: the slowest counts, and the one that holds least."""
        both = self.holds.keys() & other.holds.keys()
        return WorkerReport(
            min(self.copied_step, other.copied_step),
            min(self.step, other.step),
            {number: min(self.holds[number], other.holds[number]) for number in both},
            {
                request: min(report.failed[request] for report in (self, other) if request in report.failed)
                for request in self.failed.keys() | other.failed.keys()
            },
            self.connector,
        )


def carrier_of(output: Any, connector: str) -> Any:
    """The statistics that carry a connector's report in what its side hears of a step, if any do."""
    stats = output.kv_connector_stats
    # Of a MultiConnector these are the statistics of all its connectors by the names of their classes: of two
    # alike those of the last. The other then hears nothing, and waits for what vLLM itself is told.
    every = (stats, *stats.data.values()) if stats is not None else ()
    reports = ((one, getattr(one, "report", None)) for one in every)
    return next(
        (one for one, report in reports if report is not None and report.connector == connector), None
    )
