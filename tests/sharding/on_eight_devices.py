"""Sharding files on four of eight CPU devices against the same model on one. test_sharded.py runs it.

float32: logits to 1e-5 relative, and under the equality net the engine's tokens are a naive forward's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engine import placement
from engine.batch import StepKey
from engine.config import Draft, EngineConfig, EngineOptions
from engine.executables import Executable, NoProgramCache, Program, ProgramCache, compile_all, compile_one, packed
from engine.load import layouts
from engine.logits import TokenLogits
from engine.model.config import Experts, Latent, LayerSpec, ModelConfig
from engine.model.params import axis_sizes, param_axes, param_specs
from engine.model.quantization import pack
from engine.placement import assembled, placer
from engine.plan import Layout
from engine.program_key import program_key
from engine.programs import empty_programs, page_bytes, served_models, serving_programs, step_program
from engine.request import Request, SamplingParams
from engine.resolve import DeviceFacts, shards_of
from engine.runner import Runner
from engine.stats import Counters
from sharding.mesh import mesh_of
from sharding.params import init_array
from sharding.rules import load_strategy
from sharding.shards import Axis, Shards
from tests.engine.test_draft_model import PROMPTS, Accepted, greedy, serve
from tests.engine.test_equality import run_schedule
from tests.engine.world import CONFIG, MODEL, ROPE, Client, World, check_choice
from tests.oracle import naive_logits

DEVICES = 4
DENSE = replace(
    MODEL, vocab_size=100, hidden_size=32, intermediate_size=512, num_q_heads=8, num_kv_heads=4, qk_norm="full",
    layers=(LayerSpec(ROPE), LayerSpec(ROPE, window=24)),
)  # fmt: skip
EXPERTS = replace(
    DENSE, qk_norm="head", layers=(LayerSpec(ROPE, ffn="experts"), LayerSpec(ROPE, window=24)), tie_embeddings=False,
    attention_sinks=True, output_bias=True, qkv_bias=True,
    experts=Experts(
        num_experts=8, per_token=2, intermediate_size=512, shared_size=512, shared_gate=True, biases=True, clamp=7.0,
        router_bias=True,
    ),
)  # fmt: skip
LATENT = replace(
    EXPERTS, num_q_heads=4, num_kv_heads=4, head_dim=24, qk_norm="none", attention_softcap=None, attention_sinks=False,
    layers=(LayerSpec(ROPE, mixer="latent"), LayerSpec(ROPE, mixer="latent", ffn="experts")), qkv_bias=False,
    output_bias=False,
    latent=Latent(kv_rank=16, nope_dim=8, rope_dim=16, value_dim=12, q_rank=20),
)  # fmt: skip
IN_STAGES = replace(EXPERTS, layers=EXPERTS.layers * 2)
TWO_STAGES = replace(EXPERTS, layers=(LayerSpec(ROPE, window=24, ffn="experts"),) * 2)  # compiles in half the time
DENSE_IN_STAGES, LATENT_IN_STAGES = replace(DENSE, layers=DENSE.layers * 2), replace(LATENT, layers=LATENT.layers * 2)
GROUPED = replace(DENSE, num_kv_heads=2, qkv_bias=True, attention_sinks=True, attention_gate=True)
GROUPED_IN_STAGES = replace(GROUPED, layers=DENSE.layers * 2)
slow = pytest.mark.slow
# Two sums a layer and one for the embedding; the logits are gathered. The dense model norms over all heads, q and k
# at once, which takes one more.
TWO_A_LAYER = {"all-reduce": 1 + 2 * 2, "all-gather": 1}
COLLECTIVES = [
    pytest.param("dense", "tp", {"all-reduce": 1 + 2 * 3, "all-gather": 1}, marks=slow),
    pytest.param("experts", "tp", TWO_A_LAYER, marks=slow),
    pytest.param("experts", "ep", TWO_A_LAYER, marks=slow),
    pytest.param("latent", "tp", TWO_A_LAYER, marks=slow),
    # The embedding and the second layer's MLP are whole.
    pytest.param("experts", "overrides.yaml", {"all-reduce": 3, "all-gather": 1}, marks=slow),
    # Besides, in each layer, tokens are gathered and given back, and once it is asked whether any group goes on.
    pytest.param(
        "dense", "dp-attention", {"all-reduce": 1 + 2 * 3 + 1, "all-gather": 1 + 2, "reduce-scatter": 2}, marks=slow
    ),
    pytest.param("experts", "tp-dp", {"all-reduce": 1 + 2 * 2 + 2, "all-gather": 1}, marks=slow),
    # A maximum and a sum more in each layer, over the parts of the pages.
    pytest.param("latent", "context", {"all-reduce": 1 + 2 * 4, "all-gather": 1}, marks=slow),
    # In a turn of the loop two layers, whose activations go on, and the last stage's to everybody.
    pytest.param(
        "experts-4", "pp", {"all-reduce": 1 + 2 * 2 + 1, "collective-permute": 1, "all-gather": 1}, marks=slow
    ),
    pytest.param("grouped", "tp-replicated", {"all-reduce": 1 + 2 * 3, "all-gather": 1}, marks=slow),
]
MODELS = {
    "dense": DENSE, "experts": EXPERTS, "latent": LATENT, "grouped": GROUPED, "experts-4": IN_STAGES,
    "experts-2": TWO_STAGES, "grouped-4": GROUPED_IN_STAGES,
    "dense-4": DENSE_IN_STAGES, "latent-4": LATENT_IN_STAGES,
}  # fmt: skip
CASES = [
    pytest.param("dense", "tp", marks=slow),
    pytest.param("grouped", "tp-replicated", marks=slow),  # whose tokens the resharding below sees
    pytest.param("dense", "dp-attention"),
    *(pytest.param(kind, "dp-attention", marks=slow) for kind in ("experts", "latent")),
    pytest.param("experts", "tp-dp", marks=slow),
    *(pytest.param(kind, "pp", marks=slow) for kind in ("dense-4", "experts-4", "latent-4")),
    *(pytest.param(kind, "context", marks=slow) for kind in ("dense", "experts", "latent")),
    pytest.param("experts", "tp-ep", marks=slow),
    pytest.param("experts", "overrides.yaml", marks=slow),
    *(pytest.param(kind, "data-context.yaml", marks=slow) for kind in ("dense", "experts", "latent")),
    *(pytest.param(kind, name, marks=slow) for kind in ("experts", "latent") for name in ("tp", "ep")),
]
STORE = TemporaryDirectory()  # going back to a layout loads its programs
SMALL = replace(CONFIG, token_buckets=(48,), decode_buckets=(6,), prefill_decode_buckets=(6,), in_panels=False)


def config_of(model: ModelConfig, strategy: str, **changes: Any) -> EngineConfig:
    """strategy: as of `load_strategy`, or a file beside this one."""
    beside = Path(__file__).parent / strategy
    found = load_strategy(str(beside) if beside.is_file() else strategy)
    return replace(SMALL, shards=found.shards(axis_sizes(model), DEVICES, param_axes(model)), **changes)


@cache
def host_params(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    specs = param_specs(MODELS[kind], jnp.dtype(jnp.float32)).items()
    # Biases are zeros by declaration; here they must be seen.
    found = {
        name: rng.standard_normal(spec.shape).astype(np.float32) * 0.1
        if spec.init == "zeros"
        else init_array(spec, rng)
        for name, spec in specs
    }
    found["embed"] *= 4.0
    return found


def flat(kind: str) -> dict[str, Any]:
    """On one device, as a model that is not cut has them."""
    specs = param_specs(MODELS[kind], jnp.dtype(jnp.float32))
    return {name: jnp.asarray(pack(specs[name], array, None)) for name, array in host_params(kind).items()}


def stored(config: EngineConfig) -> ProgramCache:
    return ProgramCache(Path(STORE.name), program_key("engine.programs", config=config))


def runner_of(kind: str, config: EngineConfig, executables: dict[str, Executable]) -> Runner:
    model, params = MODELS[kind], {}
    for prefix, one, own in served_models(model, config):  # a draft model has the same weights
        put = placer(one, own)
        held = assembled(one, own, {name: put(name, array) for name, array in host_params(kind).items()})
        params |= {prefix + name: array for name, array in held.items()}
    return Runner(model, config, params, executables, Counters())


@cache
def world_of(kind: str, config: EngineConfig) -> World:
    model, programs = MODELS[kind], serving_programs(MODELS[kind], config, mesh_of(config.shards))
    runner = runner_of(kind, config, compile_all(programs, stored(config), lambda phase, done, of: None))
    runner.warm_up()
    return World(model, config, flat(kind), runner, runner.counters)


def check_logits(world: World) -> None:
    tokens = np.random.default_rng(5).integers(0, 97, 100).tolist()
    engine = world.engine().start()
    found, wanted = TokenLogits(engine)(tokens), naive_logits(world.model, world.params, tokens)
    engine.stop()
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


@pytest.mark.parametrize(("kind", "strategy"), [("latent", "context"), ("experts-2", "pp")])
def test_logits_alone(kind: str, strategy: str) -> None:
    """One program; what decodes is compiled on demand, below."""
    config = config_of(MODELS[kind], strategy)
    empty = empty_programs(MODELS[kind], config, mesh_of(config.shards))
    runner = runner_of(kind, config, compile_all(empty, NoProgramCache(), lambda phase, done, of: None))
    check_logits(World(MODELS[kind], config, flat(kind), runner, runner.counters))


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_logits_and_tokens_are_those_of_one_device(kind: str, strategy: str) -> None:
    config = config_of(MODELS[kind], strategy)
    assert config.shards.num_devices == DEVICES
    world = world_of(kind, config)
    check_logits(world)
    for seed in (0, 1):
        run_schedule(world, seed, overlap=seed == 1)


@slow
@pytest.mark.parametrize(("kind", "strategy"), [("experts-2", "pp"), ("dense", "context"), ("dense", "dp-attention")])
def test_proposed_tokens_are_verified_as_decoded(kind: str, strategy: str) -> None:
    """Micro-batches of what is verified, keys of it on several devices, and groups that verify together. Experts once
    lost their load there."""
    world = world_of(kind, config_of(MODELS[kind], strategy, draft_tokens=3))
    run_schedule(world, 0, overlap=False)


@slow
@pytest.mark.parametrize(("kind", "strategy"), [("experts", "tp"), ("latent", "context"), ("experts", "dp-attention")])
def test_a_draft_model_is_cut_as_the_model_is(kind: str, strategy: str) -> None:
    config = config_of(MODELS[kind], strategy, draft_tokens=3)
    drafted = replace(config, draft=Draft(MODELS[kind], "float32", "float32", (), config.shards))
    world, seen = world_of(kind, drafted), Accepted()
    run_schedule(world, 0, overlap=True)
    engine = world.engine(enable_prefix_caching=False)
    seen.watch(engine, [3, 0, 0, *[3] * 99])
    serve(world, engine, [greedy(str(len(p)), p, 40) for p in PROMPTS])
    assert seen.drawn == seen.possible > 50


@pytest.mark.parametrize(("kind", "strategy", "expected"), COLLECTIVES)
def test_collectives_of_a_decode_step(kind: str, strategy: str, expected: dict[str, int]) -> None:
    """Golden counts: a change that adds one fails here."""
    model, config = MODELS[kind], config_of(MODELS[kind], strategy)
    program = step_program(model, config, StepKey(0, 6), mesh_of(config.shards))
    text = compile_one(program, NoProgramCache()).compiled.as_text() or ""
    found = {
        name: len(re.findall(rf" {name}(?:-start)?\(", text))
        for name in ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    }
    assert {name: count for name, count in found.items() if count} == expected


@pytest.mark.parametrize("devices", [1, 4])
def test_stored_programs_load_on_fewer_devices_than_there_are(devices: int, tmp_path: Path) -> None:
    """Told of all eight, XLA ends the process."""
    shards = Shards((Axis("x", devices),))
    mesh, shape = mesh_of(shards), jax.ShapeDtypeStruct((8,), jnp.float32)
    program = Program("twice", lambda x: (2 * x,), (shape,), (), (shape,), mesh, ((PartitionSpec(),), PartitionSpec()))
    cache = ProgramCache(tmp_path, program_key("engine.programs"))
    cache.keep(program.name, packed(Executable(program, program.lower().compile())))
    loaded = cache.load(program)
    assert loaded is not None
    x = jax.device_put(jnp.arange(8.0), None if mesh is None else NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(loaded([x])[0][0], 2 * np.arange(8.0))


HALVES = "mesh: {x: 2}\nrules:\n- kv_heads: x\n- mlp: x\n"
SPREAD = "mesh: {c: 2, x: 2}\nrules:\n- sequence: c\n- kv_heads: x\n- mlp: [c, x]\n"


STAGES = "mesh: {s: 2, x: 2}\nrules:\n- layers: s\n- kv_heads: x\n- mlp: x\n- vocab: x\n"
RESHARDED = [
    pytest.param("grouped", HALVES, 2),
    pytest.param("grouped", SPREAD, 4, marks=slow),
    pytest.param("grouped-4", STAGES, 4, marks=slow),
]


@pytest.mark.parametrize(("kind", "other", "devices"), RESHARDED)
def test_resharding_under_load_loses_nobody(
    kind: str, other: str, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four devices, others, four again while requests run; then a device fails, and everything is as it was."""
    model, config = MODELS[kind], config_of(MODELS[kind], "tp-replicated")
    world, two = world_of(kind, config), tmp_path / "two.yaml"
    four = (resources.files("configs") / "sharding" / "tp-replicated.yaml").read_text().replace("fill", "4")
    (tmp_path / "four.yaml").write_text(four)
    two.write_text(other)
    engine, device = world.engine(), DeviceFacts("cpu", 1 << 32, False, count=8)
    before = world.counters.num_preemptions
    options = EngineOptions(kv_cache_memory_bytes=(config.num_pages - 1) * page_bytes(model, config))
    prepare = layouts(options, world.runner, device, stored)
    clients: list[Client] = []
    names = [str(two), str(tmp_path / "four.yaml")]

    def load(count: int) -> None:
        for i in range(len(clients), len(clients) + count):
            prompt, params = tuple(range(i, i + 40)), SamplingParams(temperature=float(i % 2), seed=i, max_tokens=50)
            clients.append(Client.of(Request(request_id=str(i), prompt_token_ids=prompt, params=params)))
            engine.submit(clients[-1].request, clients[-1])

    def prepared(name: str) -> Layout:
        """The move comes when four decode."""
        layout, asked = prepare(name), len(clients)
        load(4)
        while not all(client.tokens[0] for client in clients[asked:]):
            time.sleep(0.001)
        return layout

    engine._layouts = prepared
    engine.start()
    for count, name in zip((devices, 4), names, strict=True):
        engine.reshard(name)
        assert len(world.runner._params[0].sharding.device_set) == count
    to_shards, layout = placement._to_shards, engine.config
    monkeypatch.setattr(placement, "_to_shards", lambda model, new: failing(to_shards(model, new), new is not layout))
    with pytest.raises(RuntimeError, match="a device is gone"):
        engine.reshard(names[0])
    assert engine.config is layout
    assert engine.drain(60)
    engine.stop()
    assert world.counters.num_preemptions - before >= 3, "what ran was computed again"
    for i, client in enumerate(clients):
        check_choice(world, client.request, i, client.tokens[0], client.finished[0])
        assert len(client.tokens[0]) == 50


