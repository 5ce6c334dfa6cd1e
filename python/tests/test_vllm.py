"""Real vLLM with the connector and the real engine: output is token for token the same.

Every process is a new vLLM; what it prints is kept beside its result and shown when it fails.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from bench import (
    AMX,
    BLOCK,
    ON_GPU,
    OTHER,
    PROMPTS,
    TAILS,
    TURN,
    Bench,
    external,
    first_tokens,
    loadable,
    loaded,
    prompt,
    same,
)

LONG = [prompt(1500, 20 + i) for i in range(12)]
SIDES = ("scheduler_seconds", "worker_seconds")

EQUAL_SHARE = 0.9 if ON_GPU else 1
"""Of how many positions the two best tokens have to be the same: rounding decides between close ones."""

SCARCE_TOKENS = 2208
"""Tokens in a KV space that is too small for the requests in it."""

RUNNER_1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""On a GPU: drafts from n-grams are not known to runner V2."""

ONE_GPU = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="there is one GPU")


def equal_share(got: list[list[Any]], want: list[list[Any]]) -> float:
    """Of how many positions of prompts the best tokens are the same."""
    pairs = [pair for both in zip(got, want, strict=True) for pair in zip(*both, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


@pytest.mark.parametrize("layerwise", [False, True])
def test_saved_and_loaded_by_another_process(
    bench: Bench, plain: list[dict[str, Any]], layerwise: bool
) -> None:
    """(b) (c) (d) (f) (h): the first run, a new process that loads all, partial hits, a chat. And, printed
    alone, the time that twelve long prompts take to their first token, computed and loaded."""
    config = bench.config(f"kv-{layerwise}", use_layerwise=layerwise)
    first = bench.run([{"prompts": PROMPTS}, {"prompts": TURN, "chat": 4, "reset": True}], config=config)
    assert same(first[0]["outputs"], plain[0])
    assert same(first[1]["outputs"], plain[2])
    assert loaded(first[0]) == 0
    phases = [
        {"prompts": PROMPTS},
        {"prompts": TAILS, "reset": True},
        {"prompts": TURN, "chat": 4, "reset": True},
        {"prompts": PROMPTS[4:7], "prompt_logprobs": 2, "logprobs": 2, "tokens": 4, "reset": True},
        {"prompts": PROMPTS[4:7], "prompt_logprobs": 2, "logprobs": 2, "tokens": 4},
        {"prompts": LONG, "tokens": 1},
        {"prompts": LONG, "tokens": 1, "reset": True},
    ]
    second = bench.run(phases, config=config)
    assert all(same(phase["outputs"], want) for phase, want in zip(second[:4], plain, strict=True))
    assert loaded(second[0]) == external(second[0]) == loadable(PROMPTS)
    shared = [cut // BLOCK * BLOCK for cut in (BLOCK, 5 * BLOCK, 700)]
    # What a step loads layer by layer the other requests of that step find in vLLM's own cache already.
    assert loaded(second[1]) >= (max(shared) if layerwise else sum(shared))
    # Of the chat's last prompt all but the newest turn is there, answers included.
    assert loaded(second[2]) >= 3 * BLOCK
    for phase in second[3:5]:
        assert same(phase["outputs"], plain[3])
        assert equal_share(phase["prompt_logprobs"], plain[3]["prompt_logprobs"]) >= EQUAL_SHARE
    assert same(second[6]["outputs"], second[5])
    assert loaded(second[6]) >= loadable(LONG)
    for phase, what in zip(second[5:], ("computed", "loaded"), strict=True):
        counted = {name: phase["counters"].get(f"ucm_{name}", 0) for name in ("steps", *SIDES)}
        own = ", ".join(
            f"{name} {1e6 * counted[name] / len(LONG):.0f} us a request, "
            f"{1e6 * counted[name] / max(1, counted['steps']):.0f} us a step"
            for name in SIDES
        )
        print(f"12 x 1500 tokens, layer by layer {layerwise}: {what} in {phase['seconds']:.2f} s; {own}")


def test_chunked_and_preempted(bench: Bench) -> None:
    """(e) (g): prompts in chunks, in a KV space so small that requests are preempted and resumed."""
    engine = {
        "max_num_batched_tokens": 192, "enable_chunked_prefill": True, "max_model_len": 2048,
        "num_gpu_blocks_override": SCARCE_TOKENS // BLOCK + 1,
    }  # fmt: skip
    many = [prompt(400 + 37 * i, 6) for i in range(6)]
    phases = [{"prompts": many, "tokens": 200}, {"prompts": many, "tokens": 200, "reset": True}]
    reference = bench.run(phases[:1], engine=engine)
    stored = bench.run(phases, engine=engine, config=bench.config("kv-small"))
    assert reference[0]["counters"].get("vllm:num_preemptions", 0) > 0
    for phase in stored:
        assert same(phase["outputs"], reference[0])
    assert loaded(stored[1]) >= loadable(many)


def test_damaged_bytes_are_seen(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """These tests can fail: with the checksum off, damaged bytes change the output. (With it they do not: see
    the test of storage that fails under a running server.)"""
    config = bench.config("kv-damaged", store_pipeline="Posix", checksum="off")
    damaged = {"prompts": PROMPTS, "reset": True, "damage": str(bench.root / "kv-damaged")}
    first, second = bench.run([{"prompts": PROMPTS}, damaged], config=config)
    assert same(first["outputs"], plain[0])
    assert not same(second["outputs"], plain[0])


def test_speculative_decoding_after_a_blocking_handoff(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """``handoff: blocking``: what an answered prompt announces is there though its server dies with
    the answer. Drafts from n-grams change nothing of what is saved, loaded or answered."""
    engine = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
    config = bench.config("kv-blocking", handoff="blocking", save_wait_ms=60000)
    long = [one for one in PROMPTS if len(one) > BLOCK]
    first = bench.run(
        [{"prompts": long, "tokens": 1, "hasty": True}], RUNNER_1, config=config, engine=engine, dies=True
    )
    assert same(first[0]["outputs"], first_tokens(plain[0], [len(one) > BLOCK for one in PROMPTS]))
    second = bench.run(
        [{"prompts": PROMPTS}, {"prompts": PROMPTS, "reset": True}], RUNNER_1, config=config, engine=engine
    )
    assert loaded(second[0]) == loadable(long)
    assert all(same(phase["outputs"], plain[0]) for phase in second)
    assert second[0]["counters"].get("vllm:spec_decode_num_draft_tokens", 0) > 0


def test_shutdown_flushes(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """A server that is shut down right after its last answer has saved everything that the next one loads."""
    config = bench.config("kv-shutdown")
    bench.run([{"prompts": PROMPTS, "hasty": True}], config=config, stops=True)
    phase = bench.run([{"prompts": PROMPTS}], config=config)[0]
    assert same(phase["outputs"], plain[0])
    assert loaded(phase) == loadable(PROMPTS)


@ONE_GPU
def test_two_ranks(bench: Bench) -> None:
    """Tensor parallelism of 2 against plain vLLM with the same: its tokens differ from those of one rank.
    Saved and loaded in whole blocks; loaded layer by layer by another server, which saves more so."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    more = [prompt(one, 7) for one in (BLOCK + 1, 300, 900)]
    reference = bench.run([{"prompts": PROMPTS}, {"prompts": more}], engine=engine)
    config = bench.config("kv-ranks", store_pipeline="Posix")
    whole = bench.run(
        [{"prompts": PROMPTS}, {"prompts": PROMPTS, "reset": True}], engine=engine, config=config
    )
    assert all(same(phase["outputs"], reference[0]) for phase in whole)
    assert loaded(whole[1]) == external(whole[1]) == loadable(PROMPTS)
    config = bench.config("kv-ranks", use_layerwise=True)
    phases = [{"prompts": PROMPTS}, {"prompts": more}, {"prompts": more, "reset": True}]
    layers = bench.run(phases, engine=engine, config=config)
    wanted = [*reference, reference[1]]
    assert all(same(phase["outputs"], want) for phase, want in zip(layers, wanted, strict=True))
    assert loaded(layers[0]) == loadable(PROMPTS)
    assert loaded(layers[2]) == loadable(more)
    assert layers[0]["counters"]["ucm_holds"] > 0


@ONE_GPU
def test_two_stages(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """Two pipeline stages, each with half of the layers: the first run, and a new process that loads all,
    layer by layer."""
    engine = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    for layerwise in (False, True):
        config = bench.config("kv-stages", use_layerwise=layerwise)
        phase = bench.run([{"prompts": PROMPTS}], engine=engine, config=config)[0]
        assert same(phase["outputs"], plain[0])
        assert loaded(phase) == layerwise * loadable(PROMPTS)
        assert phase["counters"]["ucm_queried_tokens"] > 0  # the scheduler's counters arrive too
    assert phase["counters"]["ucm_holds"] > 0


@pytest.mark.skipif(not OTHER, reason="UCM_TEST_OTHER_PYTHON names no other vLLM")
@pytest.mark.skipif(AMX, reason="the byte order of AMX kernels is private: no other version reads it")
def test_another_version_saved_it(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """A vLLM of another version, with another byte order, saves; this one converts and loads."""
    config = bench.config("kv-versions")
    bench.run([{"prompts": PROMPTS}], python=OTHER, config=config)
    phase = bench.run([{"prompts": PROMPTS}], config=config)[0]
    assert same(phase["outputs"], plain[0])
    assert loaded(phase) == loadable(PROMPTS)
    print(f"converted {phase['counters'].get('ucm_converted_blocks', 0):.0f} blocks")
