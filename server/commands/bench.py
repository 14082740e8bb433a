"""`octavo bench ...`: the group's rows of the table of commands, and their options.

Imported to print help, so it stays light: what measures is in the modules that `run` names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.config import EngineOptions, option
from engine.errors import InvalidParam
from server.commands.command import Command

HELP = "measure serving, offline batches and start-up"


def at_least(options: object, **bounds: float) -> None:
    """Raises InvalidParam for the first of these fields that is set and below its bound."""
    for name, low in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise InvalidParam(name, f"must be at least {low}, got {value}")


def above_zero(options: object, *names: str) -> None:
    """Raises InvalidParam for the first of these fields that is set and not a finite positive number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidParam(name, f"must be a positive number, got {value}")


@dataclass(frozen=True, kw_only=True)
class BenchServeOptions:
    """Names are those of `vllm bench serve` where it has one."""

    url: str | None = option(None, "base URL of a server that runs already (default: the model is served for the run)")
    peer: tuple[str, ...] = option((), "another server to put under the same load, as NAME=URL")
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = option("/v1/completions", "what is asked")
    header: tuple[str, ...] = option((), "header of every request, as NAME=VALUE")
    max_concurrency: tuple[int, ...] = option(
        (), "closed loop: requests that run at once, as 1,4,16 (default: that, where no rate is given)"
    )
    request_rate: float | None = option(None, "open loop: requests that arrive in a second")
    burstiness: float = option(1.0, "shape of the gaps between arrivals: 1 is Poisson, below in bursts, above evenly")
    sweep: bool = option(False, "find the request rate with the best goodput; needs --slo")
    attainment: float = option(0.9, "share of good requests at which a rate of --sweep holds")
    slo: str | None = option(None, "what makes a request good: ttft_ms=500,tpot_ms=50,e2el_ms=9000, or some of these")
    input_len: int = option(128, "prompt tokens of every request")
    output_len: int = option(128, "output tokens of every request")
    mix: Literal["chat", "summary", "code"] | None = option(None, "lengths that vary as in such a use, for those two")
    shared_prefix_len: int = option(0, "tokens that all prompts begin with, in front of those")
    long_prompt_len: int | None = option(
        None, "closed loop: beside it prompts of so many tokens arrive one after the other"
    )
    num_prompts: int | None = option(
        None, "requests a load (default: 4 of each stream, at least 8; with a rate, those of 20 s, at least 20)"
    )
    num_warmups: int | None = option(None, "requests sent before each load (default: its concurrency; 4 with a rate)")
    num_checks: int = option(2, "requests of each load sent again, alone, to compare their text")
    ignore_eos: bool = option(True, "ask for exactly so many output tokens; servers other than vLLM's kind refuse it")
    request_timeout_s: float = option(600.0, "after which a request counts as failed")
    seed: int = option(0, "chooses prompts, lengths and arrivals")
    html: str | None = option(None, "file to write a page with charts to")
    backend: str = option("cpu", "what the server runs on; names the result")
    result_dir: str | None = option(None, "folder to write the result to, as <date>-<backend>-serve.json")

    def __post_init__(self) -> None:
        at_least(self, input_len=1, output_len=1, num_prompts=1, num_warmups=0, num_checks=0)
        at_least(self, shared_prefix_len=0, long_prompt_len=1)
        if self.long_prompt_len is not None and (self.request_rate is not None or self.sweep):
            raise InvalidParam("long_prompt_len", "is for a closed loop")
        above_zero(self, "request_rate", "burstiness", "request_timeout_s", "attainment")
        if self.attainment > 1:
            raise InvalidParam("attainment", f"must be at most 1, got {self.attainment}")
        if any(value < 1 for value in self.max_concurrency):
            raise InvalidParam("max_concurrency", "must be positive numbers")
        if self.max_concurrency and (self.request_rate is not None or self.sweep):
            raise InvalidParam("max_concurrency", "is for a closed loop; --request-rate and --sweep are an open one")
        if self.burstiness != 1 and self.request_rate is None and not self.sweep:
            raise InvalidParam("burstiness", "is for an open loop; give --request-rate or --sweep")
        if self.sweep and self.slo is None:
            raise InvalidParam("sweep", "needs --slo, which says what a good request is")
        for name in ("peer", "header"):
            if wrong := [text for text in getattr(self, name) if not text.partition("=")[2]]:
                raise InvalidParam(name, f"{wrong[0]!r} is not NAME={'URL' if name == 'peer' else 'VALUE'}")


