"""UCM as a tier below vLLM's own offloading to CPU memory.

``UcmTier`` is a secondary tier: since 0.32 vLLM loads it by ``module_path``. ``UcmOffloadingSpec`` is vLLM's
tiering specification with that tier known by name, for versions that take a specification by
``spec_module_path`` only.

Owns one store over vLLM's CPU memory, and the jobs in flight. Its keys are vLLM's block hashes, so its
namespace is its own: it shares nothing with ``UCMConnector``. Runs in the scheduler's process; no method
waits but ``drain_jobs``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterable
from typing import Any, Final

import numpy as np
from vllm.v1.kv_offload import base as offload
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from ucm.errors import Status, UcmError
from ucm.integration.vllm.namespace import canonical_json, model_fingerprint
from ucm.store import BlockIds, Options, Stage, Store

ID_BYTES: Final = 16
STAGING_GB: Final = 0.25
"""Default arena: transfers are staged, nothing is kept, since vLLM's CPU tier above keeps blocks."""

RESULT_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(JobResult))

logger = logging.getLogger("vllm.ucm.tier")


def block_ids(keys: Iterable[bytes]) -> BlockIds:
    """Ids for vLLM's keys, which are longer."""
    joined = b"".join(hashlib.blake2b(key, digest_size=ID_BYTES).digest() for key in keys)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, ID_BYTES)


def namespace(spec: Any) -> dict[str, Any]:
    """The engine's options for what vLLM says decides the bytes of a chunk."""
    mapper = FileMapper.from_offloading_spec(
        root_dir="", offloading_spec=spec, blocks_per_file=spec.blocks_per_chunk, parallel_agnostic=True
    )
    name = str(spec.config.model.name)
    return {
        "model_id": model_fingerprint(name, name, {}),
        "dtype": str(spec.config.model.dtype),
        "namespace_extra": canonical_json({"keys": "vllm", **mapper.get_run_config()}).decode(),
        "order": "vllm-chunks",
    }


class Job:
    """A store or a load that is under way."""

    __slots__ = ("keys", "number", "stage", "task")

    def __init__(self, number: int, keys: list[bytes], task: Any, stage: Stage) -> None:
        self.number = number
        self.keys = keys
        self.task = task
        self.stage = stage

    def is_over(self) -> bool:
        """Whether the engine has ended, and touches vLLM's memory no more."""
        return self.task is None or (
            self.task.poll(self.stage) != Status.PENDING and self.task.poll(Stage.RELEASED) != Status.PENDING
        )


class UcmTier(SecondaryTierManager):
    """A secondary tier on UCM's storage. ``options`` are keys of ``docs/configuration.md``, at least
    ``storage_backends``."""

    medium = getattr(getattr(offload, "Medium", None), "STORAGE", None)

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
        backpressure_detector: Any = None, locality: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        more = {} if backpressure_detector is None else {"backpressure_detector": backpressure_detector}
        super().__init__(offloading_spec, primary_kv_view, tier_type, **more)
        if locality is not None:
            self.locality = offload.Locality(locality)
        memory = np.asarray(primary_kv_view)
        self._base = int(memory.ctypes.data)
        self._stride = int(memory.strides[0])
        self._slots = len(memory)
        engine = Options()
        engine.update({"store_pipeline": "Posix", "cache_buffer_capacity_gb": STAGING_GB, **options})
        engine.update({"device": "host", "block_size": self._stride, **namespace(offloading_spec)})
        self._store = Store(engine)
        self._jobs: list[Job] = []

    # -- what is there --------------------------------------------------------------------------

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """HIT or MISS, from memory."""
        try:
            found = bool(self._store.lookup(block_ids([key]))[0])
        except UcmError as error:
            logger.warning("lookup failed: %s", error)
            found = False
        return offload.LookupResult.HIT if found else offload.LookupResult.MISS

    def on_new_request(self, req_context: Any) -> Any:
        """No preference."""
        return offload.RequestOffloadingContext()

    # -- transfers ------------------------------------------------------------------------------

    def _addresses(self, job: Any) -> Any:
        slots = np.asarray(getattr(job, "chunk_ids", getattr(job, "block_ids", None)), dtype=np.int64)
        if len(slots) and (slots.min() < 0 or slots.max() >= self._slots):
            raise ValueError(f"a slot of job {job.job_id} is outside 0 to {self._slots - 1}")
        return (self._base + slots * self._stride).astype(np.uint64)[:, None]

    def submit_store(self, job_metadata: Any) -> None:
        """Saves the chunks that are not there yet."""
        keys = list(job_metadata.keys)
        ids, addresses = block_ids(keys), self._addresses(job_metadata)
        missing = np.flatnonzero(~self._store.lookup(ids))
        task = None
        if len(missing):
            keys = [keys[i] for i in missing]
            task = self._submit(self._store.save, ids[missing], addresses[missing])
        self._jobs.append(Job(job_metadata.job_id, keys if len(missing) else [], task, Stage.PERSISTED))

    def submit_load(self, job_metadata: Any) -> None:
        """Loads into slots of vLLM's CPU memory."""
        keys = list(job_metadata.keys)
        task = self._submit(self._store.load, block_ids(keys), self._addresses(job_metadata))
        self._jobs.append(Job(job_metadata.job_id, keys, task, Stage.LOADED))

    @staticmethod
    def _submit(call: Any, ids: BlockIds, addresses: Any) -> Any:
        try:
            return call(ids, addresses)
        except UcmError as error:
            logger.warning("a transfer of %d chunks was refused: %s", len(ids), error)
            return None

    def get_finished_jobs(self) -> Iterable[Any]:
        """The jobs that ended since the last call."""
        over = [job for job in self._jobs if job.is_over()]
        self._jobs = [job for job in self._jobs if job not in over]
        return [self._result(job) for job in over]

    def _result(self, job: Job) -> Any:
        good = np.zeros(len(job.keys), dtype=bool)
        if job.task is not None:
            good = job.task.statuses() == Status.OK
            if not good.all():
                logger.warning("%d of %d chunks failed: %s", int((~good).sum()), len(good), job.task.error())
        values: dict[str, Any] = {"job_id": job.number, "success": bool(good.all())}
        if job.stage == Stage.LOADED and not good.all():
            values["successful_keys"] = [key for key, one in zip(job.keys, good, strict=True) if one]
        values["transfer_bytes"] = int(good.sum()) * self._stride
        return JobResult(**{name: value for name, value in values.items() if name in RESULT_FIELDS})

    def has_pending_work(self) -> bool:
        """Keeps the engine stepping until transfers have ended."""
        return bool(self._jobs)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """The engine counts uses by itself."""

    def drain_jobs(self) -> None:
        """Waits until nothing touches vLLM's memory; deadlines bound it."""
        for job in self._jobs:
            if job.task is not None:
                job.task.wait_status(job.stage)
                job.task.wait_status(Stage.RELEASED)

    def shutdown(self) -> None:
        """Closes the store."""
        self.drain_jobs()
        self._store.close()


class UcmOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering specification; ``{"type": "UcmTier", ...}`` is one of its secondary tiers."""


if UcmTier.__name__ not in SecondaryTierFactory._registry:
    SecondaryTierFactory.register_tier(UcmTier.__name__, __name__, UcmTier.__name__)
