"""Real vLLM processes on one small model, and the prompts that the tests give them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_model import make

HERE = Path(__file__).parent
BLOCK = 32
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1, 8 * BLOCK, 500, 1000, 2000)
PROCESS_TIMEOUT_S = 1200

CONNECTOR_KEYS = ("use_layerwise", "enable_event_sync", "handoff", "handoff_wait_ms", "save_wait_ms")

OTHER = os.environ.get("UCM_TEST_OTHER_PYTHON", "")
"""The interpreter of a vLLM of another version."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed * 10_007 + length)
    return [rng.randrange(3, 500) for _ in range(length)]


def loadable(prompts: list[list[int]]) -> int:
    """Tokens of prompts that a store can spare: whole blocks, never the last token."""
    return sum((len(p) - 1) // BLOCK * BLOCK for p in prompts)


class Bench:
    """Runs vLLM processes on one model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = str(make(root / "model"))
        self.text = ""
        """What the last process printed."""
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
        self, phases: list[dict[str, Any]], python: str = sys.executable, **job: Any
    ) -> list[dict[str, Any]]:
        self._count += 1
        result = self.root / f"result-{self._count}.json"
        log = self.root / f"log-{self._count}.txt"
        job = {"model": self.model} | job
        job |= {"directory": str(self.root), "phases": phases, "result": str(result)}
        environment = os.environ | ENVIRONMENT
        environment["PATH"] = f"{Path(python).parent}:{environment['PATH']}"
        with open(log, "wb") as file:
            done = subprocess.run(
                [python, str(HERE / "vllm_process.py")], input=json.dumps(job).encode(),
                stdout=file, stderr=file, env=environment, timeout=PROCESS_TIMEOUT_S, check=False,
            )  # fmt: skip
        self.text = log.read_text(errors="replace")
        assert done.returncode == 0 and result.exists(), self.text[-6000:]
        out: list[dict[str, Any]] = json.loads(result.read_text())
        return out


PROMPTS = [prompt(n, 1) for n in LENGTHS]
TAILS = [prompt(1000, 1)[:cut] + prompt(70, 2) for cut in (BLOCK, 5 * BLOCK, 700)]
TURN = [prompt(100, 4)]


def loaded(phase: dict[str, Any]) -> float:
    return float(phase["counters"].get("ucm_verified_loaded_tokens", 0))


def external(phase: dict[str, Any]) -> float:
    return float(phase["counters"].get("vllm:external_prefix_cache_hits", 0))