@dataclass(frozen=True, kw_only=True)
class BenchStepsOptions:
    batch: tuple[int, ...] = option((1, 4, 16), "sequences that decode at once, as 1,4,16")
    context: tuple[int, ...] = option((128,), "prompt tokens of each, as 128,1024")
    waiting: tuple[int, ...] = option((0,), "requests that wait behind them, as 0,1000")
    steps: int = option(64, "decode steps that are timed under each of these loads")
    fake_step_ms: float | None = option(
        None, "time the host alone, over a device that takes so long a step (0: no time) and draws made-up tokens"
    )
    trace: str | None = option(None, "file for the phases of every step, as Perfetto and chrome://tracing read it")
    result_dir: str | None = option(None, "folder to write the result to, as <date>-<backend>-steps.json")

    def __post_init__(self) -> None:
        at_least(self, steps=1, fake_step_ms=0)
        for name, low in (("batch", 1), ("context", 1), ("waiting", 0)):
            if not getattr(self, name) or min(getattr(self, name)) < low:
                raise InvalidParam(name, f"must be numbers of at least {low}")
        if self.trace is not None and self.fake_step_ms is not None:
            raise InvalidParam("trace", "shows a real device; leave out --fake-step-ms")


@dataclass(frozen=True, kw_only=True)
class BenchOfflineOptions:
    num_prompts: int = option(64, "requests of a round, all handed in at once")
    rounds: int = option(3, "rounds that count; the median is reported")
    input_len: int = option(128, "prompt tokens of every request")
    output_len: int = option(128, "output tokens of every request")
    mix: Literal["chat", "summary", "code"] | None = option(None, "lengths that vary as in such a use, for those two")
    dataset_path: str | None = option(None, 'JSONL file of {"prompt": text or ids, "max_tokens": n}, run once instead')
    seed: int = option(0, "chooses prompts and lengths")
    backend: str = option("cpu", "what it runs on; names the result")
    result_dir: str | None = option(None, "folder to write the result to, as <date>-<backend>-offline.json")

    def __post_init__(self) -> None:
        at_least(self, num_prompts=1, rounds=1, input_len=1, output_len=1)
        if self.dataset_path is not None and self.mix is not None:
            raise InvalidParam("mix", "is for made-up requests; --dataset-path brings its own lengths")


@dataclass(frozen=True, kw_only=True)
class BenchStartupOptions:
    repeats: int = option(3, "cold and warm starts; the median is reported")
    backend: str = option("cpu", "what the server runs on; names the result")
    result_dir: str | None = option(None, "folder to write the result to, as <date>-<backend>-startup.json")

    def __post_init__(self) -> None:
        at_least(self, repeats=1)


COMMANDS = (
    Command(
        name="bench serve",
        help="load on a server: throughput, latencies by percentile, goodput, the best rate",
        run="server.commands.bench_serve:run",
        options=(EngineOptions, BenchServeOptions),
        positional=("model",),
    ),
    Command(
        name="bench steps",
        help="where the time of a decode step goes: phases of the host, the device, the share of its peaks",
        run="server.commands.bench_steps:run",
        options=(EngineOptions, BenchStepsOptions),
        positional=("model",),
    ),
    Command(
        name="bench offline",
        help="batches through LLM in one process: tokens a second in and out",
        run="server.commands.bench_offline:run",
        options=(EngineOptions, BenchOfflineOptions),
        positional=("model",),
    ),
    Command(
        name="bench startup",
        help="seconds from process start to ready, cold and warm, by phase, and memory",
        run="server.commands.bench_startup:run",
        options=(EngineOptions, BenchStartupOptions),
        positional=("model",),
    ),
)
