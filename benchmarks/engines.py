"""The engines that are measured: each is started, answers rounds of prompts, and is stopped.

Every engine runs alone, in processes of its own, on the same weights, with all cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from benchmarks.client import Endpoint, LoadError, Sample
from benchmarks.load import Ask, Load, Target, closed_loop
from engine.config import EngineOptions
from engine.errors import OctavoError
from engine.text.tokenizer import Tokenizer

START_TIMEOUT_S = 600
POLL_S = 0.05
STOP_TIMEOUT_S = 30
TORCH = "torch==2.13.0"
ROOT = Path(__file__).parent.parent


class Unavailable(OctavoError):
    """This engine cannot be had here; the message says why."""


class Engine(Protocol):
    """`run` keeps `concurrency` requests going until all are done; greedy, end tokens ignored."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    def run(self, asks: Sequence[Ask], concurrency: int) -> Load: ...


@dataclass(frozen=True)
class HttpEngine:
    """A server with OpenAI's API."""

    target: Target
    versions: Mapping[str, str]

    def run(self, asks: Sequence[Ask], concurrency: int) -> Load:
        return closed_loop(self.target, asks, concurrency)


@contextmanager
def process(command: Sequence[str], **words: Any) -> Iterator[subprocess.Popen[str]]:
    """A child with its stderr in a file. When the block fails, the end of that file is shown."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, stderr=log, text=True, **words)
        try:
            yield child
        except BaseException:
            print(f"--- end of the log of {' '.join(command[:4])}\n{_tail(log)}---", file=sys.stderr)
            raise
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-20:])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get_json(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """(status, body); status 0 while nothing listens."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else None
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0, None


def local(port: int, **fields: Any) -> Target:
    """A server of this machine that understands `ignore_eos`."""
    return Target(Endpoint("127.0.0.1", port), {"ignore_eos": True, **fields})


@contextmanager
def octavo_process(options: EngineOptions) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`octavo serve` with these options, and the port on which it will listen."""
    changed = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(changed, file)  # which is YAML too
        file.flush()
        command = [sys.executable, "-m", "server.cli", "serve", "--config", file.name, "--port", str(port)]
        with process(command, stdout=subprocess.DEVNULL) as child:
            yield child, port


def until_ready(child: subprocess.Popen[str], port: int) -> Iterator[tuple[int, str | None]]:
    """(status, phase) of `/ready` again and again; the last has status 200. Raises LoadError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        status, body = get_json(f"http://127.0.0.1:{port}/ready")
        yield status, (body or {}).get("status")
        if status == 200:
            return
        if child.poll() is not None:
            raise LoadError(f"octavo serve ended with exit code {child.returncode}")
        if time.monotonic() > deadline:
            raise LoadError(f"octavo serve was not ready after {START_TIMEOUT_S} s")
        time.sleep(POLL_S)


@contextmanager
def octavo(options: EngineOptions) -> Iterator[HttpEngine]:
    """`octavo serve` with these options, ready."""
    with octavo_process(options) as (child, port):
        for _ in until_ready(child, port):
            pass
        yield HttpEngine(local(port), {})


