"""What is predicted against what a compiler and real arrays say, on CPU devices. test_compiled.py runs it.

One compilation of all layers is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from engine.batch import StepKey, step_layout
from engine.chained import turns_a_token
from engine.config import EngineConfig, EngineOptions
from engine.estimate.chips import topology_of
from engine.estimate.compiled import Compiled, How, compile_step, devices_of
from engine.estimate.count import Span, Step, count_step
from engine.estimate.hlo import collectives_of
from engine.estimate.links import Collective
from engine.estimate.memory import holding
from engine.executables import placed
from engine.model.config import LayerSpec, ModelConfig
from engine.programs import held_bytes, page_bytes, param_cuts, param_shapes, step_program
from sharding.mesh import mesh_of
from tests.engine.world import ROPE
from tests.sharding.on_eight_devices import DENSE, EXPERTS, IN_STAGES, LATENT, config_of

DEPTH = 5
MODEL = replace(DENSE, layers=(LayerSpec(ROPE),) * DEPTH)
KEY = StepKey(0, 6)
slow = pytest.mark.slow
LAID = [
    pytest.param(EXPERTS, "ep", marks=slow, id="experts-ep"),
    pytest.param(EXPERTS, "tp-ep", marks=slow, id="experts-tp-ep"),
    pytest.param(EXPERTS, "overrides.yaml", id="experts-overrides"),
    pytest.param(LATENT, "tp", marks=slow, id="latent-tp"),
    pytest.param(DENSE, "dp-attention", id="dense-dp-attention"),
    pytest.param(IN_STAGES, "pp", id="experts-pp"),
    pytest.param(EXPERTS, "context", id="experts-context"),
    pytest.param(EXPERTS, "dp-attention", marks=slow, id="experts-dp-attention"),
    pytest.param(EXPERTS, "tp-dp", marks=slow, id="experts-tp-dp"),
    pytest.param(EXPERTS, "data-context.yaml", marks=slow, id="experts-data-context"),
]
REAL = [pytest.param(MODEL, "tp", id="dense-tp"), *LAID]


@pytest.fixture(scope="module")
def whole() -> Compiled:
    return compile_step(MODEL, config_of(MODEL, "tp"), KEY, devices_of(topology_of("cpu:4")), How(full=True))


def test_two_depths_and_a_line_are_all_layers(whole: Compiled) -> None:
    found = compile_step(MODEL, config_of(MODEL, "tp"), KEY, devices_of(topology_of("cpu:4")), How())
    assert (found.layers, whole.layers) == (3, DEPTH)
    assert (found.memory, found.collectives) == (whole.memory, whole.collectives)


def test_the_compilers_bytes_are_the_predicted(whole: Compiled) -> None:
    config = config_of(MODEL, "tp")
    vector = 4 * step_layout(config, KEY).size
    pool = config.num_pages * page_bytes(MODEL, config)
    # The allocator rounds nothing on a CPU, so arguments are the sum of the arrays.
    assert whole.memory.arguments == held_bytes(MODEL, config) + pool + vector


@pytest.mark.parametrize(("model", "strategy"), REAL)
def test_real_arrays_take_the_predicted_bytes(model: ModelConfig, strategy: str) -> None:
    """Weights put on their devices, and weighed there."""
    config = config_of(model, strategy)
    mesh, cuts = mesh_of(config.shards), param_cuts(model, config)
    assert mesh is not None
    made = {
        name: jax.device_put(jnp.zeros(shape.shape, shape.dtype), placed(mesh, shape, cuts[name]))
        for name, shape in param_shapes(model, config).items()
    }
    found = sum(array.addressable_shards[0].data.nbytes for array in made.values())
    assert found == holding(EngineOptions(), model, config, topology_of("cpu:4")).weights


def calls(collectives: Sequence[Collective]) -> dict[str, float]:
    """Bytes of each kind. XLA joins calls that stand side by side, so their number is no measure.

    Left out: what groups of requests ask each other (whether any goes on, how experts are loaded), a few numbers.
    """
    found: dict[str, float] = {}
    for call in (call for call in collectives if call.bytes > 64):
        found[call.kind] = found.get(call.kind, 0.0) + call.bytes * call.count
    return found


def counted(model: ModelConfig, config: EngineConfig) -> dict[str, float]:
    return calls(count_step(model, config, Step(6, 6, (Span(1, 9, 6),))).collectives)


def test_counted_collectives_are_the_compilers(whole: Compiled) -> None:
    assert counted(MODEL, config_of(MODEL, "tp")) == calls(whole.collectives.always)
    assert {call.axes for call in whole.collectives.always} == {("tensor",)}


def lowered(model: ModelConfig, config: EngineConfig) -> dict[str, float]:
    program = step_program(model, config, KEY, mesh_of(config.shards))
    module: Any = program.lower().compiler_ir("hlo")
    found = collectives_of(module.as_hlo_text(), [(axis.name, axis.size) for axis in config.shards.mesh])
    return calls((found * turns_a_token(config) if config.chains_steps else found).always)


@pytest.mark.parametrize(("model", "strategy"), LAID)
def test_counted_collectives_are_those_of_the_lowered_program(model: ModelConfig, strategy: str) -> None:
    config = config_of(model, strategy)
    assert counted(model, config) == pytest.approx(lowered(model, config))


@slow
def test_counted_collectives_of_stages_that_wait_for_each_step() -> None:
    config = config_of(IN_STAGES, "pp", decode_steps=1)
    assert not config.chains_steps
    assert counted(IN_STAGES, config) == lowered(IN_STAGES, config)
