"""Real vLLM with a hybrid model, of layers with full attention and layers with a sliding window: several KV
cache groups, whose blocks are given back when they leave the window. Output is token for token the same.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from bench import AMX, BLOCK, OTHER, PROMPTS, TAILS, TURN, Bench, external, loadable, loaded, prompt
from tiny_model import make

from ucm.integration.vllm.metadata import CAN_FAIL_REQUESTS

if not CAN_FAIL_REQUESTS:
    pytest.skip("this vLLM takes no load failures by request", allow_module_level=True)

WINDOW = 3 * BLOCK
GROUPS = 4
"""Of four layers one has full attention; each other one is a group by itself."""

PHASES: list[dict[str, Any]] = [
    {"prompts": PROMPTS},
    {"prompts": TAILS, "reset": True},
    {"prompts": TURN, "chat": 4, "reset": True},
]


@pytest.fixture(scope="module")
def hybrid(bench: Bench) -> str:
    return str(make(bench.root / "hybrid", window=WINDOW))


@pytest.fixture(scope="module")
def alone(bench: Bench, hybrid: str) -> list[dict[str, Any]]:
    """vLLM without a connector."""
    return bench.run(PHASES, model=hybrid)


def outputs(phases: list[dict[str, Any]]) -> list[Any]:
    return [phase["outputs"] for phase in phases]


def test_groups_are_loaded_by_another_process(bench: Bench, hybrid: str, alone: list[dict[str, Any]]) -> None:
    """The first run, a server with one group for all layers, and a new process with several: each is right
    and loads what the one before has saved. Then blocks are damaged: they are computed."""
    config = bench.config("kv-hybrid")
    first = bench.run([PHASES[0], PHASES[2]], model=hybrid, config=config)
    assert f"KV cache groups: {GROUPS}" in bench.text
    assert outputs(first) == [alone[0]["outputs"], alone[2]["outputs"]]
    assert loaded(first[0]) == 0

    flat = {"disable_hybrid_kv_cache_manager": True}
    one = bench.run(PHASES[:1], model=hybrid, config=config, engine=flat)
    assert "KV cache groups: 1" in bench.text
    assert outputs(one) == outputs(alone[:1])
    assert loaded(one[0]) == external(one[0]) == loadable(PROMPTS)

    damaged = {"prompts": PROMPTS, "reset": True, "damage": str(bench.root / "kv-hybrid")}
    config = bench.config("kv-hybrid", store_pipeline="Posix")  # keeps no copy in memory
    second = bench.run([*PHASES, damaged], model=hybrid, config=config)
    assert outputs(second) == [*outputs(alone), alone[0]["outputs"]]
    assert loaded(second[0]) == external(second[0]) == loadable(PROMPTS)
    assert loaded(second[1]) >= 5 * BLOCK
    assert loaded(second[2]) >= 3 * BLOCK
    assert second[3]["counters"].get("ucm_load_failed_blocks", 0) > 0


@pytest.mark.skipif(not OTHER, reason="UCM_TEST_OTHER_PYTHON names no other vLLM")
@pytest.mark.skipif(AMX, reason="the byte order of AMX kernels is private: no other version reads it")
def test_another_version_saved_it_without_groups(
    bench: Bench, hybrid: str, alone: list[dict[str, Any]]
) -> None:
    """A vLLM that keeps all layers alike, with another byte order, saves; this one converts, and loads of
    each group what it needs."""
    config = bench.config("kv-hybrid-versions")
    bench.run(PHASES[:1], python=OTHER, model=hybrid, config=config)
    phase = bench.run(PHASES[:1], model=hybrid, config=config)[0]
    assert phase["outputs"] == alone[0]["outputs"]
    assert loaded(phase) == loadable(PROMPTS)
    assert phase["counters"]["ucm_converted_blocks"] == loadable(PROMPTS) // BLOCK


def test_chunks_and_preemption_with_groups(bench: Bench, hybrid: str) -> None:
    """Prompts in chunks longer than the window, in a KV space so small that requests are preempted."""
    engine = {"max_num_batched_tokens": 192, "enable_chunked_prefill": True, "num_gpu_blocks_override": 130}
    engine["max_model_len"] = 2048
    many = [prompt(400 + 37 * i, 6) for i in range(6)]
    phases = [{"prompts": many, "tokens": 200}, {"prompts": many, "tokens": 200, "reset": True}]
    reference = bench.run(phases[:1], model=hybrid, engine=engine)
    config = bench.config("kv-hybrid-small", use_layerwise=True)
    stored = bench.run(phases, model=hybrid, engine=engine, config=config)
    assert reference[0]["counters"].get("vllm:num_preemptions", 0) > 0
    assert outputs(stored) == 2 * outputs(reference)
    assert loaded(stored[1]) >= loadable(many)