def test_moved_weights_are_those_that_are_loaded(tmp_path: Path) -> None:
    """Between copies, halves and stages, packed ones with their scales, and all the way back. Others move below."""
    kind, files = (
        "grouped-4",
        {"halves": HALVES, "stages": STAGES, "staged": STAGES.replace("s: 2, x: 2", "x: 2, s: 2")},
    )
    model, copies = MODELS[kind], config_of(MODELS[kind], "tp-replicated", quantization="int8")
    configs = {"copies": copies}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        configs[name] = replace(copies, shards=shards_of(str(tmp_path / name), model, DEVICES))

    def loaded(config: EngineConfig) -> list[jax.Array]:
        put = placer(model, config)
        return jax.tree.leaves(assembled(model, config, {n: put(n, a) for n, a in host_params(kind).items()}))

    now, held = copies, loaded(copies)
    for name in ("stages", "staged", "halves", "stages", "copies"):
        placement.move(model, held, now, configs[name])
        now = configs[name]
        for found, wanted in zip(held, loaded(now), strict=True):
            assert found.sharding == wanted.sharding
            np.testing.assert_array_equal(found, wanted)


def failing(put: Callable[[str, Any], Any], broken: bool) -> Callable[[str, Any], Any]:
    def place(name: str, array: Any) -> Any:
        if broken and name.endswith("qkv"):
            raise RuntimeError("a device is gone")
        return put(name, array)

    return place
