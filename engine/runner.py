"""Owns what is on the device: parameters, KV cache, slots. Turns plans into results.

`launch` returns before the device is done. Knows no requests beyond the rows of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from engine.batch import (
    StepKey,
    build,
    build_configure,
    configure_layout,
    idle_vector,
    lattice,
    needs_configure,
    step_key,
    step_layout,
)
from engine.config import EngineConfig
from engine.estimate.work import Work
from engine.executables import Executable
from engine.model.config import ModelConfig
from engine.placement import move
from engine.plan import DecodeResult, DecodeRows, PromptLogprobs, StepPlan, StepResult
from engine.programs import layer_makers
from engine.sequence import Sequence
from engine.stats import Counters
from engine.steps import StepOutput


@dataclass(frozen=True)
class Pending:
    """A launched step whose tokens are on their way to the host."""

    plan: StepPlan
    key: StepKey
    num_groups: int
    output: StepOutput  # device arrays

    def is_done(self) -> bool:
        return self.output.tokens.is_ready()  # type: ignore[attr-defined]  # the stubs do not know it

    def result(self) -> StepResult:
        """Wait for the step and cut its output into the plan's rows."""
        out, prefill = self.output, self.plan.prefill_rows
        drawn = [np.asarray(array) for array in (out.tokens, out.num_drawn, out.faulty)]
        nothing = np.zeros((len(drawn[0]), 0), np.float32)
        rows = DecodeResult(
            *drawn, *(np.asarray(array) if self.plan.wants_logprobs else nothing for array in _detail(out))
        )
        size, first = len(drawn[0]) // self.num_groups, self.key.rows
        cut = [size * group + first + i for group, i in _places([row.seq for row in prefill])]
        return StepResult(
            prefill=tuple(rows[i] for i in cut),
            decode=rows.take(self._decode_rows(self.plan.decode_rows, size)),
            prompt_logprobs=self._prompt_logprobs(),
            expert_tokens=None if out.expert_tokens is None else np.asarray(out.expert_tokens),
            num_proposed=0 if out.num_proposed is None else int(np.asarray(out.num_proposed).sum()),
        )

    def wanted(self) -> list[Array]:
        """The arrays that `result` reads."""
        out = self.output
        found = [out.tokens, out.num_drawn, out.faulty, *(_detail(out) if self.plan.wants_logprobs else ())]
        if self._wants_prompt_logprobs and out.prompt is not None:
            found += out.prompt
        return found + [array for array in (out.expert_tokens, out.num_proposed) if array is not None]

    @property
    def _wants_prompt_logprobs(self) -> bool:
        return any(row.wants_prompt_logprobs for row in self.plan.prefill_rows)

    def _decode_rows(self, rows: DecodeRows, size: int) -> np.ndarray | slice:
        if self.num_groups == 1:
            return slice(len(rows))
        return np.asarray([size * group + i for group, i in _places(rows.seqs)], np.int32)

    def _prompt_logprobs(self) -> tuple[PromptLogprobs | None, ...]:
        rows = self.plan.prefill_rows
        if not self._wants_prompt_logprobs or self.output.prompt is None:
            return (None,) * len(rows)
        arrays = [np.asarray(a) for a in self.output.prompt]
        found, starts = [], [self.key.tokens * group for group in range(self.num_groups)]
        for row in rows:
            start = starts[row.seq.group]
            cut = [a[start : start + row.count] for a in arrays]
            found.append(PromptLogprobs(*cut) if row.wants_prompt_logprobs else None)
            starts[row.seq.group] += row.count
        return tuple(found)


def _places(seqs: Rows[Sequence]) -> Iterator[tuple[int, int]]:
    """(group, which of its rows) of each row of a plan."""
    counts: dict[int, int] = {}
    for seq in seqs:
        yield seq.group, counts.get(seq.group, 0)
        counts[seq.group] = counts.get(seq.group, 0) + 1


