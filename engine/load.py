"""From options to a running engine: find the model, load it, compile the closed set, warm up.

The one place where the parts are wired together; the offline API and the server both use it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.batch import StepKey, lattice
from engine.bundle import bundle_of, fits
from engine.config import EngineConfig, EngineOptions, cache_root
from engine.device import device_facts, give_back_memory, keep_memory
from engine.errors import CapacityError, InvalidParam, ModelError
from engine.executables import (
    Compiling,
    Executable,
    NoProgramCache,
    Program,
    ProgramCache,
    Report,
    compile_all,
    compile_one,
    count_compiles,
)
from engine.kernels import kernel_choices
from engine.loop import Engine
from engine.model.config import ModelConfig
from engine.model.params import param_specs
from engine.model.weights import Checkpoint, open_checkpoint
from engine.model.weights.packed import summary
from engine.placement import assembled, placer
from engine.plan import Layout
from engine.program_key import ProgramKey, program_key
from engine.programs import held_bytes, page_bytes, served_models, serving_programs, step_program
from engine.registry import resolve_model
from engine.replica import Replica
from engine.resolve import (
    DeviceFacts,
    ModelFiles,
    draft_model_of,
    page_size_of,
    resolve,
    shards_of,
    usable_bytes,
    with_pages,
)
from engine.runner import Runner
from engine.stats import Counters
from engine.text import Tokenizer, load_tokenizer
from pallas_kernels.quantized import Quantized
from sharding.mesh import mesh_of
from sharding.shards import WHOLE

log = logging.getLogger("octavo.engine")
CacheFor = Callable[[EngineConfig], ProgramCache]
TEMPORARY_GUESS_BYTES = 2 << 30  # when memory is ample even with this, nobody needs to know better


def load_engine(
    options: EngineOptions,
    path: Path,
    report: Report = lambda phase, done, of: None,
    replica: Replica | None = None,
) -> Engine:
    """A warmed-up engine for the model at `path`, its thread not started yet. Raises OctavoError with the cause.

    report(phase, done, of) is called from this thread as phases go on. replica: which this process leads.
    """
    tokenizer = None if options.skip_tokenizer_init else tokenizer_of(options, path)
    if tokenizer is not None and (drafting := draft_path(options)) is not None:
        check_same_tokens(tokenizer, drafting)
    runner, checkpoint = load_runner(options, path, report, replica)
    report("warm up", 0, 1)
    runner.warm_up()
    ends = (*checkpoint.end_token_ids, *(tokenizer.end_token_ids if tokenizer else ()))
    engine = Engine(
        runner.config,
        runner,
        vocab_size=runner.model.vocab_size,
        tokenizer=tokenizer,
        model_name=display_name(options.model),
        end_token_ids=tuple(dict.fromkeys(ends)),
        counters=runner.counters,
        layouts=layouts(options, runner, device_facts(), caches(options, runner.model)) if replica is None else None,
    )
    keep_memory()
    gc.collect()
    gc.freeze()  # what start-up made lives as long as the process: collections need not walk it
    runner.counters.ready = True
    return engine


def load_runner(
    options: EngineOptions, path: Path, report: Report, replica: Replica | None = None
) -> tuple[Runner, Checkpoint]:
    """Weights and programs on the devices; of a replica, this process's part of them."""
    counters = Counters()
    count_compiles(counters)
    checkpoints, device = open_checkpoints(options, path), device_facts()
    checkpoint, model = checkpoints[0], checkpoints[0].config
    config, cache = sized_and_kept(options, checkpoints, device, replica)
    log.info("%s on %s: %s", options.model, device.platform, config.summary())
    for line in kernel_choices(model, config):
        log.info("%s", line)
    programs = serving_programs(model, config, mesh_of(config.shards))
    with Compiling(programs, cache) as compiling:  # beside the weights, which wait for the disk
        params = {
            prefix + name: array
            for opened, (prefix, _, own) in zip(checkpoints, served_models(model, config), strict=True)
            for name, array in load_params(opened, own, report).items()
        }
        executables = compiling.result(report)
    give_back_memory()  # before the pool is made: what reading needed is not in the peak
    _check_fits(model, config, executables, device)
    make = replica.leading if replica is not None and replica.leads else Runner
    return make(model, config, params, executables, counters), checkpoint


