"""The engines that are measured: each is started, answers rounds of prompts, and is stopped.

Every engine runs alone, in processes of its own, on the same weights, with all cores.
"""

from __future__ import annotations

import asyncio
import dataclasses
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

from benchmarks.client import LoadError, Round, Sample, run_round
from benchmarks.prompts import Prompt
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
    """`run` sends prompts[stream][k]: the streams side by side, each one's prompts in order."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    def run(self, prompts: Sequence[Sequence[Prompt]], num_tokens: int) -> Round: ...


@dataclass(frozen=True)
class HttpEngine:
    """A server with OpenAI's completions endpoint on this machine."""

    port: int
    versions: Mapping[str, str]
    extra: Mapping[str, Any]

    def run(self, prompts: Sequence[Sequence[Prompt]], num_tokens: int) -> Round:
        same = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True} | dict(self.extra)
        return asyncio.run(run_round(self.port, [[{"prompt": p.text} | same for p in own] for own in prompts]))


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


def get_json(url: str) -> tuple[int, Any]:
    """(status, body); status 0 while nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else None
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0, None


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
        yield HttpEngine(port, {}, {})


@contextmanager
def xllamacpp(model: Path, num_streams: int, tokens_per_stream: int) -> Iterator[HttpEngine]:
    """llama.cpp's server, with a slot for each stream. Its prompt cache is off, as nothing could hit."""
    command = [sys.executable, "-m", "benchmarks.xllamacpp_server", str(model)]
    command += ["--threads", str(os.cpu_count()), "--streams", str(num_streams)]
    command += ["--tokens-per-stream", str(tokens_per_stream)]
    with process(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        hello = read_answer(child)
        port = int(hello["address"].rsplit(":", 1)[1])
        yield HttpEngine(port, {"xllamacpp": hello["version"]}, {"cache_prompt": False})


def read_answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that the child prints. Raises LoadError when it ends instead."""
    for line in cast(IO[str], child.stdout):
        if line.startswith("{"):
            return json.loads(line)
    raise LoadError(f"{child.args} ended with exit code {child.wait()}")


@dataclass(frozen=True)
class Transformers:
    """`generate` on one static batch. No server: no HTTP, tokenization or detokenization is timed."""

    child: subprocess.Popen[str]
    versions: Mapping[str, str]
    tokenizer: Tokenizer

    def run(self, prompts: Sequence[Sequence[Prompt]], num_tokens: int) -> Round:
        samples: list[list[Sample]] = [[] for _ in prompts]
        for batch in zip(*prompts, strict=True):
            work = {"prompts": [p.token_ids for p in batch], "max_new_tokens": num_tokens}
            stdin = cast(IO[str], self.child.stdin)
            start_s = time.perf_counter()
            stdin.write(json.dumps(work) + "\n")
            stdin.flush()
            done = read_answer(self.child)
            first_s, end_s = start_s + done["first_s"], start_s + done["end_s"]
            for own, prompt, tokens in zip(samples, batch, done["tokens"], strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                own.append(Sample(start_s, first_s, end_s, len(prompt.token_ids), len(tokens), text))
        return Round(tuple(sample for own in samples for sample in own))


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
