"""``vllm serve`` with the connector, over HTTP: started as the documentation says, killed, and with storage
that fails under it. Whatever happens to the storage, every answer is HTTP 200 and right.
"""

from __future__ import annotations

import random
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from bench import BLOCK, ENVIRONMENT, HERE, ON_GPU, PROMPTS, SERVER_FLAGS, Bench, loadable, prompt, same
from servers import Server
from vllm_process import damage

EXAMPLE = HERE.parent.parent / "examples" / "ucm_config_example.yaml"

LOADED = "ucm_verified_loaded_tokens_total"
FAILED = "ucm_load_failed_blocks_total"
SAVE_FAILED = "ucm_save_failed_blocks_total"

SEGMENT_MB = 1
FRESH_TOKENS = 300
"""Of a prompt; four of them fill more than one segment."""

ECHOED = "A block of keys and values is saved once and loaded often. " * 9

CLIENTS = 200
KILL_AFTER = 60
"""Answers, of any server."""


def server(bench: Bench, name: str, yaml_file: Path, *more: str, **environment: str) -> Server:
    return Server(
        bench.model, bench.root / f"{name}.log", ENVIRONMENT | environment, yaml_file,
        "--no-enable-prefix-caching", *SERVER_FLAGS, *more,
    )  # fmt: skip


def only(reference: dict[str, Any], number: int) -> dict[str, Any]:
    """One request of a reference."""
    return {key: [reference[key][number]] for key in ("outputs", "gaps") if key in reference}


def logprobs(one: Server, text: str) -> Any:
    answer = one.ask(text, 4, echo=True, logprobs=2)
    return answer["choices"][0]["logprobs"]["tokens"], answer["choices"][0]["text"]


