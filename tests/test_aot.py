"""The real step programs, compiled for chips that are not here.

Proves that they compile, and from the compiler's account that the KV pool and the weights
exist once: donated state is aliased and temporaries stay a small part of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from engine.batch import StepKey
from engine.config import EngineConfig, EngineOptions
from engine.executables import Executable, Memory, Program
from engine.kernels import kernel_choices
from engine.model.config import LayerSpec, ModelConfig, Rope
from engine.model.families import model_config
from engine.model.known import known_config
from engine.model.params import param_specs
from engine.programs import held_bytes, page_bytes, param_shapes, state_bytes, step_program
from engine.resolve import DeviceFacts, ModelFiles, resolve
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding.mesh import mesh_of
from sharding.topology import topology_devices

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_q_heads=9,
    num_kv_heads=3,
    head_dim=64,
    layers=(LayerSpec(Rope(tuple(100000.0 ** (-i / 32) for i in range(32)))),) * 30,
    max_position=8192,
    attention_scale=0.125,
    tie_embeddings=True,
)
LLAMA_8B, LLAMA_70B, QWEN3_30B = (known_config(name) for name in ("llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b"))
# Two layers of each other family that show its kinds of layer.
FAMILIES = {
    name: replace(model, layers=model.layers[start : start + 2])
    for name, start in {
        "mixtral-8x7b": 0,
        "gpt-oss-120b": 0,
        "deepseek-v2-lite": 0,
        "deepseek-v3": 2,
        "gemma-3-27b": 4,
    }.items()
    for model in (known_config(name),)
}
# Two layers with the sizes of Mamba 2 2.7B, Granite 4.0 H Small and Qwen3-Next 80B.
RECURRENT_FILES: dict[str, dict[str, Any]] = {
    hf["model_type"]: {"num_hidden_layers": 2, **hf}
    for hf in (
        {"model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2560, "num_heads": 80, "n_groups": 1},
        {
            "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 768,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 72, "num_experts_per_tok": 10,
            "shared_intermediate_size": 1536, "mamba_d_state": 128, "layer_types": ["mamba", "attention"],
            "max_position_embeddings": 131072,
        },
        {
            "model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5120,
            "num_attention_heads": 16, "layer_types": ["linear_attention", "full_attention"],
        },
    )
}  # fmt: skip
RECURRENT = {name: model_config(hf) for name, hf in RECURRENT_FILES.items()}
# Two layers of a model, and two with the sizes of a smaller one that drafts for it.
DRAFTED = {
    "qwen3-8b": tuple(replace(m, layers=m.layers[:2]) for m in map(known_config, ("qwen3-8b", "qwen3-0.6b"))),
    **{
        name: (RECURRENT[name], model_config(RECURRENT_FILES[name] | {"hidden_size": 768} | smaller))
        for name, smaller in {
            "mamba2": {"num_heads": 24},
            "granitemoehybrid": {
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
                "num_local_experts": 0,
                "mamba_n_heads": 48,
                "mamba_d_head": 32,
            },
        }.items()
    },
}
CHIPS = {
    "v6e:2x2": DeviceFacts("tpu", 32 << 30, True, "v6e"),
    "v5p:2x2x1": DeviceFacts("tpu", 95 << 30, True, "v5p"),
    "tpu7x:2x2x1": DeviceFacts("tpu", 96 << 30, True, "tpu7x"),
    "h200:1": DeviceFacts("gpu", 141 << 30, True, "h200"),
}
MESHES = {
    "v6e:2x2": DeviceFacts("tpu", 32 << 30, True, "v6e", 4),
    "v6e:2x4": DeviceFacts("tpu", 32 << 30, True, "v6e", 8),
    "tpu7x:2x2x1": DeviceFacts("tpu", 96 << 30, True, "tpu7x", 8),
    **{f"h200:{count}": DeviceFacts("gpu", 141 << 30, True, "h200", count) for count in (2, 4, 8)},
}
PACKED: dict[str, dict[str, Any]] = {"bf16": {}, "int8": {"quantization": "int8", "kv_cache_dtype": "int8"}}
POOL_BYTES = 3 << 30  # a quarter is more than a step's activations, and less than Llama-8B's LM head
KEYS = {"decode": StepKey(0, 64), "prefill": StepKey(1024, 0), "mixed": StepKey(256, 256), "verify": StepKey(0, 64, 4)}
PLAIN = ("decode", "prefill", "mixed")
SPECULATING: dict[str, Any] = {"speculation": "ngram", "draft_tokens": KEYS["verify"].drafts}


def compile_for(chip: str, program: Program) -> Memory:
    """Compile with every argument on the chip's first device; the compiler's account of it."""
    device = topology_devices(chip)[0]
    place = SingleDeviceSharding(device)
    inputs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), program.inputs)
    program = replace(program, inputs=inputs)
    return Executable(program, program.lower().compile()).memory()


def config_for(model: ModelConfig, chip: str, devices: dict[str, DeviceFacts] = CHIPS, **options: Any) -> EngineConfig:
    draft = ModelFiles(DRAFTED[options["draft_model"]][1], "bfloat16") if "draft_model" in options else None
    config = resolve(EngineOptions(max_model_len=8192, **options), model, "bfloat16", devices[chip], draft=draft)
    bytes_a_page = page_bytes(model, config)
    useful = config.max_num_seqs * config.max_pages_per_seq
    return replace(config, num_pages=POOL_BYTES // bytes_a_page if bytes_a_page else useful)


def pool_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of what the layers keep: pages and recurrent states."""
    return config.num_pages * page_bytes(model, config) + state_bytes(model, config)