@contextmanager
def xllamacpp(model: Path, num_streams: int, tokens_per_stream: int) -> Iterator[HttpEngine]:
    """llama.cpp's server, with a slot for each stream. Its prompt cache is off, as nothing could hit."""
    command = [sys.executable, "-m", "benchmarks.xllamacpp_server", str(model)]
    command += ["--threads", str(os.cpu_count()), "--streams", str(num_streams)]
    command += ["--tokens-per-stream", str(tokens_per_stream)]
    with process(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        hello = read_answer(child)
        port = int(hello["address"].rsplit(":", 1)[1])
        yield HttpEngine(local(port, cache_prompt=False), {"xllamacpp": hello["version"]})


def read_answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that the child prints. Raises LoadError when it ends instead."""
    for line in cast(IO[str], child.stdout):
        if line.startswith("{"):
            return json.loads(line)
    raise LoadError(f"{child.args} ended with exit code {child.wait()}")


def answered(child: subprocess.Popen[str], work: Mapping[str, Any]) -> dict[str, Any]:
    """One line of JSON to the child, and its answer."""
    stdin = cast(IO[str], child.stdin)
    stdin.write(json.dumps(work) + "\n")
    stdin.flush()
    return read_answer(child)


@dataclass(frozen=True)
class OpenVino:
    """Its continuous batching. No server: no HTTP, tokenization or detokenization is timed."""

    child: subprocess.Popen[str]
    versions: Mapping[str, str]
    tokenizer: Tokenizer

    def run(self, asks: Sequence[Ask], concurrency: int) -> Load:
        """All asks must want equally many tokens."""
        work = {"prompts": [ask.prompt.token_ids for ask in asks], "concurrency": concurrency}
        begin_s = time.perf_counter()
        done = answered(self.child, work | {"max_new_tokens": asks[0].num_output_tokens})["requests"]
        return Load(tuple(self._sample(begin_s, *one) for one in zip(asks, done, strict=True)), 0.0)

    def _sample(self, begin_s: float, ask: Ask, done: Mapping[str, Any]) -> Sample:
        times_s = tuple(begin_s + second for second in done["times_s"])
        text = self.tokenizer.decode(done["tokens"], skip_special_tokens=True)
        return Sample(begin_s + done["start_s"], times_s, len(ask.prompt.token_ids), len(done["tokens"]), text)


@contextmanager
def openvino(
    model: Path, num_streams: int, tokenizer: Tokenizer, python: Path | None = None, precision: str | None = None
) -> Iterator[OpenVino]:
    """OpenVINO GenAI on a GGUF file under the given Python, else that of .venv-peers. Raises Unavailable."""
    python = python or ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import openvino_genai"], check=False).returncode:
        raise Unavailable("no Python with openvino-genai; `make bench-peers` makes one")
    # -P: the folder of the script is not searched for modules, where others would take our kernels.py.
    command = [str(python), "-P", str(ROOT / "benchmarks" / "openvino_worker.py"), str(model)]
    command += ["--threads", str(os.cpu_count()), "--streams", str(num_streams)]
    command += ["--precision", precision] if precision else []
    with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        yield OpenVino(child, read_answer(child)["versions"], tokenizer)


@dataclass(frozen=True)
class Transformers:
    """`generate` on one static batch. No server: no HTTP, tokenization or detokenization is timed."""

    child: subprocess.Popen[str]
    versions: Mapping[str, str]
    tokenizer: Tokenizer

    def run(self, asks: Sequence[Ask], concurrency: int) -> Load:
        """Batch after batch: those of one share their times."""
        samples: list[Sample] = []
        for batch in itertools.batched(asks, concurrency):
            num_tokens = batch[0].num_output_tokens
            work = {"prompts": [ask.prompt.token_ids for ask in batch], "max_new_tokens": num_tokens}
            start_s = time.perf_counter()
            done = answered(self.child, work)
            times_s = (start_s + done["first_s"], start_s + done["end_s"])
            for ask, tokens in zip(batch, done["tokens"], strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                samples.append(Sample(start_s, times_s, len(ask.prompt.token_ids), len(tokens), text))
        return Load(tuple(samples), 0.0)


@contextmanager
def transformers(python: Path, folder: Path, tokenizer: Tokenizer) -> Iterator[Transformers]:
    command = [str(python), str(ROOT / "benchmarks" / "transformers_worker.py"), str(folder), str(os.cpu_count())]
    with process(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        yield Transformers(child, read_answer(child)["versions"], tokenizer)


def transformers_python(given: Path | None) -> Path:
    """A Python with torch and transformers: the one given, else one in .venv-transformers, made
    on first use with the machine's python3. Raises Unavailable."""
    python = given or ROOT / ".venv-transformers" / "bin" / "python"
    if given is None and not python.exists():
        base = shutil.which("python3")
        if base is None:
            raise Unavailable("no python3 on PATH")
        print(f"making .venv-transformers with {TORCH}; this downloads a lot, once", file=sys.stderr)
        subprocess.run([base, "-m", "venv", str(python.parent.parent)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", TORCH, "transformers>=5"]
        if subprocess.run(install, check=False).returncode:
            shutil.rmtree(python.parent.parent)
            raise Unavailable(f"{TORCH} and transformers cannot be installed with python3")
    check = subprocess.run([str(python), "-c", "import torch, transformers"], capture_output=True, check=False)
    if check.returncode:
        raise Unavailable(f"{python.name} has no torch and transformers")
    return python
