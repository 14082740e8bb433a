"""The real step programs through the compiler of a chip that need not be there: bytes, collectives, seconds.

Layers are unrolled in a program, so compiling all of them takes minutes. Two depths are compiled instead: two layers of
each kind, since the second differs from the first in what lives through it, and the same with one more of a kind; what
that adds is added as often as the model has more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import SingleDeviceSharding

from engine.batch import StepKey
from engine.chained import turns_a_token
from engine.config import EngineConfig
from engine.estimate.chips import Topology
from engine.estimate.hlo import Found, collectives_of
from engine.estimate.links import Collective, merged
from engine.executables import Executable, Memory, Program
from engine.model.config import LayerSpec, ModelConfig
from engine.model.place import one_stage
from engine.programs import step_program
from sharding.mesh import mesh_of
from sharding.topology import topology_devices

Source = Literal["compiled HLO", "lowered HLO"]
Effort = Literal["quick", "served"]
# libtpu takes a third of the time so. What it decides differently is temporaries, of which there are more.
QUICK = {"optimization_level": "O0"}


@dataclass(frozen=True)
class How:
    """How much is compiled. quick: for TPUs, with few optimizations. full: all layers, however long it takes."""

    effort: Effort = "quick"
    full: bool = False

    def options(self, config: EngineConfig) -> dict[str, str] | None:
        return QUICK if self.effort == "quick" and config.target.platform == "tpu" else None


class DoesNotCompile(Exception):
    """The compiler's reason, in one line."""


@dataclass(frozen=True)
class Compiled:
    """What a compiler said of one step program, on one device."""

    name: str
    memory: Memory
    collectives: Found
    source: Source  # of the collectives
    seconds: float  # that lowering and compiling took here, of all depths
    layers: int  # compiled at most, of the model's

    @property
    def extra(self) -> int:
        """Bytes beside what the program is given: temporaries, code, and outputs that are new."""
        return self.memory.temporary + self.memory.code + self.memory.outputs - self.memory.aliased


def compile_steps(
    model: ModelConfig, config: EngineConfig, topology: Topology, keys: Sequence[StepKey], how: How
) -> list[Compiled]:
    """The step programs, two at a time. Raises DoesNotCompile."""
    devices = devices_of(topology)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda key: compile_step(model, config, key, devices, how), keys))


def compile_step(model: ModelConfig, config: EngineConfig, key: StepKey, devices: Sequence[Any], how: How) -> Compiled:
    """One step program for the devices; extrapolated over layers of the same kind unless all are asked for."""
    found = _all_layers(model, config, key, devices, how)
    if key.tokens or not config.chains_steps:
        return found
    return replace(found, collectives=found.collectives * turns_a_token(config))  # a loop's body is one turn


def _all_layers(model: ModelConfig, config: EngineConfig, key: StepKey, devices: Sequence[Any], how: How) -> Compiled:
    layers, stages = one_stage(model, config.shards).layers, config.shards.count("layers")
    kinds = list(dict.fromkeys(layers))
    base = [kind for turn in (1, 2) for kind in kinds if layers.count(kind) >= turn]
    # Packed parameters of a checkpoint and overrides name layers, so these are not alike by their kind.
    if how.full or config.stored or config.shards.in_layers or len(layers) <= len(base) + 1:
        return compile_whole(model, config, key, devices, how)
    first = found = compile_whole(replace(model, layers=tuple(base) * stages), config, key, devices, how)
    seconds = first.seconds
    for kind in kinds:
        more = layers.count(kind) - 2
        if more < 1:
            continue
        second = compile_whole(replace(model, layers=_with_one_more(base, kind) * stages), config, key, devices, how)
        seconds += second.seconds
        found = _extrapolated(found, first, second, more)
    return replace(found, seconds=seconds, layers=stages * (len(base) + 1))


def _with_one_more(layers: Sequence[LayerSpec], kind: LayerSpec) -> tuple[LayerSpec, ...]:
    at = layers.index(kind)
    return (*layers[:at], kind, *layers[at:])


def _extrapolated(found: Compiled, first: Compiled, second: Compiled, times: int) -> Compiled:
    """`found` and so many times what `second` has over `first`."""

    def line(name: str) -> int:
        of = [getattr(compiled.memory, name) for compiled in (found, first, second)]
        return of[0] + times * (of[2] - of[1])

    names = ("arguments", "outputs", "aliased", "temporary", "code")
    old, one, two = (compiled.collectives for compiled in (found, first, second))
    calls = Found(
        _added(old.always, one.always, two.always, times), _added(old.branches, one.branches, two.branches, times)
    )
    return replace(found, memory=Memory(**{name: line(name) for name in names}), collectives=calls)


def _added(
    found: Sequence[Collective], first: Sequence[Collective], second: Sequence[Collective], times: int
) -> tuple[Collective, ...]:
    def often(calls: Sequence[Collective], count: int) -> list[Collective]:
        return [replace(call, count=count * call.count) for call in calls]

    return merged([*found, *often(first, -times), *often(second, times)])


def compile_whole(model: ModelConfig, config: EngineConfig, key: StepKey, devices: Sequence[Any], how: How) -> Compiled:
    """One step program with all layers of `model`. Raises DoesNotCompile."""
    started = time.perf_counter()
    try:
        mesh = mesh_of(config.shards, devices)
        program = step_program(model, config, key, mesh)
        lowered = (_on(program, devices[0]) if mesh is None else program).lower()
        executable = Executable(program, lowered.compile(how.options(config)))
    except Exception as error:  # whatever a compiler or a kernel raises is its answer
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DoesNotCompile(lines[0][:300]) from error
    collectives, source = _collectives(lowered, executable, config)
    seconds = time.perf_counter() - started
    return Compiled(program.name, executable.memory(), collectives, source, seconds, model.num_layers)


def _on(program: Program, device: Any) -> Program:
    place = SingleDeviceSharding(device)
    inputs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), program.inputs)
    return replace(program, inputs=inputs)


def _collectives(lowered: jax.stages.Lowered, executable: Executable, config: EngineConfig) -> tuple[Found, Source]:
    """From the text of the compiled program; libtpu has none for some chips, and then of what went in."""
    mesh = [(axis.name, axis.size) for axis in config.shards.mesh]
    try:
        text = executable.compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if text:
        return collectives_of(text, mesh), "compiled HLO"
    module: Any = lowered.compiler_ir("hlo")
    return collectives_of(module.as_hlo_text(), mesh), "lowered HLO"


def stay_on_cpu(num_devices: int) -> None:
    """Let this process have so many CPU devices and look for no others, if it has made none yet.

    Compiling needs no accelerator, and a GPU's plugin without its libraries would not even compile.
    `devices_of` says when there are too few.
    """
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:  # they are made
        return
    jax.config.update("jax_platforms", "cpu")


def devices_of(topology: Topology) -> list[Any]:
    """Abstract devices of the topology, or CPU devices of this process. Raises DoesNotCompile."""
    if topology.chip.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.num_devices:
            raise DoesNotCompile(f"{topology.name}: this process has {len(found)} CPU devices")
        return list(found)
    try:
        found = topology_devices(topology.name)
    except Exception as error:  # no compiler for it is installed, or it knows no such slice
        raise DoesNotCompile(f"{topology.name}: {str(error).strip().splitlines()[0][:300]}") from error
    if len(found) != topology.num_devices:
        raise DoesNotCompile(f"{topology.name}: the compiler sees {len(found)} devices, not {topology.num_devices}")
    return found
