"""Load on one endpoint: a closed loop (so many requests at once) or an open one (requests arrive when they arrive)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvloop

from benchmarks.client import CHAT, Endpoint, Exchange, LoadError, Sample, exchange, read
from benchmarks.prompts import MIXES, NOTHING, Cutter, Prompt, mixed_lengths
from engine.text import Tokenizer

TIMEOUT_S = 600.0
LONG_PROMPTS = 16  # different ones, sent over and over


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt and how many tokens are wanted after it."""

    prompt: Prompt
    num_output_tokens: int


class Asker:
    """Hands out requests of fixed lengths or of a mix; equal seeds, equal requests.

    All prompts begin with the same `shared_prefix_len` tokens, which are not in `input_len`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        input_len: int,
        output_len: int,
        mix: str | None = None,
        shared_prefix_len: int = 0,
    ) -> None:
        self._cutter = Cutter(tokenizer, seed)
        self._seed, self._lengths, self._mix = seed, (input_len, output_len), mix
        self._prefix = self._cutter.cut(shared_prefix_len) if shared_prefix_len else NOTHING

    def __call__(self, count: int) -> list[Ask]:
        lengths = [self._lengths] * count
        if self._mix is not None:
            self._seed += 1
            lengths = mixed_lengths(MIXES[self._mix], count, self._seed)
        return [Ask(self._cutter.cut(prompt, self._prefix), output) for prompt, output in lengths]

    def long(self, num_tokens: int) -> list[Ask]:
        """Prompts of which only the first token is wanted."""
        return [Ask(self._cutter.cut(num_tokens), 1) for _ in range(LONG_PROMPTS)]


@dataclass(frozen=True)
class Target:
    """An endpoint, and the fields that every body for it has (`model`, `ignore_eos`, ...)."""

    endpoint: Endpoint
    fields: Mapping[str, Any]

    def request(self, ask: Ask) -> bytes:
        chat = self.endpoint.path.endswith(CHAT)
        prompt = {"messages": [{"role": "user", "content": ask.prompt.text}]} if chat else {"prompt": ask.prompt.text}
        return self.endpoint.request({**prompt, "max_tokens": ask.num_output_tokens, "temperature": 0, **self.fields})


@dataclass(frozen=True)
class Load:
    """What became of the requests, in their order, and how busy the client itself was."""

    samples: tuple[Sample, ...]
    client_cpu_share: float  # of one core, while requests ran
    send_lag_s: float = 0.0  # longest time that a request of an open loop was sent too late
    beside: tuple[Sample, ...] = ()  # of the stream beside a closed loop's, those that ended


def whole(load: Load) -> Load:
    """A load of which nothing failed. Raises LoadError."""
    for sample in load.samples:
        if sample.error is not None:
            raise LoadError(f"{sample.error}: {sample.text[:500]}")
    return load


def arrival_times(rate: float, burstiness: float, count: int, seed: int) -> list[float]:
    """Seconds from the start. Gaps are gamma distributed with mean 1 / rate and shape `burstiness`, as in vLLM's
    benchmark: 1 is a Poisson process, less comes in bursts, more comes evenly."""
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    return np.cumsum(gaps).tolist()


def closed_loop(
    target: Target, asks: Sequence[Ask], concurrency: int, timeout_s: float = TIMEOUT_S, beside: Sequence[Ask] = ()
) -> Load:
    """`concurrency` streams start at once; each sends the next request when its last one has ended.

    beside: one more stream sends these, over and over, until the others are done; they are not in the samples.
    Raises LoadError where one of them fails.
    """
    requests = [target.request(ask) for ask in asks]
    found: list[Exchange | None] = [None] * len(asks)
    numbers, ended = itertools.count(), list[Exchange]()

    async def other_stream() -> None:
        for request in itertools.cycle([target.request(ask) for ask in beside]):
            ended.append(await exchange(target.endpoint, request, timeout_s))

    async def stream() -> None:
        while (number := next(numbers)) < len(requests):
            found[number] = await exchange(target.endpoint, requests[number], timeout_s)

    async def every() -> list[Exchange]:
        other = asyncio.create_task(other_stream())
        await asyncio.gather(*(stream() for _ in range(concurrency)))
        other.cancel()
        return [one for one in found if one is not None]

    load = _driven(every(), asks, target)
    return replace(load, beside=whole(Load(tuple(map(read, ended)), 0.0)).samples)


def open_loop(target: Target, asks: Sequence[Ask], arrivals_s: Sequence[float], timeout_s: float = TIMEOUT_S) -> Load:
    """Every request is sent at its time, however many are running. Its time to first token counts from then."""
    requests = [target.request(ask) for ask in asks]
    lags = []

    async def send(request: bytes, due_s: float) -> Exchange:
        await asyncio.sleep(due_s - time.perf_counter())
        lags.append(time.perf_counter() - due_s)
        return await exchange(target.endpoint, request, timeout_s, due_s)

    async def every() -> list[Exchange]:
        begin_s = time.perf_counter() + 0.05
        due = [begin_s + arrival for arrival in arrivals_s]
        return await asyncio.gather(*(send(*one) for one in zip(requests, due, strict=True)))

    return replace(_driven(every(), asks, target), send_lag_s=max(lags, default=0.0))


def _driven(every: Coroutine[Any, Any, list[Exchange]], asks: Sequence[Ask], target: Target) -> Load:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = uvloop.run(every)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    exact = bool(target.fields.get("ignore_eos"))
    samples = (_counted(read(one), ask, exact) for one, ask in zip(found, asks, strict=True))
    return Load(tuple(samples), cpu_s / wall_s)


def _counted(sample: Sample, ask: Ask, exact: bool) -> Sample:
    """With an error where the server's count of tokens is not what was asked for."""
    count, wanted = sample.num_output_tokens, ask.num_output_tokens
    if sample.error is None and (count > wanted or (exact and count < wanted)):
        return replace(sample, error=f"{count} tokens of {wanted}")
    return sample
