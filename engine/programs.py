"""Which programs serve a model: every point of the lattice bound to its step function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from engine import chained, draft_model, steps
from engine.batch import Layout, StepKey, configure_layout, lattice, step_layout
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.executables import Program
from engine.forward import Compute
from engine.model.config import ModelConfig
from engine.model.params import param_specs
from engine.model.place import local_model, one_stage, served_model, stage_of
from engine.model.quantization import packed_shape, packing_of
from engine.recur import LayerStates, states_shape
from engine.slots import Slots, slots_shape
from engine.steps import StepOutput
from pallas_kernels.kv_layout import kv_layout
from pallas_kernels.quantized import tree_bytes
from sharding.mesh import param_cut
from sharding.params import ParamSpec
from sharding.shards import Shards, scope_of

Shapes = jax.ShapeDtypeStruct


def served_models(model: ModelConfig, config: EngineConfig) -> Iterator[tuple[str, ModelConfig, EngineConfig]]:
    """The model and the one that drafts for it, if one does, each as if it were alone, behind what the names of its
    parameters begin with."""
    yield "", model, replace(config, draft=None)
    if config.draft is not None:
        yield draft_model.PREFIX, config.draft.model, config.of_draft(config.draft)


def served_specs(model: ModelConfig, config: EngineConfig) -> dict[str, ParamSpec]:
    """The parameters as the devices hold them: in the engine's dtype, a KV head as often as it is asked for, of layers
    in stages those of one."""
    return model_specs(served_model(model, config.shards), config)


def model_specs(model: ModelConfig, config: EngineConfig) -> dict[str, ParamSpec]:
    """The parameters of a model that is served so, before they are cut or copied."""
    return param_specs(model, jnp.dtype(config.dtype), config.packed_head)


def param_shapes(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Abstract parameters as they are on the devices, a draft model's too. Of layers in stages, those that stand at the
    same place in each are one array, one behind the other along its first dimension."""
    return {
        prefix + name: jax.tree.map(partial(_times, _num_stages(own, name)), shape)
        for prefix, one, own in served_models(model, config)
        for name, shape in stage_shapes(one, own).items()
    }


