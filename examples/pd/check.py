#!/usr/bin/env python3
"""Checks prefill/decode disaggregation with real vLLM servers and the real proxy, on the CPU.

    python check.py MODEL [--pairs 1|2] [--case shared|dropped|dtype] [--proxy ucm-proxy] [--bench]

Run it with the Python that has vLLM and UCM; MODEL is a small model with real weights
(``python/tests/tiny_model.py`` makes one). It starts, one after the other, a plain server for the
expected outputs, then prefill and decode servers with UCM and the proxy, and checks:

- a prompt shorter than a block is answered, and waits for nothing;
- unique prompts of 2 to 32 blocks give, at temperature 0, token for token the plain server's
  output, with decode's own prefix cache off;
- decode computed at most (n - 1) mod 128 + 1 tokens of each prompt of n tokens, and the connector
  loaded and verified the rest;
- streams give the same text;
- a prefill server killed in the middle costs nobody an answer, nor does, with two pairs, a decode
  server.

Two cases are about servers that do not share, where decode must compute every prompt itself, soon
and rightly: ``dropped`` fills the file system that prefill saves to (``--storage``, a small one of
its own: ``mount -t tmpfs -o size=64m tmpfs DIR``), ``dtype`` starts prefill with another dtype, which
the proxy has to name. ``--prefill-python`` runs the prefill servers in another environment, so
that two versions of vLLM, whose KV lies differently in memory, share.

It prints one line a check and ends with status 1 if one failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
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
BLOCKS_AND_TOKENS = ((2, 0), (2, 1), (2, 127), (5, 17), (8, 0), (16, 64), (30, 5), (32, 0))
LENGTHS = tuple(blocks * BLOCK + tokens for blocks, tokens in BLOCKS_AND_TOKENS)
OUTPUT_TOKENS = 16
START_TIMEOUT_S = 900
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 500
HANDOFF_WAIT_S = 60
"""How long decode may wait for announced blocks: far longer than it takes to compute a prompt."""
FILL_MAX_MB = 1024
"""A file system with more room than this is not filled."""
EAGER = "--enforce-eager"


class Ports:
    """Where everything listens, counted from one port."""

    first = 7800

    @classmethod
    def proxy(cls) -> int:
        return cls.first + 5

    @classmethod
    def plain(cls) -> int:
        return cls.first + 10

    @classmethod
    def prefill(cls, pair: int) -> int:
        return cls.first + 20 + 2 * pair

    @classmethod
    def decode(cls, pair: int) -> int:
        return cls.prefill(pair) + 1

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
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

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.model, self.proxy_program = options.model.resolve(), options.proxy
        self.case, self.directory = options.case, directory
        self.storage = options.storage or directory / "storage"
        self.python = {"kv_producer": options.prefill_python}
        self.eager = {"kv_producer": not options.compile_prefill}
        # Compiled code rounds bfloat16 less often than eager code does, so that the two generate
        # different tokens now and then, with or without UCM; in float32 they agree.
        self.dtype = options.dtype or ("float32" if options.compile_prefill else "bfloat16")

    def config(self, role: str) -> str:
        """The connector's configuration file of one role."""
        store: dict[str, Any] = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(self.storage),
            "cache_buffer_capacity_gb": 0.25,
            "segment_size_mb": 2 if self.case == "dropped" else 16,
        }
        connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        whole = {"ucm_connectors": [connector], "handoff_wait_ms": HANDOFF_WAIT_S * 1000}
        file = self.directory / f"{role}.yaml"
        file.write_text(json.dumps(whole))
        return str(file)

    @contextmanager
    def process(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        log = self.directory / f"{name}.log"
        environment = ENVIRONMENT | dict(os.environ) | environment
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
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
        python = str(self.python.get(role or "", sys.executable))
        eager = self.eager.get(role or "", True)
        other = "bfloat16" if self.dtype == "float32" else "float32"
        dtype = other if self.case == "dtype" and role == "kv_producer" else self.dtype
        command = [
            python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model),
            "--served-model-name", "tiny", "--port", str(port), "--block-size", str(BLOCK),
            "--dtype", dtype, "--max-model-len", "4352", "--max-num-batched-tokens", "4352",
            "--max-num-seqs", "8", "--seed", "0", *([EAGER] if eager else []), *more,
        ]  # fmt: skip
        # PyTorch's compiler is not needed by an eager server, and takes time to start.
        environment = {"TORCHDYNAMO_DISABLE": "1"} if eager else {}
        environment["PATH"] = f"{Path(python).parent}:{os.environ['PATH']}"
        if role == "kv_consumer":
            environment["PYTHONHASHSEED"] = "123456"  # decoders alone, as people start them
        if role:
            transfer = {
                "kv_connector": "UCMConnector",
                "kv_role": role,
                "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"UCM_CONFIG_FILE": self.config(role)},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        return self.process(name, command, environment)

    def proxy(self, port: int, prefill: list[int], decode: list[int]) -> Any:
        ports = [*map(str, prefill)], [*map(str, decode)]
        hosts = ["localhost"] * len(prefill)
        command = [
            self.proxy_program, "--host", "localhost", "--port", str(port),
            "--access-log", str(self.directory / "access.log"),
            "--prefiller-hosts", *hosts, "--prefiller-port", *ports[0],
            "--decoder-hosts", *hosts, "--decoder-ports", *ports[1],
        ]  # fmt: skip
        return self.process("proxy", command, {})

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


def compare(pairs: int, expected: dict[int, str], seed: int, shares: bool) -> None:
    """The checks while all servers live; ``shares`` is whether decode finds what prefill computed."""
    decode = [Ports.decode(pair) for pair in range(pairs)]
    started = time.monotonic()
    text = complete(Ports.proxy(), "What date is today?")
    seconds = time.monotonic() - started
    check("a prompt shorter than a block", text == expected[0], f"{seconds:.2f} s")
    for length in LENGTHS:
        before = [measures(port) for port in decode]
        started = time.monotonic()
        text = complete(Ports.proxy(), prompt(length, seed))
        seconds = time.monotonic() - started
        check(f"{length} tokens: output of the plain server", text == expected[length], f"{seconds:.2f} s")
        after = [measures(port) for port in decode]
        computed, loaded = (
            sum(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in range(2)
        )
        if not shares:
            check(f"{length} tokens: decode computed all", (computed, loaded) == (length, 0), computed)
            check(f"{length} tokens: it did not wait in vain", seconds < HANDOFF_WAIT_S / 2)
            continue
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
        answers = [pool.submit(complete, Ports.proxy(), prompt(length, seed)) for length in lengths]
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
        texts = [answer.result() for answer in answers]
    right = [text == expected[length] for text, length in zip(texts, lengths, strict=True)]
    check(f"{name} killed in the middle: all answers right", all(right), f"{sum(right)} of {len(right)}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=1, choices=(1, 2))
    parser.add_argument("--proxy", default=os.environ.get("UCM_PROXY", "ucm-proxy"))
    parser.add_argument("--case", default="shared", choices=("shared", "dropped", "dtype"))
    parser.add_argument("--storage", type=Path, help="the directory that all share (default: a fresh one)")
    parser.add_argument(
        "--prefill-python",
        type=Path,
        default=Path(sys.executable),
        help="the Python that runs the prefill servers (default: this one)",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of all servers")
    parser.add_argument("--bench", action="store_true", help="also run `vllm bench serve`")
    parser.add_argument(
        "--compile-prefill",
        action="store_true",
        help="prefill servers without --enforce-eager: compiles for minutes, needs a C++ compiler",
    )
    parser.add_argument("--first-port", type=int, default=Ports.first, help="the first of 25 ports")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops what was started
    Ports.first = options.first_port
    directory = Path(tempfile.mkdtemp(prefix="ucm-pd-"))
    print(f"logs in {directory}")
    setup = Setup(options, directory)
    with setup.server("plain", Ports.plain(), None, "--no-enable-prefix-caching") as plain:
        setup.ready(("plain", Ports.plain(), plain))
        expected = {length: complete(Ports.plain(), prompt(length, options.seed)) for length in LENGTHS}
        expected[0] = complete(Ports.plain(), "What date is today?")
    with disaggregated(setup, options.pairs) as processes:
        if options.case == "dropped":
            fill(setup.storage, [Ports.prefill(pair) for pair in range(options.pairs)])
        compare(options.pairs, expected, options.seed, options.case == "shared")
        if options.case == "dtype":
            mismatch_is_named(setup, options.pairs)
        text = stream(Ports.proxy(), prompt(LENGTHS[3], options.seed))
        check("a stream gives the same text", text == expected[LENGTHS[3]])
        if options.bench:
            bench(options.model.resolve())
        if options.case == "shared":
            kill_one("prefill", processes["prefill-0"], expected, options.seed)
        if options.case == "shared" and options.pairs > 1:
            kill_one("decode", processes["decode-0"], expected, options.seed)
    print("failed: " + ", ".join(failures) if failures else "all checks passed")
    sys.exit(bool(failures))


def fill(storage: Path, prefill: list[int]) -> None:
    """Leaves no room for another block: fills the file system, then what the stores had reserved."""
    for seed, port in enumerate(prefill):
        complete(port, prompt(LENGTHS[0], 2_000_000 + seed))
    time.sleep(2)
    with contextlib.suppress(OSError), open(storage / "filling", "wb", buffering=0) as file:
        for _ in range(FILL_MAX_MB):
            file.write(bytes(1 << 20))
        sys.exit(f"{storage} has more than {FILL_MAX_MB} MiB of room: give --storage a small file system")
    failed = [0.0] * len(prefill)
    for seed in range(20):
        for port in prefill:
            complete(port, prompt(LENGTHS[-1], 1_000_000 + seed))
        time.sleep(1.2)
        failed = [counter(port, "ucm_save_failed_blocks") for port in prefill]
        if all(failed):
            break
    check("prefill can save no more", all(failed), failed)


def mismatch_is_named(setup: Setup, pairs: int) -> None:
    """The proxy says which field differs, and decode counts it."""
    log = (setup.directory / "proxy.log").read_text()
    loud = [line for line in log.splitlines() if "CAN NEVER SHARE KV" in line and "dtype is" in line]
    check("the proxy names the dtype", len(loud) == pairs * pairs, *loud[:1])
    with urllib.request.urlopen(f"http://localhost:{Ports.proxy()}/healthcheck", timeout=30) as response:
        sharing = json.load(response)["kv_sharing"]
    check("/healthcheck says mismatch", sharing == "mismatch", sharing)
    decode = [Ports.decode(pair) for pair in range(pairs)]
    counted = sum(counter(port, "ucm_handoff_mismatches", 'field="dtype"') for port in decode)
    check("decode counted the field", counted > 0, counted)


@contextmanager
def disaggregated(setup: Setup, pairs: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The servers and the proxy; decode has no prefix cache of its own."""
    with ExitStack() as stack:
        started = []
        for pair in range(pairs):
            name = f"prefill-{pair}"
            server = setup.server(name, Ports.prefill(pair), "kv_producer")
            started.append((name, Ports.prefill(pair), stack.enter_context(server)))
            name = f"decode-{pair}"
            server = setup.server(name, Ports.decode(pair), "kv_consumer", "--no-enable-prefix-caching")
            started.append((name, Ports.decode(pair), stack.enter_context(server)))
        setup.ready(*started)
        decode = [Ports.decode(pair) for pair in range(pairs)]
        prefill = [Ports.prefill(pair) for pair in range(pairs)]
        proxy = stack.enter_context(setup.proxy(Ports.proxy(), prefill, decode))
        setup.ready(("proxy", Ports.proxy(), proxy))
        yield {name: process for name, _, process in started}


def bench(model: Path) -> None:
    """The command of the guide."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm",
        "--dataset-name", "random", "--random-input-len", "4096", "--random-output-len", "100",
        "--num-prompts", "10", "--ignore-eos", "--model", "tiny", "--tokenizer", str(model),
        "--host", "localhost", "--port", str(Ports.proxy()), "--endpoint", "/v1/completions",
        "--request-rate", "1", "--seed", str(int(time.time())),
    ]  # fmt: skip
    environment = ENVIRONMENT | dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = (line for line in done.stdout.splitlines() if "Successful requests" in line)
    line = next(lines, done.stderr[-500:])
    check("vllm bench serve", done.returncode == 0 and line.split()[-1] == "10", line)


if __name__ == "__main__":
    main()