def first_layers(model: ModelConfig, count: int) -> ModelConfig:
    """What one layer needs shows in two: a compiler takes minutes for all of them."""
    return replace(model, layers=model.layers[:count])


def cases() -> Iterator[Any]:
    """(model, kind of step, chip, options). Short: a small model whole, two layers of a large one."""
    slow = pytest.mark.slow
    for chip in ("v6e:2x2", "h200:1"):
        for kind in PLAIN:
            marks = [] if (kind, chip) == ("decode", "v6e:2x2") else [slow]
            yield pytest.param(SMOLLM2, kind, chip, {}, marks=marks, id=f"smollm2-{kind}-{chip}")
            yield pytest.param(LLAMA_8B, kind, chip, {}, marks=[slow], id=f"llama8b-{kind}-{chip}")
    for chip in ("v5p:2x2x1", "tpu7x:2x2x1", "h200:1"):
        for kind in PLAIN:
            two = first_layers(LLAMA_8B, 2)
            yield pytest.param(two, kind, chip, {}, marks=[slow], id=f"llama8b-2-{kind}-{chip}")
            for name, model, options, in_short in (
                ("qwen3-30b", QWEN3_30B, {}, None),
                ("llama70b", LLAMA_70B, PACKED["int8"], ("h200:1", "decode")),
            ):
                marks = [] if (chip, kind) == in_short else [slow]
                short = first_layers(model, 2)
                yield pytest.param(short, kind, chip, options, marks=marks, id=f"{name}-2-{kind}-{chip}")
                yield pytest.param(model, kind, chip, options, marks=[slow], id=f"{name}-{kind}-{chip}")
    for chip in ("v6e:2x2", "tpu7x:2x2x1", "h200:1"):
        for name, model in (FAMILIES | RECURRENT).items():
            for form, options in PACKED.items():
                for kind in ("decode", "prefill"):
                    yield pytest.param(model, kind, chip, options, marks=[slow], id=f"{name}-2-{form}-{kind}-{chip}")
        for name, model in ({"llama8b": first_layers(LLAMA_8B, 2)} | FAMILIES | RECURRENT).items():
            yield pytest.param(model, "verify", chip, SPECULATING, marks=[slow], id=f"{name}-2-verify-{chip}")
        for name, (model, _) in DRAFTED.items():
            options = SPECULATING | {"speculation": "draft", "draft_model": name}
            yield pytest.param(model, "verify", chip, options, marks=[slow], id=f"{name}-2-drafted-verify-{chip}")