def stage_shapes(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Abstract parameters of one stage, over all of its devices. Raises ModelError where a checkpoint has packed the
    stages' weights differently."""
    specs, stored = served_specs(model, config), {}
    for name, packing in config.stored:
        _, there = stage_of(name, model, config.shards)
        if stored.setdefault(there, packing) != packing:
            raise ModelError(f"sharding: {name} is packed as {packing}, in another stage as {stored[there]}")
    return {
        name: packed_shape(spec, stored.get(name) or packing_of(spec, config.quantization), config.laid_for)
        for name, spec in specs.items()
    }


def _num_stages(config: EngineConfig, name: str) -> int:
    return config.shards.count("layers") if name.startswith("layers.") else 1


def compute_of(model: ModelConfig, config: EngineConfig) -> Compute:
    """What the programs are traced from: one device's share of the model."""
    dtype, platform = config.kv_cache_dtype, config.target.platform
    local = local_model(model, config.shards)
    if model.latent is None:
        layout = kv_layout(local.num_kv_heads, model.head_dim, dtype, platform)
    else:
        layout = kv_layout(1, model.latent.row_dim, dtype, platform, value_dim=model.latent.kv_rank)
    draft = config.draft and compute_of(config.draft.model, config.of_draft(config.draft))
    return Compute(local, layout, config.page_size, config.target, config.shards, draft)


def param_cuts(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """How each parameter (or each array of a packed one) is cut over the mesh; the tree of `param_shapes`.

    Raises ModelError where a cut would go through a group of rows that share a scale.
    """
    stages = config.shards.axes("layers")

    def staged(cut: PartitionSpec) -> PartitionSpec:
        first = (cut[0],) if isinstance(cut[0], str) else cut[0] or ()
        return PartitionSpec((*stages, *first), *cut[1:])

    return {
        prefix + name: jax.tree.map(staged, cut) if _num_stages(own, name) > 1 else cut
        for prefix, one, own in served_models(model, config)
        for name, cut in stage_cuts(one, own).items()
    }


def stage_cuts(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """How each parameter of one stage is cut over its devices; the tree of `stage_shapes`. In panels it is not."""
    if config.in_panels:
        return jax.tree.map(lambda leaf: PartitionSpec(), stage_shapes(model, config))
    specs = served_specs(model, config)
    return {
        name: jax.tree.map(partial(_cut_of, config.shards, name, specs[name]), shape)
        for name, shape in stage_shapes(model, config).items()
    }


def _cut_of(shards: Shards, name: str, spec: ParamSpec, leaf: Shapes) -> PartitionSpec:
    """Of one array of the parameter: a scale that all rows share is on every device that has some."""
    cut = param_cut(shards.at(scope_of(name)), spec)
    for size, axes in zip(leaf.shape, cut, strict=True):
        parts = shards.parts(axes)
        if size > 1 and size % parts:
            raise ModelError(f"sharding: {name} has {size} groups of packed rows, which do not divide over {parts}")
    return PartitionSpec(*(axes if size > 1 else None for size, axes in zip(leaf.shape, cut, strict=True)))


def local_shapes(model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Abstract parameters as one device has them."""

    return jax.tree.map(partial(_share, config.shards), param_shapes(model, config), param_cuts(model, config))


def _share(shards: Shards, leaf: Shapes, cut: PartitionSpec) -> Shapes:
    """One device's part of an array; dimensions that `cut` does not name are whole."""
    axes = (*cut, *[None] * (len(leaf.shape) - len(cut)))
    return Shapes(tuple(size // shards.parts(names) for size, names in zip(leaf.shape, axes, strict=True)), leaf.dtype)


def held_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes on one device of weights, slots and recurrent states."""
    return tree_bytes((local_shapes(model, config), slots_of(model, config))) + state_bytes(model, config)


def kv_cuts(model: ModelConfig, config: EngineConfig) -> tuple[PartitionSpec, ...]:
    """Of what each layer keeps, as in `kv_shapes`. Pages are cut by KV heads; a latent row serves all heads and is on
    every device. Where pages are spread over a sequence's devices, each has some of every page's tokens."""
    return tuple(cut for _, one, own in served_models(model, config) for cut in _own_kv_cuts(one, own))


def _own_kv_cuts(model: ModelConfig, config: EngineConfig) -> tuple[PartitionSpec, ...]:
    shards = config.shards
    groups, heads = group_cut(config), shards.axes("kv_heads") or None if model.latent is None else None
    own = (*shards.axes("layers"), *shards.axes("requests")) or None
    pages = PartitionSpec(own, shards.axes("sequence") or None, heads)
    return tuple(groups if layer.recurrent else pages for layer in one_stage(model, shards).layers)


def group_cut(config: EngineConfig) -> PartitionSpec:
    """Of what each group of requests has its own of, one behind the other: pages, slots, the step's vector."""
    return PartitionSpec(config.shards.axes("requests") or None)


def over_groups(config: EngineConfig, tree: Any) -> Any:
    """Abstract arrays of one group as those of all."""
    return jax.tree.map(partial(_times, config.num_groups), tree)


def _times(count: int, leaf: Shapes) -> Shapes:
    """So many one behind the other."""
    return Shapes((count * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)


def kv_shapes(model: ModelConfig, config: EngineConfig) -> tuple[Shapes | LayerStates, ...]:
    """What each layer keeps, abstract: pages [pages, page_size, layout.width], or recurrent states. Behind the layers
    of the model stand those of one that drafts for it."""
    return tuple(kept for _, one, own in served_models(model, config) for kept in _own_kv_shapes(one, own))


def _own_kv_shapes(model: ModelConfig, config: EngineConfig) -> tuple[Shapes | LayerStates, ...]:
    layout = compute_of(model, config).kv
    parts = 1 if model.latent else config.shards.count("kv_heads")
    num_pages = config.shards.count("layers") * config.num_pages
    pages = Shapes((num_pages, config.page_size, parts * layout.width), jnp.dtype(layout.dtype))
    states = None if model.recurrence is None else states_shape(model, config.num_states, config.dtype)
    layers = one_stage(model, config.shards).layers
    return over_groups(config, tuple(states if layer.recurrent and states else pages for layer in layers))


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes on one device of one page in all layers, a draft model's too; 0 where no layer attends."""
    return sum(_own_page_bytes(one, own) for _, one, own in served_models(model, config))


def _own_page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    stage = one_stage(model, config.shards)
    num_paged = stage.num_layers - stage.num_recurrent_layers
    return config.part_size * compute_of(model, config).kv.token_bytes * num_paged


def state_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of all recurrent states in all layers, a draft model's too."""
    each = (one.state_bytes(jnp.dtype(own.dtype).itemsize) for _, one, own in served_models(model, config))
    return config.num_states * sum(each)


def serving_programs(model: ModelConfig, config: EngineConfig, mesh: Mesh | None = None) -> list[Program]:
    """The closed set: nothing else runs on the device while serving. mesh: of `config.shards`."""
    return [
        *(step_program(model, config, key, mesh) for key in lattice(config)),
        configure_program(model, config, mesh),
        *empty_programs(model, config, mesh),
    ]


def empty_programs(model: ModelConfig, config: EngineConfig, mesh: Mesh | None = None) -> list[Program]:
    """Zeros on the devices: the slots, and what one layer of each kind keeps (see `layer_makers`)."""
    slots, groups = over_groups(config, slots_of(model, config)), group_cut(config)
    kinds = dict(zip(layer_makers(model, config), _kept(model, config), strict=True))
    layers = (_empty(name, *kind, config, mesh) for name, kind in kinds.items())
    return [_empty("empty_slots", slots, groups, config, mesh), *layers]


def layer_makers(model: ModelConfig, config: EngineConfig) -> list[str]:
    """The name of the program that makes what each layer keeps; layers of a kind share it."""
    kept = _kept(model, config)
    names = {kind: f"empty_layer_{i}" for i, kind in enumerate(dict.fromkeys(kept))}
    return [names[kind] for kind in kept]


def _kept(model: ModelConfig, config: EngineConfig) -> list[tuple[Shapes | LayerStates, PartitionSpec]]:
    return list(zip(kv_shapes(model, config), kv_cuts(model, config), strict=True))


def _empty(name: str, whole: Any, cut: PartitionSpec, config: EngineConfig, mesh: Mesh | None) -> Program:
    share = jax.tree.map(lambda leaf: _share(config.shards, leaf, cut), whole)

    def zeros() -> tuple[Any]:
        return (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), share),)

    return Program(name, zeros, (), donated=(), outputs=(whole,), mesh=mesh, cuts=((), (cut,)))


def step_program(model: ModelConfig, config: EngineConfig, key: StepKey, mesh: Mesh | None = None) -> Program:
    layout = step_layout(config, key)
    if key.tokens:
        function = partial(steps.prefill_step, compute_of(model, config), layout)
        output = steps.empty_output_shape(model, key.rows + config.max_prefill_rows, 1, key.tokens)
    else:
        most_steps = config.most_steps(key.drafts)
        plain = chained.decode_step if config.chains_steps else steps.decode_step
        step = partial(steps.verify_step if key.drafts else plain, compute_of(model, config), layout)
        function = partial(step, most_steps)
        output = steps.empty_output_shape(model, key.rows, most_steps, 0, verifies=key.drafts > 0)
    state = (param_shapes(model, config), kv_shapes(model, config), *_held(model, config, layout))
    program = Program(key.name, function, state, donated=(1, 2), outputs=(state[1], state[2], output))
    return _mapped(program, model, config, mesh)


def _held(model: ModelConfig, config: EngineConfig, layout: Layout) -> tuple[Slots, Shapes]:
    """Slots and the step's vector, of all groups."""
    return over_groups(config, (slots_of(model, config), Shapes((layout.size,), jnp.int32)))


def _mapped(program: Program, model: ModelConfig, config: EngineConfig, mesh: Mesh | None) -> Program:
    """A step's program over the mesh: parameters and pages are cut; slots, vector and output by group alone."""
    if mesh is None:
        return program
    kv, groups, output = kv_cuts(model, config), group_cut(config), program.outputs[2]
    out = jax.tree.map(lambda _: groups, output)
    if isinstance(output, StepOutput) and output.expert_tokens is not None:
        # Those of this stage's layers, and the sum of all groups.
        out = replace(out, expert_tokens=PartitionSpec(config.shards.axes("layers") or None))
    return replace(program, mesh=mesh, cuts=((param_cuts(model, config), kv, groups, groups), (kv, groups, out)))


def logits_program(model: ModelConfig, config: EngineConfig, tokens: int, mesh: Mesh | None = None) -> Program:
    """Logits of every token of a chunk: for research, outside the serving set."""
    layout = step_layout(config, StepKey(tokens, 0))
    state = (param_shapes(model, config), kv_shapes(model, config), *_held(model, config, layout))
    logits = Shapes((tokens, model.vocab_size), jnp.float32)
    program = Program(
        f"logits_{tokens}",
        partial(steps.token_logits, compute_of(model, config), layout),
        state,
        donated=(1, 2),
        outputs=(state[1], state[2], logits),
    )
    return _mapped(program, model, config, mesh)


def configure_program(model: ModelConfig, config: EngineConfig, mesh: Mesh | None = None) -> Program:
    layout = configure_layout(config, model.vocab_size)
    inputs, groups = _held(model, config, layout), group_cut(config)
    program = Program("configure", partial(steps.configure, layout), inputs, donated=(0,), outputs=inputs[:1])
    return program if mesh is None else replace(program, mesh=mesh, cuts=((groups, groups), groups))


def slots_of(model: ModelConfig, config: EngineConfig) -> Slots:
    history_len = config.max_model_len if config.draft_tokens else 0
    shape = (config.max_num_seqs, config.max_pages_per_seq, model.vocab_size, history_len)
    return slots_shape(*shape, has_draft=config.draft is not None)
