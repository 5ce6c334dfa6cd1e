#!/usr/bin/env python3
"""Checks prefill/decode disaggregation with real vLLM servers and the real proxy, on the CPU.

    python check.py MODEL [--pairs 1|2] [--proxy ucm-proxy] [--bench]

Run it with the Python that has vLLM and UCM; MODEL is a small model with real weights
(``python/tests/tiny_model.py`` makes one). It starts, one after the other, a plain server for the
expected outputs, then prefill and decode servers with UCM and the proxy, and checks:

- a prompt shorter than a block is answered, and waits for nothing;
- unique prompts of 2 to 30 blocks give, at temperature 0, token for token the plain server's
  output, with decode's own prefix cache off;
- decode computed at most (n - 1) mod 128 + 1 tokens of each prompt of n tokens, and the connector
  loaded and verified the rest;
- streams give the same text;
- a prefill server killed in the middle costs nobody an answer, nor does, with two pairs, a decode
  server.

It prints one line a check and ends with status 1 if one failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

BLOCK = 128
LENGTHS = (2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1, 5 * BLOCK + 17, 8 * BLOCK, 16 * BLOCK + 64, 30 * BLOCK + 5)
OUTPUT_TOKENS = 16
START_TIMEOUT_S = 900
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 500
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

failures: list[str] = []


def check(what: str, holds: bool, detail: object = "") -> None:
    """One line of the result."""
    print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}", flush=True)
    if not holds:
        failures.append(what)


def post(port: int, path: str, body: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://localhost:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def complete(port: int, prompt: list[int] | str) -> str:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    text: str = post(port, "/v1/completions", body)["choices"][0]["text"]
    return text


def stream(port: int, prompt: list[int]) -> str:
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    pieces = []
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                pieces.append(json.loads(data)["choices"][0]["text"])
    return "".join(pieces)


def counter(port: int, name: str, labels: str = "") -> float:
    """A counter of a server, summed over the label sets that contain ``labels``."""
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    total = 0.0
    for line in lines:
        sample = line.split("{")[0].split(" ")[0].removeprefix("vllm:").removesuffix("_total")
        if not line.startswith("#") and sample == name and labels in line:
            total += float(line.rsplit(" ", 1)[1])
    return total


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed * 100_003 + length)
    return [rng.randrange(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(length)]


class Setup:
    """Processes of one run, with their logs in one directory."""

    def __init__(self, model: Path, proxy: str, directory: Path) -> None:
        self.model, self.proxy_program, self.directory = model, proxy, directory
        store = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(directory / "storage"),
            "cache_buffer_capacity_gb": 0.25,
            "segment_size_mb": 16,
        }
        connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        self.config = directory / "ucm.yaml"
        self.config.write_text(json.dumps({"ucm_connectors": [connector]}))

    @contextmanager
    def process(self, name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        log = self.directory / f"{name}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=ENVIRONMENT | os.environ, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def server(self, name: str, port: int, role: str | None, *more: str) -> Any:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model),
            "--served-model-name", "tiny", "--port", str(port), "--block-size", str(BLOCK),
            "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-batched-tokens", "4096",
            "--max-num-seqs", "8", "--seed", "0", *more,
        ]  # fmt: skip
        if role:
            transfer = {
                "kv_connector": "UCMConnector",
                "kv_role": role,
                "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
                "kv_connector_extra_config": {"UCM_CONFIG_FILE": str(self.config)},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        return self.process(name, command)

    def proxy(self, port: int, prefill: list[int], decode: list[int]) -> Any:
        ports = [*map(str, prefill)], [*map(str, decode)]
        hosts = ["localhost"] * len(prefill)
        command = [
            self.proxy_program, "--host", "localhost", "--port", str(port),
            "--access-log", str(self.directory / "access.log"),
            "--prefiller-hosts", *hosts, "--prefiller-port", *ports[0],
            "--decoder-hosts", *hosts, "--decoder-ports", *ports[1],
        ]  # fmt: skip
        return self.process("proxy", command)

    def ready(self, *waiting: tuple[str, int, subprocess.Popen[bytes]]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for name, port, process in waiting:
            while True:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                    break
                except (OSError, urllib.error.URLError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        end = (self.directory / f"{name}.log").read_text(errors="replace")[-4000:]
                        sys.exit(f"{name} did not start:\n{end}")
                    time.sleep(1)


def compare(pairs: int, expected: dict[int, str], seed: int) -> None:
    """The checks while all servers live."""
    decode = [7821 + 2 * pair for pair in range(pairs)]
    started = time.monotonic()
    text = complete(7805, "What date is today?")
    seconds = time.monotonic() - started
    check("a prompt shorter than a block", text == expected[0], f"{seconds:.2f} s")
    for length in LENGTHS:
        before = [measures(port) for port in decode]
        text = complete(7805, prompt(length, seed))
        check(f"{length} tokens: output of the plain server", text == expected[length])
        after = [measures(port) for port in decode]
        computed, loaded = (
            sum(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in range(2)
        )
        limit = (length - 1) % BLOCK + 1
        check(f"{length} tokens: decode computed at most {limit}", computed <= limit, computed)
        check(f"{length} tokens: decode loaded the rest", loaded == length - computed, loaded)


def measures(port: int) -> tuple[float, float]:
    time.sleep(1.2)  # a server publishes a finished step's counters with its next log interval
    computed = counter(port, "prompt_tokens_by_source", 'source="local_compute"')
    return computed, counter(port, "ucm_verified_loaded_tokens")


def kill_one(name: str, process: subprocess.Popen[bytes], expected: dict[int, str], seed: int) -> None:
    """Half-way through a round of requests one server dies; every answer is right."""
    lengths = [*LENGTHS[:4], *LENGTHS[:4]]
    with concurrent.futures.ThreadPoolExecutor(len(lengths)) as pool:
        answers = [pool.submit(complete, 7805, prompt(length, seed)) for length in lengths]
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
        texts = [answer.result() for answer in answers]
    right = [text == expected[length] for text, length in zip(texts, lengths, strict=True)]
    check(f"{name} killed in the middle: all answers right", all(right), f"{sum(right)} of {len(right)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=1, choices=(1, 2))
    parser.add_argument("--proxy", default=os.environ.get("UCM_PROXY", "ucm-proxy"))
    parser.add_argument("--bench", action="store_true", help="also run `vllm bench serve`")
    parser.add_argument(
        "--compile-prefill",
        action="store_true",
        help="prefill servers without --enforce-eager: compiles for minutes, needs a C++ compiler",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="ucm-pd-"))
    print(f"logs in {directory}")
    setup = Setup(options.model.resolve(), options.proxy, directory)
    with setup.server("plain", 7810, None, "--no-enable-prefix-caching", "--enforce-eager") as plain:
        setup.ready(("plain", 7810, plain))
        expected = {length: complete(7810, prompt(length, options.seed)) for length in LENGTHS}
        expected[0] = complete(7810, "What date is today?")
    eager = () if options.compile_prefill else ("--enforce-eager",)
    if options.compile_prefill:
        ENVIRONMENT["TORCHDYNAMO_DISABLE"] = "0"
    with disaggregated(setup, options.pairs, eager) as processes:
        compare(options.pairs, expected, options.seed)
        text = stream(7805, prompt(LENGTHS[3], options.seed))
        check("a stream gives the same text", text == expected[LENGTHS[3]])
        if options.bench:
            bench(options.model.resolve())
        kill_one("prefill", processes["prefill-0"], expected, options.seed)
        if options.pairs > 1:
            kill_one("decode", processes["decode-0"], expected, options.seed)
    print("failed: " + ", ".join(failures) if failures else "all checks passed")
    sys.exit(bool(failures))


@contextmanager
def disaggregated(setup: Setup, pairs: int, eager: tuple[str, ...]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The servers and the proxy. Decoders alone have a hash seed, as people start them."""
    with ExitStack() as stack:
        started = []
        for pair in range(pairs):
            name = f"prefill-{pair}"
            server = setup.server(name, 7820 + 2 * pair, "kv_producer", *eager)
            started.append((name, 7820 + 2 * pair, stack.enter_context(server)))
            os.environ["PYTHONHASHSEED"] = "123456"
            name = f"decode-{pair}"
            more = ("--no-enable-prefix-caching", "--enforce-eager")
            server = setup.server(name, 7821 + 2 * pair, "kv_consumer", *more)
            started.append((name, 7821 + 2 * pair, stack.enter_context(server)))
            del os.environ["PYTHONHASHSEED"]
        setup.ready(*started)
        decode = [7821 + 2 * pair for pair in range(pairs)]
        proxy = stack.enter_context(setup.proxy(7805, [port - 1 for port in decode], decode))
        setup.ready(("proxy", 7805, proxy))
        yield {name: process for name, _, process in started}


def bench(model: Path) -> None:
    """The command of the guide, with lengths that fit the small model."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm",
        "--dataset-name", "random", "--random-input-len", "2048", "--random-output-len", "100",
        "--num-prompts", "10", "--ignore-eos", "--model", "tiny", "--tokenizer", str(model),
        "--host", "localhost", "--port", "7805", "--endpoint", "/v1/completions",
        "--request-rate", "1", "--seed", str(int(time.time())),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | os.environ, check=False)
    line = next((line for line in done.stdout.splitlines() if "Successful requests" in line), done.stderr[-500:])
    check("vllm bench serve", done.returncode == 0 and line.split()[-1] == "10", line)


if __name__ == "__main__":
    main()
