"""A device that takes a stated time a step and draws made-up tokens, under the real runner: what is left is the host.

Its executables take the real step vectors and return arrays that, like a device's, can be had before they are done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from engine.batch import StepKey, lattice, step_layout
from engine.config import EngineConfig, EngineOptions
from engine.executables import NoProgramCache, compile_all
from engine.loop import Engine
from engine.model.config import LayerSpec, ModelConfig
from engine.programs import empty_programs, step_program
from engine.resolve import DeviceFacts, resolve
from engine.runner import Runner
from engine.stats import Counters
from engine.text import Tokenizer

MODEL = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=8,
    intermediate_size=8,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=8,
    layers=(LayerSpec(rope=None),),
    max_position=1 << 17,
)


@dataclass
class FakeDevice:
    """One step after the other, each `step_s` long, `token_s` longer by each prompt token of its bucket, `turn_s` by
    each token that it draws for a sequence.

    `idle_s` is what it waited between them for the host.
    """

    step_s: float = 0.0
    token_s: float = 0.0
    turn_s: float = 0.0
    busy_until_s: float = 0.0
    idle_s: float = 0.0
    steps: int = 0

    def start(self, prompt_tokens: int, turns: int) -> float:
        """A step is launched now; returns when it will be done, on `time.perf_counter`'s clock."""
        now_s = time.perf_counter()
        if self.steps:
            self.idle_s += max(0.0, now_s - self.busy_until_s)
        self.steps += 1
        takes_s = self.step_s + self.token_s * prompt_tokens + self.turn_s * turns
        self.busy_until_s = max(now_s, self.busy_until_s) + takes_s
        return self.busy_until_s


@dataclass(frozen=True, slots=True)
class FakeArray:
    """What JAX's arrays are to the runner: a value that can be waited for."""

    value: np.ndarray
    ready_at_s: float

    def copy_to_host_async(self) -> None:
        """It is on its way already."""

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.ready_at_s

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        wait_s = self.ready_at_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        return self.value


class FakeExecutable:
    """Program `key`: every row draws as many tokens as it is asked for, the same ones every time."""

    def __init__(self, device: FakeDevice, config: EngineConfig, key: StepKey) -> None:
        program = step_program(MODEL, config, key)
        self.structures = [jax.tree.structure(tree) for tree in program.outputs]
        self._device, self._key, self._layout = device, key, step_layout(config, key)
        self._values = [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(program.outputs[2])]
        tokens = self._values[0]
        tokens[:] = 5000 + np.arange(tokens.size).reshape(tokens.shape) % 20_000  # words, and parts of them

    def __call__(self, params: Any, kv: Any, slots: Any, vectors: Sequence[np.ndarray]) -> list[Any]:
        fields = self._layout.split(vectors[0], lambda part, field: part)
        asked = [fields["decode_count"], *([fields["samples"]] if self._key.tokens else [])]
        drawn = np.concatenate(asked)
        ready_at_s = self._device.start(self._key.tokens, int(drawn.max()))
        values = [self._values[0], drawn, *self._values[2:]]
        return [kv, slots, [FakeArray(value, ready_at_s) for value in values]]


def fake_engine(
    device: FakeDevice, tokenizer: Tokenizer | None = None, num_pages: int | None = None, **options: Any
) -> Engine:
    """The real engine over `device`, its thread not started. `options` are those of `EngineOptions`.

    num_pages: of the KV cache, by default as many as all sequences at their longest need.
    """
    facts = DeviceFacts("cpu", memory_bytes=1 << 40, fast_bfloat16=False)
    config = resolve(EngineOptions(**options), MODEL, "float32", facts)
    config = replace(config, num_pages=num_pages or config.max_num_seqs * config.max_pages_per_seq + 1)
    counters = Counters()
    executables: dict[str, Any] = {key.name: FakeExecutable(device, config, key) for key in lattice(config)}
    executables |= compile_all(empty_programs(MODEL, config), NoProgramCache(), lambda phase, done, of: None)
    runner = Runner(MODEL, config, {}, executables, counters)
    return Engine(config, runner, vocab_size=MODEL.vocab_size, tokenizer=tokenizer, counters=counters)