@pytest.mark.aot
@pytest.mark.parametrize(("model", "kind", "chip", "options"), list(cases()))
def test_step_compiles_without_a_second_pool(model: ModelConfig, kind: str, chip: str, options: dict[str, Any]) -> None:
    """Nor a second copy of the weights; and on its kernels, not on their references."""
    config = config_for(model, chip, **options)
    key = KEYS[kind]
    memory = compile_for(chip, step_program(model, config, key))
    # Logits of what is proposed, and what sampling makes of those of a step with a prompt and many rows beside it.
    beyond = key.rows * (key.drafts + (3 if key.tokens else 0))
    pool, logits = pool_bytes(model, config), 4 * beyond * model.vocab_size
    assert memory.aliased >= pool, "the donated pool must be updated in place"
    told = f"{memory.temporary:,} bytes of temporaries beside a pool of {pool:,}"
    assert memory.temporary < pool / 4 + logits, told


def meshed_cases() -> Iterator[Any]:
    """(model, kind of step, devices, sharding, options)."""
    tensor = {"h200:2": ("llama-3.1-8b",), "h200:8": ("llama-3.1-8b", "llama-3.1-70b"), "h200:4": ("llama-3.1-70b",),
              "v6e:2x4": ("llama-3.1-8b", "llama-3.1-70b"), "tpu7x:2x2x1": ("llama-3.1-70b",)}  # fmt: skip
    for chip, names in tensor.items():
        for name in names:
            for kind in PLAIN:
                options = PACKED["int8"] if name.endswith("70b") else {}
                marks = [] if (chip, kind) == ("h200:2", "decode") else [pytest.mark.slow]
                yield pytest.param(name, kind, chip, "tp", options, marks=marks, id=f"{name}-tp-{kind}-{chip}")
    for chip in ("v6e:2x2", "h200:4"):
        for kind in PLAIN:
            for sharding in ("ep", "dp-attention"):
                case = ("qwen3-30b-a3b", kind, chip, sharding, {})
                yield pytest.param(*case, marks=[pytest.mark.slow], id=f"qwen3-30b-a3b-{sharding}-{kind}-{chip}")
            for sharding in ("context", "pp"):
                case = ("llama-3.1-8b", kind, chip, sharding, {})
                yield pytest.param(*case, marks=[pytest.mark.slow], id=f"llama-3.1-8b-{sharding}-{kind}-{chip}")


@pytest.mark.aot
@pytest.mark.parametrize(("name", "kind", "chip", "sharding", "options"), list(meshed_cases()))
def test_meshed_step_compiles_without_a_second_pool(
    name: str, kind: str, chip: str, sharding: str, options: dict[str, Any]
) -> None:
    """Two layers over all devices of a topology: each holds its share of weights and pages once."""
    model = first_layers(known_config(name), 2)
    config = config_for(model, chip, MESHES, sharding=sharding, **options)
    program = step_program(model, config, KEYS[kind], mesh_of(config.shards, topology_devices(chip)))
    memory = Executable(program, program.lower().compile()).memory()
    pool = pool_bytes(model, config)
    assert memory.aliased >= pool, "the donated pool must be updated in place"
    assert memory.temporary < pool / 4, f"{memory.temporary:,} bytes of temporaries beside a pool of {pool:,}"
    assert memory.arguments < pool + 1.05 * held_bytes(model, config), "a share of the weights, not all of them"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "model", [SMOLLM2, LLAMA_8B, LLAMA_70B, QWEN3_30B, *FAMILIES.values(), *RECURRENT.values()], ids=lambda m: m.family
)
@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_steps_run_on_kernels(model: ModelConfig, chip: str, packed: bool) -> None:
    """Not on their references, but for what a backend's own lowering does as well: see docs/kernels."""
    config = config_for(model, chip, **PACKED["int8" if packed else "bf16"])
    platform = config.target.platform
    chosen: dict[str, set[str]] = {}
    for line in kernel_choices(model, config):
        op, implementation = line.split()[:2]
        chosen.setdefault(op.removesuffix(":"), set()).add(implementation)
    for op, implementations in chosen.items():
        assert platform in implementations or op in left_to_xla(model, platform, packed), (op, implementations)


