"""Real vLLM processes on one small model, and the prompts that the tests give them."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_model import FOR_GPU, SMALL, make

HERE = Path(__file__).parent
DEVICE = os.environ.get("UCM_TEST_DEVICE", "cpu")
"""Where vLLM runs: ``cpu`` or ``cuda``."""
ON_GPU = DEVICE == "cuda"
BLOCK = 128 if ON_GPU else 32
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, 8 * BLOCK, 500, 1000, 2000)
PROCESS_TIMEOUT_S = 1200

CONNECTOR_KEYS = ("use_layerwise", "enable_event_sync", "handoff", "handoff_wait_ms", "save_wait_ms")

OTHER = os.environ.get("UCM_TEST_OTHER_PYTHON", "")
"""The interpreter of a vLLM of another version."""

AMX = not ON_GPU and " amx_tile" in Path("/proc/cpuinfo").read_text()
"""Whether vLLM's kernels use AMX, whose byte order is private: no other version reads it."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

ON_CUDA = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy; it would be compiled for nothing
    # A prompt's KV and tokens then do not depend on what else is in a step: equality can be asked for.
    "VLLM_BATCH_INVARIANT": "1",
    "OMP_NUM_THREADS": "2",
}

ENVIRONMENT = OFFLINE | (ON_CUDA if ON_GPU else ON_CPU)

KV_BYTES = 1 << 30

# fmt: off
CUDA_ENGINE: dict[str, Any] = {
    "block_size": BLOCK,
    "enforce_eager": False,
    "attention_config": {"backend": "FLASH_ATTN"},
    "compilation_config": {
        "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 128, 512],
    },
    "kv_cache_memory_bytes": KV_BYTES,
    "gpu_memory_utilization": 0.08,
}
"""Arguments of ``LLM`` on a GPU, over those in ``vllm_process.py``; several processes share the GPU."""

SERVER_FLAGS = (
    "--no-enforce-eager", "--block-size", str(BLOCK), "--attention-backend", "FLASH_ATTN",
    "--kv-cache-memory-bytes", str(KV_BYTES), "--gpu-memory-utilization", "0.08",
    "--compilation-config", json.dumps(CUDA_ENGINE["compilation_config"]),
) if ON_GPU else ()
"""The same for ``vllm serve``, over those in ``servers.py``."""
# fmt: on


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed * 10_007 + length)
    return [rng.randrange(3, 500) for _ in range(length)]


def loadable(prompts: list[list[int]]) -> int:
    """Tokens of prompts that a store can spare: whole blocks, never the last token."""
    return sum((len(p) - 1) // BLOCK * BLOCK for p in prompts)


class Bench:
    """Runs vLLM processes on one model. ``shared``: a folder of all processes of pytest."""

    def __init__(self, root: Path, shared: Path | None = None) -> None:
        self.root = root
        self._shared = shared or root
        self.model = str(make(root / "model", FOR_GPU if ON_GPU else SMALL))
        self.text = ""
        """What the last process printed, and then what its phases counted."""
        self._count = 0

    def config(self, name: str, **inner: Any) -> dict[str, Any]:
        """A UCM file's mapping: keys of the connector stand at its top, the others in the store's."""
        top = {k: inner.pop(k) for k in list(inner) if k in CONNECTOR_KEYS}
        store = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(self.root / name),
            "cache_buffer_capacity_gb": 0.25,
            "segment_size_mb": 16,
            **inner,
        }
        block = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        return {"ucm_connectors": [block], **top}

    def file(self, name: str, **inner: Any) -> Path:
        """The same as a file."""
        path = self.root / f"{name}.yaml"
        path.write_text(json.dumps(self.config(name, **inner)))
        return path

    def run(
        self, phases: list[dict[str, Any]], environment: dict[str, str] | None = None,
        python: str = sys.executable, **job: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        self._count += 1
        result = self.root / f"result-{self._count}.json"
        log = self.root / f"log-{self._count}.txt"
        if ON_GPU:
            job["engine"] = CUDA_ENGINE | job.get("engine", {})
            phases = [{"logprobs": 2, **phase} for phase in phases]  # they tell the ties
        job = {"model": self.model} | job
        job |= {"directory": str(self.root), "phases": phases, "result": str(result)}
        whole = os.environ | ENVIRONMENT | (environment or {})
        whole["PATH"] = f"{Path(python).parent}:{whole['PATH']}"
        with open(log, "wb") as file:
            done = subprocess.run(
                [python, str(HERE / "vllm_process.py")], input=json.dumps(job).encode(),
                stdout=file, stderr=file, env=whole, timeout=PROCESS_TIMEOUT_S, check=False,
            )  # fmt: skip
        self.text = log.read_text(errors="replace")
        assert done.returncode == 0 and result.exists(), self.text[-6000:]
        out: list[dict[str, Any]] = json.loads(result.read_text())
        self.text += "".join(f"\n{json.dumps(phase['counters'])}" for phase in out)
        return out

    def once(self, name: str, phases: list[dict[str, Any]], *around: Any, **job: Any) -> list[dict[str, Any]]:
        """The same run for all who ask for it by this name, in whichever process of pytest."""
        path = self._shared / f"once-{name}.json"
        with open(self._shared / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                path.write_text(json.dumps(self.run(phases, *around, **job)))
        out: list[dict[str, Any]] = json.loads(path.read_text())
        return out


PROMPTS = [prompt(n, 1) for n in LENGTHS]
TAILS = [prompt(1000, 1)[:cut] + prompt(70, 2) for cut in (BLOCK, 5 * BLOCK, 700)]
TURN = [prompt(3 * BLOCK + 4, 4)]

TIE = 1.0
"""Logits closer than this may change places where sums are rounded in another order. Between 64 and 128
neighbouring numbers in bfloat16 are 0.5 apart."""


def same(outputs: list[list[int]], reference: dict[str, Any]) -> bool:
    """Whether outputs are those of a reference.

    On a CPU every token has to be the same. Kernels on GPUs choose how they split sums by what else is in
    a step, and where blocks are loaded less is computed: there outputs may part, but only at a tie.
    """
    gaps = reference["gaps"] if ON_GPU else [[0.0] * len(one) for one in outputs]
    for got, want, ahead in zip(outputs, reference["outputs"], gaps, strict=True):
        parts = [at for at, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]]
        if parts and (not ON_GPU or ahead[parts[0]] >= TIE):
            return False
    return True


def first_tokens(reference: dict[str, Any], wanted: list[bool]) -> dict[str, Any]:
    """A reference of one token, of the wanted requests."""
    return {
        key: [one[:1] for one, keep in zip(reference[key], wanted, strict=True) if keep]
        for key in ("outputs", "gaps") if key in reference
    }  # fmt: skip


def ties(outputs: list[list[int]], reference: dict[str, Any]) -> int:
    """How many outputs parted from a reference."""
    return sum(got != want for got, want in zip(outputs, reference["outputs"], strict=True))


def loaded(phase: dict[str, Any]) -> float:
    return float(phase["counters"].get("ucm_verified_loaded_tokens", 0))


def external(phase: dict[str, Any]) -> float:
    return float(phase["counters"].get("vllm:external_prefix_cache_hits", 0))