def sized_and_kept(
    options: EngineOptions, checkpoints: Sequence[Checkpoint], device: DeviceFacts, replica: Replica | None
) -> tuple[EngineConfig, ProgramCache]:
    """The configuration with its KV pool, and where its programs are: in a bundle that is for it, else in the cache.

    A bundle's pool is as large as where it was made, unless a size is asked for: `_check_fits` judges it.
    """
    model, config = checkpoints[0].config, configure(options, checkpoints, device)
    if replica is not None:
        if options.programs is not None:
            raise InvalidParam("programs", "is for one process; those of a replica compile their own")
        return replica.agree(
            size_pool(options, model, config, device, lambda config: NoProgramCache())
        ), NoProgramCache()
    bundle, cache_for = bundle_of(options, checkpoints[0].source), caches(options, model)
    if bundle is not None:
        pages, wanted = bundle.num_pages, options.kv_cache_memory_bytes
        if pages is None or wanted is not None:
            like = with_pages(config, wanted, page_bytes(model, config), held_bytes(model, config), device)
        else:
            like = replace(config, num_pages=pages)
        if fits(options, bundle, key_of(model, like)):
            return like, bundle
    config = size_pool(options, model, config, device, cache_for)
    return config, cache_for(config)


def key_of(model: ModelConfig, config: EngineConfig) -> ProgramKey:
    return program_key("engine.programs", model=model, config=config)


def caches(options: EngineOptions, model: ModelConfig) -> CacheFor:
    root = cache_root(options.cache_dir)
    return lambda config: ProgramCache(root, key_of(model, config)) if options.compile_cache else NoProgramCache()


def closed_set(options: EngineOptions, path: Path) -> tuple[ProgramKey, list[Program], ProgramCache]:
    """What `load_engine` would compile for the model at `path`, and where it would keep it; reads no weights."""
    checkpoints, device = open_checkpoints(options, path), device_facts()
    model, cache_for = checkpoints[0].config, caches(options, checkpoints[0].config)
    config = size_pool(options, model, configure(options, checkpoints, device), device, cache_for)
    kernel_choices(model, config)  # raises for what was asked for by name and is not there
    return key_of(model, config), serving_programs(model, config, mesh_of(config.shards)), cache_for(config)


def draft_path(options: EngineOptions) -> Path | None:
    """Where the files of the draft model are; None: there is none."""
    name = draft_model_of(options)
    return None if name is None else resolve_model(name, cache_dir=cache_root(options.cache_dir))


def open_checkpoints(options: EngineOptions, path: Path) -> list[Checkpoint]:
    """Of the model at `path`, and of the one that shall draft for it, if one shall."""
    paths = (path, draft_path(options))
    return [open_checkpoint(each, max_model_len=options.max_model_len) for each in paths if each is not None]


def configure(options: EngineOptions, checkpoints: Sequence[Checkpoint], device: DeviceFacts) -> EngineConfig:
    """Resolved for checkpoints that may be quantized; says what becomes of them."""
    stored = [opened.stored(param_specs(opened.config, jnp.dtype(opened.dtype))) for opened in checkpoints]
    model, *draft = [
        ModelFiles(opened.config, opened.dtype, tuple((name, w.packing) for name, w in there.items() if w.packing))
        for opened, there in zip(checkpoints, stored, strict=True)
    ]
    config = resolve(options, model.model, model.native_dtype, device, model.stored, *draft)
    if config.quantization is None:
        for there, (_, one, own) in zip(stored, served_models(model.model, config), strict=True):
            specs = param_specs(one, jnp.dtype(own.dtype))
            for line in summary(there, dict(own.stored), specs):
                log.info("%s", line)
    return config


def display_name(model: str) -> str:
    """What clients call the model: a registry or hub name as it is, of a path only its last part."""
    path = Path(model).expanduser()
    return path.name.removesuffix(".gguf") if path.exists() else model


def tokenizer_of(options: EngineOptions, path: Path) -> Tokenizer:
    source = Path(options.tokenizer) if options.tokenizer else path
    return load_tokenizer(source, Path(options.chat_template) if options.chat_template else None)