def test_command_of_the_documentation(bench: Bench, plain: list[dict[str, Any]]) -> None:
    """The documented command with the example file: saved, stopped, and loaded by a new server."""
    text = EXAMPLE.read_text()
    assert "/mnt/test1" in text
    small = text.replace("/mnt/test1", str(bench.root / "kv-serve")).replace(
        "capacity_gb: 32", "capacity_gb: 0.25"
    )
    yaml_file = bench.root / "example.yaml"
    yaml_file.write_text(small)
    seen = []
    for turn in range(2):
        with server(bench, f"serve-{turn}", yaml_file).wait() as one:
            assert same(one.many(PROMPTS, 24), plain[0])
            # Twice: the second one finds in the store what the first has put there.
            seen += [logprobs(one, ECHOED), logprobs(one, ECHOED)]
            if turn == 0:
                assert one.settle("ucm_saved_blocks_total", loadable(PROMPTS) // BLOCK) > 0
                assert one.metrics()[LOADED] == 0
            else:
                assert one.settle(LOADED, loadable(PROMPTS)) >= loadable(PROMPTS)
                assert one.metrics()["vllm:external_prefix_cache_hits_total"] >= loadable(PROMPTS)
                assert one.metrics()["ucm_namespace_info"] == 1
            one.stop()
            assert "hit external" in one.text()
            assert "kv_load_failure_policy is set to recompute" in one.text()
    if not ON_GPU:  # where rounding may change what is said after the echo
        assert all(one == seen[0] for one in seen)


@pytest.fixture(scope="module")
def fault_library(bench: Bench) -> Path:
    made = bench.root / "faulty_files.so"
    source = HERE / "tools" / "faulty_files.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


def test_storage_fails_under_a_running_server(
    bench: Bench, plain: list[dict[str, Any]], fault_library: Path
) -> None:
    """Reads that fail, reads that take too long, no storage at all, a full disk, damaged segments, a
    directory in which nothing can be opened or listed, one that is moved away, a file in its place."""
    directory, switch = bench.root / "kv-faults", bench.root / "fault"
    switch.write_text("none")
    yaml_file = bench.file(
        "kv-faults", store_pipeline="Posix", io_engine="psync", timeout_ms=5000, segment_size_mb=SEGMENT_MB
    )
    faults = {
        "LD_PRELOAD": str(fault_library), "UCM_FAULT_DIRECTORY": str(directory),
        "UCM_FAULT_SWITCH": str(switch),
    }  # fmt: skip
    want = plain[0]
    with server(bench, "faults", yaml_file, **faults).wait() as one:

        def loaded_again() -> None:
            """Saves what is missing, then loads everything."""
            switch.write_text("none")
            assert same(one.many(PROMPTS, 24), want)
            before = one.settle(LOADED, 0)
            for _ in range(20):
                assert same(one.many(PROMPTS, 24), want)
                if one.settle(LOADED, before + 1) >= before + loadable(PROMPTS):
                    return
                before = one.metrics()[LOADED]
            raise AssertionError("the server does not load any more")

        def failed(step: str) -> None:
            before = one.metrics()[FAILED]
            assert same(one.many(PROMPTS, 24), want), step
            assert one.settle(FAILED, before + 1) > before, step

        loaded_again()
        for fault in ("read-error", "slow-read", "gone"):
            switch.write_text(fault)
            failed(fault)
            loaded_again()

        switch.write_text("disk-full")
        fresh, newer = ([prompt(FRESH_TOKENS, 70 + i + 10 * j) for i in range(4)] for j in range(2))
        answers, others = bench.once("fresh", [{"prompts": ps, "tokens": 8} for ps in (fresh, newer)])
        assert same(one.many(fresh), answers)
        assert one.settle(SAVE_FAILED, 1) > 0
        switch.write_text("none")
        assert same(one.many(fresh), answers)
        loaded_again()

        damage(directory)
        failed("damaged segments")
        loaded_again()

        # What is open already is read; nothing else can be, nor listed; and the next segment cannot be made.
        before = one.metrics()
        directory.chmod(0)
        assert same(one.many(PROMPTS, 24), want)
        assert same(one.many(newer), others)
        assert one.settle(SAVE_FAILED, before[SAVE_FAILED] + 1) > before[SAVE_FAILED]
        assert one.settle(LOADED, before[LOADED] + loadable(PROMPTS)) >= before[LOADED] + loadable(PROMPTS)
        directory.chmod(0o700)
        assert same(one.many(newer), others)
        loaded_again()

        # Last: what a server saves after its directory was moved goes where nobody looks.
        directory.rename(directory.with_name("kv-away"))
        for _ in range(3):
            assert same(one.many(PROMPTS, 24), want)
            assert same(one.many(fresh), answers)
            directory.touch()  # a file in its place
        one.stop()


def test_other_server_is_killed(bench: Bench) -> None:
    """200 concurrent requests with shared prefixes on two servers of one directory, one of them killed."""
    rng = random.Random(5)
    shared = [prompt(length, 80) for length in (64, 160, 400)]
    prompts = [
        rng.choice(shared)[: rng.randrange(1, 400)] + prompt(rng.randrange(1, 90), i) for i in range(CLIENTS)
    ]
    want = bench.run([{"prompts": prompts, "tokens": 8}])[0]
    yaml_file = bench.file("kv-two")
    with server(bench, "stays", yaml_file) as stays, server(bench, "dies", yaml_file) as dies:
        for one in (stays, dies):
            one.wait()
        with ThreadPoolExecutor(CLIENTS) as pool:
            lost = 0
            asked = {pool.submit((stays, dies)[i % 2].tokens, one): i for i, one in enumerate(prompts)}
            for count, done in enumerate(as_completed(asked)):
                if count == KILL_AFTER:
                    dies.kill()
                number = asked[done]
                if number % 2 and done.exception() is not None:
                    lost += 1
                else:
                    assert same([done.result()], only(want, number)), number
        assert lost, "the server was killed after its last answer: the test shows nothing"
        assert same(stays.many(prompts), want)
        assert stays.settle(LOADED, 1) > 0
        stays.stop()
