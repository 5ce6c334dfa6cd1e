"""UCM as a secondary tier of vLLM offloading: made by its factories, over memory like its CPU tier."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace as Object
from typing import Any

import numpy as np
import pytest

base = pytest.importorskip("vllm.v1.kv_offload.tiering.base", reason="vLLM has no storage tiers")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

MODULE = "ucm.integration.vllm.storage_tier"
CHUNKS, CHUNK_BYTES = 8, 64 * 1024
JOB = getattr(base, "TransferJob", None) or base.JobMetadata
SLOTS = "chunk_ids" if hasattr(base, "TransferJob") else "block_ids"
KEYS = [make_offload_key(bytes([n]) * 32, 0) for n in range(CHUNKS)]
CONTEXT = ReqContext(req_id="r")


def spec(model: str = "tiny") -> Any:
    parallel = Object(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True)
    config = Object(
        model=Object(name=model, dtype="bfloat16"), cache=Object(tokens_per_hash=16), parallel=parallel,
        groups=[Object(tokens_per_block=16, layer_names=["l.0"])],
        canonical_layout=False, replicated_layout=False, kv_cache_layout=None,
    )  # fmt: skip
    return Object(config=config, blocks_per_chunk=1)


class Tier:
    """A tier made by vLLM's factory, and the memory above it."""

    def __init__(self, path: Path, model: str = "tiny") -> None:
        self.memory = np.zeros((CHUNKS, CHUNK_BYTES), dtype=np.int8)
        config = {
            "type": "UcmTier", "storage_backends": str(path), "segment_size_mb": 4, "lookup_refresh_ms": 0,
            "cache_buffer_capacity_gb": 0.05,
        }  # fmt: skip
        if SLOTS == "chunk_ids":
            config["module_path"] = MODULE
        else:
            from vllm.v1.kv_offload.factory import OffloadingSpecFactory

            named = {"spec_name": "UcmOffloadingSpec", "spec_module_path": MODULE}
            assert OffloadingSpecFactory.get_spec_cls(named).__name__ == "UcmOffloadingSpec"
        self.tier = SecondaryTierFactory.create_secondary_tier(config, memoryview(self.memory), spec(model))

    def job(self, number: int, keys: list[Any], slots: list[int], promotion: bool) -> Any:
        return JOB(
            job_id=number, keys=keys, is_promotion=promotion, req_context=CONTEXT,
            **{SLOTS: np.array(slots)},
        )  # fmt: skip

    def results(self) -> list[Any]:
        deadline = time.monotonic() + 30
        while not (done := list(self.tier.get_finished_jobs())) and time.monotonic() < deadline:
            assert self.tier.has_pending_work()
            time.sleep(0.005)
        return done

    def hits(self) -> list[bool]:
        return [self.tier.lookup(key, CONTEXT) is LookupResult.HIT for key in KEYS]


def test_stored_by_one_server_loaded_by_another(tmp_path: Path) -> None:
    """Chunks go down; another process with the same model finds and loads them, another model does not."""
    first = Tier(tmp_path)
    first.memory[:] = np.random.default_rng(0).integers(-128, 127, first.memory.shape, dtype=np.int8)
    assert not any(first.hits())
    first.tier.submit_store(first.job(1, KEYS[:6], list(range(6)), False))
    [stored] = first.results()
    assert (stored.job_id, stored.success) == (1, True)
    first.tier.submit_store(first.job(2, KEYS[:6], list(range(6)), False))  # nothing is missing
    assert [one.success for one in first.results()] == [True]
    assert not first.tier.has_pending_work()

    second, other = Tier(tmp_path), Tier(tmp_path, model="other")
    assert second.hits() == [True] * 6 + [False] * 2
    assert not any(other.hits())
    second.tier.submit_load(second.job(3, KEYS[:6], [7, 6, 5, 4, 3, 2], True))
    second.tier.drain_jobs()
    assert [(one.job_id, one.success) for one in second.results()] == [(3, True)]
    assert (second.memory[[7, 6, 5, 4, 3, 2]] == first.memory[:6]).all()
    assert not second.memory[:2].any()

    second.tier.submit_load(second.job(4, KEYS[4:], [0, 1, 2, 3], True))  # two of them are not there
    [part] = second.results()
    assert not part.success
    if hasattr(part, "successful_keys"):
        assert list(part.successful_keys) == KEYS[4:6]
    with pytest.raises(ValueError, match="outside 0 to 7"):
        second.tier.submit_load(second.job(5, KEYS[:1], [8], True))
    for one in (first, second, other):
        one.tier.shutdown()