@pytest.mark.parametrize(("name", "chip", "sharding"), [
    ("llama-3.1-70b", "v6e:2x4", "tp"), ("llama-3.1-70b", "h200:8", "tp"), ("qwen3-30b-a3b", "h200:4", "ep"),
    ("gpt-oss-120b", "v6e:2x2", "ep"), ("gpt-oss-120b", "h200:4", "ep"),
])  # fmt: skip
def test_a_devices_share_runs_on_kernels(name: str, chip: str, sharding: str) -> None:
    """They are chosen for the shapes of one device: 8 query heads of 64 over one KV head of 8."""
    model = known_config(name)
    config = config_for(model, chip, MESHES, sharding=sharding)
    lines = [line for line in kernel_choices(model, config) if line.startswith(("decode_attention", "grouped"))]
    assert lines and all(line.split()[1] == config.target.platform for line in lines), lines


def left_to_xla(model: ModelConfig, platform: str, packed: bool) -> set[str]:
    """Ops that no kernel serves, as docs/architecture.md's table says."""
    ops = {"matmul", "gated", "rms_norm", "rope", "greedy", *(["expanded_prefill"] if model.latent else [])}
    if model.recurrence:
        ops |= {"short_conv"} | ({"ssd", "gated_delta"} if platform == "gpu" else set())
    if platform == "gpu":
        ops |= {"kv_write"} | ({"quantized_matmul"} if packed else set())
        if model.latent and packed:
            ops |= {"prefill_attention", "decode_attention"}
    return ops


@pytest.mark.aot
def test_the_check_sees_a_second_pool() -> None:
    """Without donation the same program must hold the pool twice."""
    model = first_layers(SMOLLM2, 2)
    config = config_for(model, "h200:1")
    program = replace(step_program(model, config, KEYS["decode"]), donated=())
    memory = compile_for("h200:1", program)
    pool = config.num_pages * page_bytes(model, config)
    assert memory.aliased < pool and memory.outputs >= pool


@pytest.mark.aot
def test_rows_are_not_put_in_another_order() -> None:
    """Of gpt-oss's 2,880 columns, 22.5 tiles: libtpu had experts and tokens in the lanes, and programs copied both."""
    model = FAMILIES["gpt-oss-120b"]
    config = config_for(model, "v6e:2x2")
    place, params = SingleDeviceSharding(topology_devices("v6e:2x2")[0]), param_shapes(model, config)
    table, down = params["embed"], params["layers.0.experts_down"]
    shapes = ((64,), jnp.int32), ((64, down.shape[1]), down.dtype), (down.shape[:1], jnp.int32)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf in (table, down)]

    def rows(table: Any, down: Any, tokens: Any, x: Any, sizes: Any) -> Any:
        return table[tokens], grouped_matmul(x, down, sizes, target=config.target)

    memory = jax.jit(rows).lower(*weights, *inputs).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 8 << 20


@pytest.mark.parametrize("chip", ["v6e:2x2", "h200:1"])
def test_rows_of_experts_are_whole_tiles(chip: str) -> None:
    """And of embeddings and LM heads on a TPU: the zeros are counted, and no other family has any."""
    for model in (*FAMILIES.values(), QWEN3_30B, LLAMA_8B):
        config = config_for(model, chip)
        specs = param_specs(model, jnp.dtype(jnp.bfloat16))
        for name, shape in param_shapes(model, config).items():
            wide = model.family == "gpt_oss" and name.endswith(("experts_down", "embed", "lm_head"))
            columns = 2944 if wide and (chip != "h200:1" or "experts" in name) else specs[name].device_shape[-1]
            assert shape.shape == (*specs[name].device_shape[:-1], columns), name


def test_matrices_are_not_padded_to_tiles() -> None:
    """Every big weight's last two dimensions fill TPU tiles of 8 x 128 (they once cost four times their size)."""
    config = config_for(LLAMA_8B, "v6e:2x2")
    for name, shape in step_program(LLAMA_8B, config, KEYS["decode"]).inputs[0].items():
        if len(shape.shape) > 1:
            assert shape.shape[-1] % 128 == 0 and shape.shape[-2] % 8 == 0, (name, shape.shape)
        assert shape.dtype in (jnp.bfloat16, jnp.float32)