def check_same_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Raises InvalidParam where a draft model means other text by a token; special tokens may be spelt otherwise."""
    try:
        theirs = load_tokenizer(path)
    except ModelError as error:  # it brings none: the sizes of the vocabularies are compared
        log.info("tokens of the draft model are taken to be the model's: %s", error)
        return
    for token, piece in tokenizer.pieces.plain.items():
        there = theirs.pieces.plain.get(token, b"")
        if piece and there and piece != there:
            raise InvalidParam("draft_model", f"token {token} is {there!r} there, and {piece!r} in the model")


def load_params(checkpoint: Checkpoint, config: EngineConfig, report: Report) -> dict[str, Any]:
    """All weights on the devices, one at a time, each in its shards, in the engine's dtype or packed as asked."""
    specs = param_specs(checkpoint.config, jnp.dtype(config.dtype))
    place = placer(checkpoint.config, config)
    head = None if not config.packed_head else "embed" if checkpoint.config.tie_embeddings else "lm_head"
    loaded, made = 0, {}

    def put(name: str, array: np.ndarray | Quantized) -> Any:
        nonlocal loaded
        loaded += 1
        report("load weights", loaded, len(specs))
        if name == head and isinstance(array, np.ndarray):
            made["packed_head"] = place("packed_head", np.ascontiguousarray(array.T))
        return None if name == head == "lm_head" else place(name, array)

    params = checkpoint.load(specs, put, dict(config.stored)) | made
    if head == "lm_head":
        del params[head]
    jax.block_until_ready(params)
    return assembled(checkpoint.config, config, params)


def layouts(
    options: EngineOptions, runner: Runner, device: DeviceFacts, cache_for: CacheFor
) -> Callable[[str], Layout]:
    """What `Engine.reshard` asks: sized and compiled beside the layout that serves."""

    def prepare(sharding: str) -> Layout:
        model, counters = runner.model, runner.counters
        if runner.config.draft is not None:
            raise InvalidParam("sharding", "cannot change while a draft model proposes tokens")
        shards = shards_of(sharding, model, device.count)
        if runner.config.in_panels and shards != WHOLE:
            raise InvalidParam("sharding", "one device has nothing to cut")
        if shards.num_groups != runner.config.num_groups:
            raise InvalidParam(
                "sharding", f"divides requests into {shards.num_groups} groups, not {runner.config.num_groups}: "
                "that is for a new start",
            )  # fmt: skip
        page_size_of(runner.config.page_size, 0, shards)  # raises where it does not divide
        counters.ready = False  # these compilations are announced
        try:
            config = size_pool(options, model, replace(runner.config, shards=shards), device, cache_for)
            programs = serving_programs(model, config, mesh_of(shards))
            executables = compile_all(programs, cache_for(config), lambda phase, done, of: None)
        finally:
            counters.ready = True
        return Layout(config, partial(runner.adopt, config, executables))

    return prepare


def size_pool(
    options: EngineOptions, model: ModelConfig, config: EngineConfig, device: DeviceFacts, cache_for: CacheFor
) -> EngineConfig:
    """Give the KV pool what the weights and the hungriest programs leave.

    Where memory binds, the largest programs are compiled with the smallest pool to learn
    their temporary memory: the pool is donated, so its size does not change theirs.
    """
    used = held_bytes(model, config)

    def sized(temporary: int) -> EngineConfig:
        return with_pages(config, options.kv_cache_memory_bytes, page_bytes(model, config), used + temporary, device)

    if usable_bytes(device) > used + TEMPORARY_GUESS_BYTES:
        ample = sized(TEMPORARY_GUESS_BYTES) if options.kv_cache_memory_bytes is None else sized(0)
        if ample == sized(0):
            return ample
    largest = max(lattice(config)), StepKey(0, config.decode_buckets[-1], config.draft_tokens)
    probes = [
        compile_one(step_program(model, config, key, mesh_of(config.shards)), cache_for(config)) for key in largest
    ]
    return sized(max(_extra_bytes(probe) for probe in probes))


def _check_fits(
    model: ModelConfig, config: EngineConfig, executables: dict[str, Executable], device: DeviceFacts
) -> None:
    """The compiler's own account of the hungriest program against the device."""
    pool = config.num_pages * page_bytes(model, config)
    used = held_bytes(model, config) + pool
    hungriest = max(executables.values(), key=_extra_bytes)
    if used + _extra_bytes(hungriest) > device.memory_bytes:
        raise CapacityError(
            f"weights, slots, states and a KV pool of {pool:,} bytes take {used:,}, program {hungriest.name} "
            f"{_extra_bytes(hungriest):,} more; the device has {device.memory_bytes:,}"
        )


def _extra_bytes(executable: Executable) -> int:
    memory = executable.memory()
    return memory.temporary + memory.code + memory.outputs - memory.aliased
