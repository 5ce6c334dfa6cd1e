"""One vLLM process: reads a job from standard input, writes results as JSON to the path in it.

A job has ``engine`` (arguments of ``LLM``), ``config`` (the UCM YAML as a mapping; absent: plain vLLM)
and ``phases``: each a list of prompts, and what happens before it. Kept apart from pytest, so that a
process is what a user would start.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import kv_bytes
from gpu_traffic import ROUNDS, traffic


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


def run(llm: Any, phase: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
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
        chats = [chat(llm, params, prompt, phase["chat"]) for prompt in phase["prompts"]]
        outputs, gaps = [one[0] for one in chats], [one[1] for one in chats]
    else:
        done = llm.generate(prompts, params, use_tqdm=False)
        outputs, gaps = [list(one.outputs[0].token_ids) for one in done], [aheads(one) for one in done]
    took = time.perf_counter() - started
    if not phase.get("hasty"):
        time.sleep(0.5)  # saves and their statistics settle
    after = counters(llm)
    result: dict[str, Any] = {"outputs": outputs, "seconds": took, "facts": facts(llm, job)}
    result["counters"] = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
    if phase.get("logprobs"):
        result["gaps"] = gaps
    if job.get("digests"):
        result["digests"] = kv_bytes.take()
    if phase.get("prompt_logprobs") is not None:
        result["prompt_logprobs"] = [
            [sorted(entry) if entry else [] for entry in one.prompt_logprobs] for one in done
        ]
    return result


def aheads(done: Any) -> list[float]:
    """How far the best token of each position is ahead of the next; empty where vLLM was not asked."""
    best = [
        sorted((one.logprob for one in entry.values()), reverse=True)[:2]
        for entry in done.outputs[0].logprobs or ()
    ]
    return [float(first - second) for first, second in best]


def facts(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM made of its arguments."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    config = llm.llm_engine.vllm_config
    found = {
        "graphs": config.compilation_config.cudagraph_mode.name,
        "asynchronous": bool(config.scheduler_config.async_scheduling),
        "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
        "replays": dict(REPLAYS),
        "traffic": dict(ROUNDS),
        "microseconds": {name: round(1e6 * spent / calls, 1) for name, (calls, spent) in SPENT.items()},
    }
    if job.get("events"):
        library = ctypes.CDLL(job["events"])
        names = ("ucm_test_events_made", "ucm_test_events_alive")
        found["events"] = [ctypes.c_long.in_dll(library, name).value for name in names]
    if has_kv_transfer_group():
        found["order"] = get_kv_transfer_group()._namespace.order
    return found


REPLAYS: dict[str, int] = {}
"""How often runner V2 replayed whole graphs and ran pieces."""

SPENT: dict[str, tuple[int, float]] = {}
"""Calls of the connector's methods, and their seconds."""


def count_replays() -> None:
    """Counts what ``REPLAYS`` says."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    for name in ("run_fullgraph", "run_pw_graph"):
        original = getattr(ModelCudaGraphManager, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            REPLAYS[_name] = REPLAYS.get(_name, 0) + 1
            return _original(*args, **more)

        setattr(ModelCudaGraphManager, name, counted)


TIMED = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
    "update_connector_output", "request_finished", "start_load_kv", "wait_for_layer_load", "save_kv_layer",
    "wait_for_save", "get_finished",
)  # fmt: skip


def time_connector() -> None:
    """Measures what ``SPENT`` says."""
    from ucm.integration.vllm.ucm_connector import UCMConnector

    for name in TIMED:
        original = getattr(UCMConnector, name)

        def timed(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            started = time.perf_counter()
            out = _original(*args, **more)
            calls, spent = SPENT.get(_name, (0, 0.0))
            SPENT[_name] = (calls + 1, spent + time.perf_counter() - started)
            return out

        setattr(UCMConnector, name, timed)


def chat(llm: Any, params: Any, prompt: list[int], turns: int) -> tuple[list[int], list[float]]:
    """Several turns, each with everything before it as its prompt; and what ``aheads`` says of its tokens."""
    history, gaps = list(prompt), [math.inf] * len(prompt)
    for turn in range(turns):
        done = llm.generate([{"prompt_token_ids": history}], params, use_tqdm=False)
        said = [*range(100 + turn, 140 + turn)]
        history += [*done[0].outputs[0].token_ids, *said]
        gaps += aheads(done[0]) + [math.inf] * len(said)
    return history, gaps


DAMAGE_BYTES = 64
"""Less than the key or the value of a token and head: whole tokens may change places unseen."""


def damage(directory: Path) -> None:
    """Swaps neighbouring numbers in all segment files: finite ones, in the wrong place."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 18:
            data = bytearray(path.read_bytes())
            for at in range(8192, len(data) - 4096, 2 * DAMAGE_BYTES):
                middle, end = at + DAMAGE_BYTES, at + 2 * DAMAGE_BYTES
                data[at:end] = data[middle:end] + data[at:middle]
            with open(path, "r+b") as file:
                file.write(data)


def main() -> None:
    job = json.load(sys.stdin)
    if job.get("counted"):
        count_replays()
    if job.get("digests"):
        kv_bytes.listen()
    if job.get("timed"):
        time_connector()
    with traffic(job["traffic"]) if job.get("traffic") else contextlib.nullcontext():
        llm = engine(job)
    results = [run(llm, phase, job) for phase in job["phases"]]
    Path(job["result"]).write_text(json.dumps(results))
    if job.get("dies"):
        os._exit(0)  # nothing is flushed or shut down
    if job.get("stops"):
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
