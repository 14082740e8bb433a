"""One layout (a topology, a sharding file, a packing) judged: what it holds, what it allows, what a compiler says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engine.batch import StepKey, lattice
from engine.config import EngineConfig, EngineOptions
from engine.errors import InvalidParam, ModelError
from engine.estimate.chips import Topology
from engine.estimate.compiled import Compiled, DoesNotCompile, How, compile_steps
from engine.estimate.count import count_step, decode_step
from engine.estimate.links import Collective, merged
from engine.estimate.memory import Holding, changes_that_fit, fits, holding
from engine.estimate.roofline import Decode, Prefill, decode_bound, prefill_bound
from engine.explain import planned_config
from engine.model.config import ModelConfig
from sharding.rules import strategies

Goal = Literal["tpot", "throughput", "context"]
PROMPTS = (512, 2048, 8192)
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXT = 2048


@dataclass(frozen=True)
class Question:
    """What is asked of every layout: prompts for TTFT, batches and their length for TPOT; empty: what fits of these."""

    prompts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    context: int | None = None
    price: float | None = None  # of a chip-hour

    def resolved(self, config: EngineConfig) -> Question:
        """With defaults, for one layout. Raises InvalidParam for what it cannot run."""
        longest, seqs = config.max_model_len, config.num_groups * config.max_num_seqs
        for name, values, most in (("prompt", self.prompts, longest), ("batch", self.batches, seqs)):
            wrong = next((value for value in values if not 1 <= value <= most), None)
            if wrong is not None:
                raise InvalidParam(name, f"{wrong} is not between 1 and {most}")
        if self.context is not None and not 1 <= self.context <= longest:
            raise InvalidParam("context", f"{self.context} is not between 1 and {longest}")
        return replace(
            self,
            prompts=self.prompts or tuple(p for p in PROMPTS if p <= longest) or (longest,),
            batches=self.batches or tuple(b for b in BATCHES if b <= seqs),
            context=self.context or min(CONTEXT, longest),
        )


@dataclass(frozen=True)
class Layout:
    """What is known of one way to lay a model."""

    options: EngineOptions
    model: ModelConfig
    config: EngineConfig
    topology: Topology
    question: Question
    memory: Holding
    programs: int  # in the closed set
    counted: tuple[Collective, ...]  # of a decode step in its largest bucket
    decodes: tuple[Decode, ...] = ()  # none where the chip's rates are not known
    prefills: tuple[Prefill, ...] = ()
    compiled: tuple[Compiled, ...] = ()
    problem: str | None = None  # why nothing was compiled
    changes: tuple[tuple[str, Holding], ...] = ()  # that would make it fit

    @property
    def name(self) -> str:
        packed = f", {self.options.quantization}" if self.options.quantization != "auto" else ""
        return f"{self.topology.name}, {self.options.sharding}{packed}"

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.config)

    def has_room(self, decode: Decode) -> bool:
        """Whether the cache holds the batch."""
        return self.memory.sequences(decode.context) >= decode.batch

    @property
    def roomy(self) -> list[Decode]:
        return [decode for decode in self.decodes if self.has_room(decode)]


def judged(options: EngineOptions, model: ModelConfig, topology: Topology, question: Question) -> Layout:
    """By the count alone. Raises InvalidParam or ModelError where the sharding does not fit the model."""
    config = planned_config(options, model, topology.device)
    asked = question.resolved(config)
    context = asked.context or CONTEXT
    rates = topology.chip.has_rates
    largest = count_step(model, config, decode_step(config, config.num_groups * config.max_num_seqs, context))
    found = Layout(
        options=options,
        model=model,
        config=config,
        topology=topology,
        question=asked,
        memory=holding(options, model, config, topology),
        programs=len(lattice(config)) + 1,
        counted=merged(largest.collectives),
        decodes=tuple(decode_bound(model, config, topology, b, context) for b in asked.batches if rates),
        prefills=tuple(prefill_bound(model, config, topology, p) for p in asked.prompts if rates),
    )
    return _with_changes(found)


def _with_changes(layout: Layout) -> Layout:
    if layout.fits:
        return layout
    changes = changes_that_fit(layout.options, layout.model, layout.topology, layout.memory.temporary)
    return replace(layout, changes=tuple(changes))


def hungriest(config: EngineConfig) -> list[StepKey]:
    """The largest decode and the largest prefill program: whose temporaries decide what is left for the cache."""
    return [StepKey(0, config.decode_buckets[-1], config.draft_tokens), max(lattice(config))]


def compiled(layout: Layout, how: How) -> Layout:
    """With the compiler's own account of the hungriest programs. One that has no room by the count is not compiled."""
    if not layout.fits:
        return replace(layout, problem="it has no room, so it was not compiled")
    # Pages that a pool of the whole room would have: their number shapes the programs, not their temporaries.
    config = replace(layout.config, num_pages=max(2, layout.memory.pages + 1))
    try:
        found = compile_steps(layout.model, config, layout.topology, hungriest(config), how)
    except DoesNotCompile as error:
        return replace(layout, problem=str(error))
    temporary = max(step.extra for step in found)
    memory = holding(layout.options, layout.model, layout.config, layout.topology, temporary)
    return _with_changes(replace(layout, compiled=tuple(found), memory=memory))


def searched(
    options: EngineOptions,
    model: ModelConfig,
    topologies: Sequence[Topology],
    question: Question,
    shardings: Sequence[str],
    quantizations: Sequence[str],
    goal: Goal,
) -> list[Layout]:
    """All combinations that divide and fit, the best for the goal first. No shardings: all of configs/sharding."""
    found = []
    for topology in topologies:
        for changed in _combinations(options, shardings or strategies(), quantizations):
            try:
                layout = judged(changed, model, topology, question)
            except (InvalidParam, ModelError):  # sizes that do not divide
                continue
            if layout.fits and all((layout.topology, layout.config) != (o.topology, o.config) for o in found):
                found.append(layout)
    return sorted(found, key=lambda layout: merit(layout, goal), reverse=True)


def _combinations(
    options: EngineOptions, shardings: Sequence[str], quantizations: Sequence[str]
) -> Iterator[EngineOptions]:
    for sharding in shardings:
        for quantization in quantizations:
            yield replace(options, sharding=sharding, quantization=quantization)


def merit(layout: Layout, goal: Goal) -> float:
    """Higher is better: the smallest batch's TPOT, the best batch's tokens a second and chip, or the cache's tokens."""
    if goal == "context":
        return layout.memory.tokens
    if not layout.roomy:
        return float("-inf")
    if goal == "tpot":
        return -layout.roomy[0].tpot_s
    return max(decode.tokens_per_s for decode in layout.roomy) / layout.topology.num_chips
