"""``vllm serve`` as a user starts it: a process, its HTTP interface, its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 900
REQUEST_TIMEOUT_S = 600
STOP_TIMEOUT_S = 120
SETTLE_TIMEOUT_S = 60

ENGINE = (
    "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs",
    "16", "--enforce-eager", "--block-size", "32", "--served-model-name", "tiny",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def transfer_config(yaml_file: Path, role: str = "kv_both") -> str:
    """The text of ``--kv-transfer-config``, as the documentation has it."""
    return json.dumps({
        "kv_connector": "UCMConnector", "kv_role": role,
        "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
        "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(yaml_file)},
    })  # fmt: skip


WITHOUT_OVERRIDE = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--")
"""Starts a program that file modes hold for, though root runs it. It drops the two capabilities that set root
above them, so that the kernel itself refuses, wherever in the engine a path is opened or listed."""


class Server:
    """A running ``vllm serve``. ``environment`` is what differs from this process's."""

    def __init__(
        self, model: str, log: Path, environment: dict[str, str], yaml_file: Path | None = None,
        *more: str, python: str = sys.executable,
    ) -> None:  # fmt: skip
        self.port = free_port()
        self.log = log
        program = Path(python).parent / "vllm"
        command = [str(program), "serve", model, *ENGINE, "--port", str(self.port), *more]
        if os.geteuid() == 0:
            command = [*WITHOUT_OVERRIDE, *command]
        if yaml_file is not None:
            command += ["--kv-transfer-config", transfer_config(yaml_file)]
        whole = os.environ | environment
        whole["PATH"] = f"{program.parent}:{whole['PATH']}"
        self._file = open(log, "wb")  # noqa: SIM115
        # A session of its own, so that the engine's processes can be killed with it.
        self._process = subprocess.Popen(
            command, stdout=self._file, stderr=self._file, env=whole, start_new_session=True
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> Server:
        """Until it answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"vllm serve ended:\n{self.text()[-6000:]}"
            try:
                self._get("/health")
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(f"vllm serve does not answer:\n{self.text()[-6000:]}")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def ask(self, prompt: list[int] | str, tokens: int = 8, **options: Any) -> dict[str, Any]:
        """A completion; any HTTP status but 200 is an exception."""
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **options,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            assert answer.status == 200
            out: dict[str, Any] = json.loads(answer.read())
            return out

    def tokens(self, prompt: list[int], tokens: int = 8) -> list[int]:
        """The tokens of an answer."""
        return list(self.ask(prompt, tokens)["choices"][0]["token_ids"])

    def many(self, prompts: list[list[int]], tokens: int = 8, threads: int = 16) -> list[list[int]]:
        """All at once."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda one: self.tokens(one, tokens), prompts))

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` says, summed over labels."""
        out: dict[str, float] = defaultdict(float)
        for line in self._get("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                out[name.partition("{")[0]] += float(value)
        return out

    def settle(self, name: str, least: float) -> float:
        """Waits until a counter is at least this. Statistics come with steps that compute: asks for some."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while (value := self.metrics()[name]) < least and time.monotonic() < deadline:
            self.tokens([3, 4], 2)
            time.sleep(0.2)
        return value

    def stop(self) -> None:
        """As an operator stops it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """kill -9, of all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._file.close()
