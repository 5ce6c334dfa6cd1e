"""One vLLM process: reads a job from standard input, writes results as JSON to the path in it.

A job has ``engine`` (arguments of ``LLM``), ``config`` (the UCM YAML as a mapping; absent: plain vLLM)
and ``phases``: each a list of prompts, and what happens before it. Kept apart from pytest, so that a
process is what a user would start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def engine(job: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    arguments = {
        "model": job["model"], "dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 8,
        "max_num_batched_tokens": 4096, "enforce_eager": True, "block_size": 32,
        "disable_log_stats": False, "seed": 0,
    } | job.get("engine", {})  # fmt: skip
    if "config" in job:
        path = Path(job["directory"]) / f"ucm-{time.time_ns()}.yaml"
        path.write_text(json.dumps(job["config"]))
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="UCMConnector",
            kv_role=job.get("role", "kv_both"),
            kv_connector_module_path="ucm.integration.vllm.ucm_connector",
            kv_connector_extra_config={"UCM_CONFIG_FILE": str(path)},
        )
    return LLM(**arguments)


def counters(llm: Any) -> dict[str, float]:
    """All counters that vLLM publishes, the connector's among them, summed over labels."""
    from prometheus_client import REGISTRY

    out: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for one in metric.samples if metric.type == "counter" else ():
            if one.name.endswith("_total"):
                name = one.name.removesuffix("_total")
                out[name] = out.get(name, 0) + one.value
    return out


def reset(llm: Any) -> None:
    """Empties vLLM's own prefix cache; a step is needed first, to release what is held."""
    from vllm import SamplingParams

    for _ in range(50):
        llm.generate([{"prompt_token_ids": [1, 2]}], SamplingParams(max_tokens=2), use_tqdm=False)
        if llm.reset_prefix_cache():
            return
        time.sleep(0.1)
    raise RuntimeError("the prefix cache cannot be reset: blocks are still held")


def run(llm: Any, phase: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    if phase.get("reset"):
        reset(llm)
    if phase.get("damage"):
        damage(Path(phase["damage"]))
    before = counters(llm)
    prompts = [{"prompt_token_ids": prompt} for prompt in phase["prompts"]]
    params = SamplingParams(
        temperature=0, max_tokens=phase.get("tokens", 24), ignore_eos=True,
        logprobs=phase.get("logprobs"), prompt_logprobs=phase.get("prompt_logprobs"),
    )  # fmt: skip
    started = time.perf_counter()
    outputs: list[list[int]] = []
    if phase.get("chat"):
        outputs = [chat(llm, params, prompt, phase["chat"]) for prompt in phase["prompts"]]
    else:
        done = llm.generate(prompts, params, use_tqdm=False)
        outputs = [list(one.outputs[0].token_ids) for one in done]
    took = time.perf_counter() - started
    if not phase.get("hasty"):
        time.sleep(0.5)  # saves and their statistics settle
    after = counters(llm)
    result = {"outputs": outputs, "seconds": took}
    result["counters"] = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
    if phase.get("prompt_logprobs") is not None:
        result["prompt_logprobs"] = [
            [sorted(entry) if entry else [] for entry in one.prompt_logprobs] for one in done
        ]
    return result


def chat(llm: Any, params: Any, prompt: list[int], turns: int) -> list[int]:
    """Several turns, each with everything before it as its prompt."""
    history = list(prompt)
    for turn in range(turns):
        done = llm.generate([{"prompt_token_ids": history}], params, use_tqdm=False)
        history += [*done[0].outputs[0].token_ids, *range(100 + turn, 140 + turn)]
    return history


def damage(directory: Path) -> None:
    """Swaps halves of pages in all segment files: finite numbers, in the wrong place."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 18:
            data = bytearray(path.read_bytes())
            for page in range(8192, len(data) - 4096, 4096):
                data[page : page + 2048], data[page + 2048 : page + 4096] = (
                    data[page + 2048 : page + 4096],
                    data[page : page + 2048],
                )
            with open(path, "r+b") as file:
                file.write(data)


def main() -> None:
    job = json.load(sys.stdin)
    llm = engine(job)
    results = [run(llm, phase) for phase in job["phases"]]
    Path(job["result"]).write_text(json.dumps(results))
    if job.get("dies"):
        os._exit(0)  # nothing is flushed or shut down
    if job.get("stops"):
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