class Runner:
    """The device side of the engine. Not thread-safe: the loop's thread alone calls it."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        params: dict[str, Any],
        executables: dict[str, Executable],
        counters: Counters,
    ) -> None:
        self.model = model
        self.config = config
        self.executables = executables
        self.counters = counters
        self._work = Work(model, config)
        counters.work = self._work.totals
        self._params = jax.tree.leaves(params)
        self._layouts = {key: step_layout(config, key) for key in lattice(config)}
        self._configure_layout = configure_layout(config, model.vocab_size)
        self.reset()

    @property
    def weight_bytes(self) -> int:
        """On the device, as they are packed."""
        return sum(array.nbytes for array in self._params)

    def reset(self) -> None:
        """Fresh KV cache and slots, as at start or after a failed step."""
        layers = (self.executables[name]() for name in layer_makers(self.model, self.config))
        self._kv = [array for (layer,) in layers for array in layer]
        (self._slots,) = self.executables["empty_slots"]()

    def adopt(self, config: EngineConfig, executables: dict[str, Executable]) -> None:
        """Go on under `config`, which differs in shards and pages. What was kept is lost, also where it raises."""
        self._kv, self._slots = (), ()  # makes room
        try:
            move(self.model, self._params, self.config, config)
            self.config, self.executables = config, executables
            self._work.adopt(config)
        finally:
            self.reset()
        self.warm_up()

    def launch(self, plan: StepPlan) -> Pending:
        """Send the plan to the device: one transfer, one dispatch, more only for unusual admissions."""
        for seq in plan.admitted:
            if needs_configure(self.config, seq):
                vector = build_configure(self.config, self._configure_layout, seq, self.model.vocab_size)
                self.configure(vector)
        key = step_key(self.config, plan)
        vector = build(self.config, key, self._layouts[key], plan)
        self.counters.phases.lap("build")
        executable = self.executables[key.name]
        output: StepOutput = jax.tree.unflatten(executable.structures[2], self.step(executable, vector))
        self._count(key, plan)
        pending = Pending(plan, key, self.config.num_groups, output)
        for array in pending.wanted():
            array.copy_to_host_async()
        self.counters.phases.lap("dispatch")
        return pending

    def _count(self, key: StepKey, plan: StepPlan) -> None:
        self._work.add(key, plan)
        counters, steps = self.counters, max(plan.num_steps, 1)
        used = plan.num_prefill_tokens + sum(plan.decode_rows.counts)
        counters.steps[key.name] = counters.steps.get(key.name, 0) + 1
        counters.tokens_used += used
        counters.tokens_padded += self.config.num_groups * (key.tokens + key.rows * steps) - used

    def token_logits(self, executable: Executable, vector: np.ndarray) -> np.ndarray:
        """float32 [tokens, vocab] of a chunk, through a program of `programs.logits_program`."""
        return np.asarray(self.step(executable, vector)[0])

    def warm_up(self) -> None:
        """Run programs once on idle rows, so that the first request pays for nothing.

        On a CPU a loaded program has nothing left to do, and a step of idle prompts takes as long as one of real ones.
        """
        on_cpu, smallest = self.config.target.platform == "cpu", min(self.config.token_buckets)
        for key, layout in self._layouts.items():
            if on_cpu and key.tokens > smallest:
                continue
            jax.block_until_ready(self.step(self.executables[key.name], idle_vector(self.config, layout)))
        self.configure(idle_vector(self.config, self._configure_layout))
        jax.block_until_ready(self._slots)

    def configure(self, vector: np.ndarray) -> None:
        """Fill the heavy rows of one slot."""
        (self._slots,) = self.executables["configure"](self._slots, [vector])

    def step(self, executable: Executable, vector: np.ndarray) -> list[Array]:
        self._kv, self._slots, output = executable(self._params, self._kv, self._slots, [vector])
        return output


def _detail(output: StepOutput) -> tuple[Array, Array, Array]:
    return output.logprobs, output.top_ids, output.top_logprobs
