"""Fixtures that several files of tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench import Bench


PRINTED_MAX = 8000
"""Characters of a vLLM process's output that are worth showing."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, None]:
    """A test that fails shows what its last vLLM process counted and printed: where a machine is slow it may
    not fail again."""
    report = (yield).get_result()
    used = getattr(item, "funcargs", {}).get("bench")
    if report.failed and used is not None and used.text:
        report.sections.append(("the last vLLM process", used.text[-PRINTED_MAX:]))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: Any) -> Bench:
    from bench import Bench

    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each process has a folder of its own below the common one.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Bench(tmp_path_factory.mktemp("vllm"), shared)


@pytest.fixture(scope="session")
def plain(bench: Bench) -> list[dict[str, Any]]:
    """(a): vLLM without a connector."""
    from bench import PROMPTS, TAILS, TURN

    phases = [
        {"prompts": PROMPTS},
        {"prompts": TAILS, "reset": True},
        {"prompts": TURN, "chat": 4, "reset": True},
        {"prompts": PROMPTS[4:7], "prompt_logprobs": 2, "logprobs": 2, "tokens": 4, "reset": True},
    ]
    return bench.once("plain", phases)


@pytest.fixture(scope="session")
def model(tmp_path_factory: Any) -> str:
    from tiny_model import make

    return str(make(tmp_path_factory.mktemp("model")))
