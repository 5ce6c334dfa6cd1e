"""What only a GPU has: attention backends, runners, CUDA graphs, an engine at work while they are captured.

``run.sh gpu`` runs this, and ``test_vllm.py`` and ``test_serve.py`` on the same GPU.
"""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

pytest.importorskip("vllm")

from bench import (
    BLOCK,
    HERE,
    ON_GPU,
    PROMPTS,
    TAILS,
    TURN,
    Bench,
    external,
    loadable,
    loaded,
    prompt,
    same,
    ties,
)

pytestmark = pytest.mark.skipif(not ON_GPU, reason="UCM_TEST_DEVICE is not cuda")

BACKENDS = ("FLASH_ATTN", "FLASHINFER")
RUNNERS = (1, 2)

ORDERS = {
    ("FLASH_ATTN", "NHD"): "nhd-packed",
    ("FLASH_ATTN", "HND"): "hnd-packed",
    ("FLASHINFER", "NHD"): "nhd-packed",
    ("FLASHINFER", "HND"): "hnd-packed-k64",
}
"""The byte order of a backend and a layout; FlashInfer splits blocks of 128 tokens."""


def environment(backend: str, runner: int, **more: str) -> dict[str, str]:
    # FlashInfer does not promise that a prompt's tokens are independent of what else is in a step.
    invariant = str(int(backend == "FLASH_ATTN"))
    return {"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1), "VLLM_BATCH_INVARIANT": invariant, **more}


def engine(backend: str) -> dict[str, Any]:
    return {"attention_config": {"backend": backend}}


PHASES = [
    {"prompts": PROMPTS},
    {"prompts": TAILS, "reset": True},
    {"prompts": TURN, "tokens": 100, "reset": True},
]


def reference(bench: Bench, backend: str, runner: int) -> list[dict[str, Any]]:
    """What vLLM answers without a connector."""
    return bench.once(f"{backend}-{runner}", PHASES, environment(backend, runner), engine=engine(backend))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_runners_and_graphs(bench: Bench, backend: str, runner: int, layerwise: bool) -> None:
    """Saved under CUDA graphs with asynchronous scheduling; a new process loads all of it."""
    plain = reference(bench, backend, runner)
    config = bench.config(f"kv-{backend}-{runner}-{layerwise}", use_layerwise=layerwise)
    job = {"config": config, "engine": engine(backend), "counted": runner == 2, "digests": True}
    around = environment(backend, runner)
    first = bench.run(PHASES, around, **job)
    second = bench.run(PHASES, around, **job)
    facts = second[-1]["facts"]
    print(f"\n{backend} runner {runner} layerwise {layerwise}: {facts}")
    assert facts["asynchronous"] and facts["runner"] == runner
    # Layers can only be told of where whole graphs do not hide them.
    assert facts["graphs"] == ("PIECEWISE" if layerwise else "FULL_AND_PIECEWISE")
    assert facts["order"] == ORDERS[backend, "NHD"]
    if runner == 2:
        assert facts["replays"].get("run_pw_graph", 0) > 0
        assert (facts["replays"].get("run_fullgraph", 0) > 0) == (not layerwise)
    for run in (first, second):
        for phase, want in zip(run, plain, strict=True):
            print(f"parted at ties: {ties(phase['outputs'], want)} of {len(want['outputs'])}")
            assert same(phase["outputs"], want)
    saved, read = first[0]["digests"]["saved"], second[0]["digests"]["loaded"]
    assert len(read) == loadable(PROMPTS) // BLOCK
    assert read == {name: saved[name] for name in read}
    assert loaded(first[0]) == 0
    assert loaded(second[0]) == external(second[0]) == loadable(PROMPTS)
    assert loaded(second[2]) >= 3 * BLOCK


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_first(bench: Bench, backend: str) -> None:
    """Pages with the heads outside: another order, saved and loaded as well."""
    around = environment(backend, 2, VLLM_KV_CACHE_LAYOUT="HND")
    config = bench.config(f"kv-hnd-{backend}")
    first = bench.run([{"prompts": PROMPTS}], around, config=config, engine=engine(backend))[0]
    second = bench.run([{"prompts": PROMPTS}], around, config=config, engine=engine(backend))[0]
    assert second["facts"]["order"] == ORDERS[backend, "HND"]
    assert same(second["outputs"], first)
    assert loaded(second) == loadable(PROMPTS)


def test_other_orders_are_converted_on_the_device(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """Saved heads first, loaded tokens first, and the other way round."""
    heads = {"VLLM_KV_CACHE_LAYOUT": "HND"}
    for name, saver, loader in (("to-nhd", heads, {}), ("to-hnd", {}, heads)):
        config = bench.config(f"kv-{name}")
        bench.run([{"prompts": PROMPTS}], saver, config=config)
        phase = bench.run([{"prompts": PROMPTS}], loader, config=config)[0]
        assert same(phase["outputs"], plain[0])
        assert loaded(phase) == loadable(PROMPTS)
        assert phase["counters"]["ucm_converted_blocks"] > 0


def test_backend_that_vllm_chooses(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """Without a named backend the namespace is the one of what vLLM chooses: blocks are shared."""
    config = bench.config("kv-chosen")
    bench.run([{"prompts": PROMPTS}], config=config)
    phase = bench.run([{"prompts": PROMPTS}], config=config, engine={"attention_config": {}})[0]
    assert phase["facts"]["order"] == "nhd-packed"
    assert same(phase["outputs"], plain[0])
    assert loaded(phase) == loadable(PROMPTS)


@pytest.mark.parametrize("runner", RUNNERS)
def test_engine_works_while_graphs_are_captured(
    bench: Bench, plain: list[dict[str, Any]], runner: int
) -> None:
    """Another store of the process saves and loads all the time while vLLM starts and captures."""
    config = bench.config(f"kv-capture-{runner}")
    phases = [{"prompts": PROMPTS}, {"prompts": PROMPTS, "reset": True}]
    run = bench.run(
        phases,
        environment("FLASH_ATTN", runner),
        config=config,
        traffic=str(bench.root / f"traffic-{runner}"),
    )
    print(f"\nrounds of traffic: {run[0]['facts']['traffic']}")
    assert run[0]["facts"]["traffic"]["while graphs were captured"] > 0
    assert all(same(phase["outputs"], plain[0]) for phase in run)
    assert loaded(run[1]) == loadable(PROMPTS)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_is_computed_again(bench: Bench, backend: str, layerwise: bool) -> None:
    """Bytes on the drive change: asynchronous loads fail, and the right answer is computed."""
    name = f"kv-damage-{backend}-{layerwise}"
    config = bench.config(name, use_layerwise=layerwise)
    around = environment(backend, 2)
    bench.run([{"prompts": PROMPTS}], around, config=config, engine=engine(backend))
    phases = [{"prompts": PROMPTS, "damage": str(bench.root / name)}, {"prompts": PROMPTS, "reset": True}]
    damaged, again = bench.run(phases, around, config=config, engine=engine(backend))
    want = reference(bench, backend, 2)[0]
    assert same(damaged["outputs"], want)
    assert same(again["outputs"], want)
    assert loaded(damaged) < loadable(PROMPTS)


def test_events_are_not_left(bench: Bench) -> None:
    """Events are counted below the engine: hundreds of steps that save and load leave none behind."""
    library = bench.root / "count_events.so"
    source = HERE / "tools" / "count_events.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    many = [prompt(3 * BLOCK + 1, 40 + i) for i in range(8)]
    phases = [{"prompts": many, "tokens": 4, "reset": True} for _ in range(30)]
    around = {"UCM_CUDA_LIBRARY": str(library)}
    run = bench.run(phases, around, config=bench.config("kv-many"), events=str(library))
    made, alive = zip(*(phase["facts"]["events"] for phase in run), strict=True)
    print(f"\nevents: {made[-1]} made, alive {alive[5]} after 6 rounds, {alive[-1]} after 30")
    assert made[-1] > 0
    assert loaded(run[-1]) == loadable(many)
    assert alive[-1] <= alive[5]


def test_time_to_first_token(bench: Bench) -> None:
    """Prints, asserts nothing but equality: 12 prompts of 1500 tokens, computed and loaded."""
    prompts = [prompt(1500, 20 + i) for i in range(12)]
    phases = [{"prompts": prompts, "tokens": 1}, {"prompts": prompts, "tokens": 1, "reset": True}]
    first, second = bench.run(phases, config=bench.config("kv-time"), timed=True)
    assert same(second["outputs"], first)
    print(f"12 x 1500 tokens: computed {first['seconds']:.2f} s, loaded {second['seconds']:.2f} s")
    print(f"microseconds a call of the connector: {second['facts']['microseconds']}")
