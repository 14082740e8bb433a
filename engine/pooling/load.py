"""From options to a running pooling engine: open the model, load it, compile the closed set, warm up."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.bundle import bundle_of, fits
from engine.config import EngineOptions, cache_root
from engine.device import device_facts, keep_memory
from engine.errors import CapacityError, InvalidParam, ModelError
from engine.executables import NoProgramCache, Program, ProgramCache, Report, compile_all, count_compiles
from engine.json_file import read_json
from engine.load import display_name, tokenizer_of
from engine.model.encoder_config import EncoderConfig
from engine.model.quantization import pack
from engine.model.weights import Checkpoint, open_checkpoint
from engine.model.weights.encoder import EncoderCheckpoint, is_encoder, open_encoder
from engine.model.weights.hf import open_hf
from engine.pooling.config import MODULES, Matryoshka, PoolingConfig, read_pooling
from engine.pooling.engine import PoolingEngine
from engine.pooling.programs import PoolingModel, param_shapes, pooling_programs, specs_of
from engine.pooling.resolve import resolve_pooling
from engine.pooling.runner import PoolingRunner
from engine.program_key import ProgramKey, program_key
from engine.resolve import DeviceFacts, usable_bytes
from engine.stats import Counters
from pallas_kernels.quantized import tree_bytes

log = logging.getLogger("octavo.engine")


def pools(options: EngineOptions, path: Path) -> bool:
    """Whether the model at `path` is served for embeddings or scores. Raises InvalidParam for a task it is not for.

    auto: encoders, what sentence-transformers saved, and decoders that were saved without a head.
    """
    hf = _config_of(path)
    if is_encoder(hf):
        if options.task == "generate":
            raise InvalidParam("task", f"{options.model} is an encoder: it embeds or scores, and generates nothing")
        return True
    if options.task == "score":
        raise InvalidParam("task", f"{options.model} is no cross-encoder; it can generate, or embed")
    architectures = hf.get("architectures")
    headless = isinstance(architectures, list) and any(str(name).endswith("Model") for name in architectures)
    embeds = options.task == "embed" or (options.task == "auto" and (headless or (path / MODULES).is_file()))
    for name in () if embeds else ("pooling", "normalize", "is_matryoshka"):
        if getattr(options, name) not in (None, False):
            raise InvalidParam(name, f"is for embeddings; {options.model} generates text (see the option task)")
    return embeds


def load_pooling_engine(
    options: EngineOptions, path: Path, report: Report = lambda phase, done, of: None
) -> PoolingEngine:
    """A warmed-up engine for the model at `path`, its thread not started yet. Raises OctavoError with the cause.

    report(phase, done, of) is called from this thread as phases go on.
    """
    counters = Counters()
    count_compiles(counters)
    checkpoint, model = _open(path, options.max_model_len)
    tokenizer = None if options.skip_tokenizer_init else tokenizer_of(options, path)
    device = device_facts()
    files = read_pooling(path)
    config = resolve_pooling(options, model, files, checkpoint.dtype, device, _matryoshka(path))
    _check_task(options, config)
    log.info("%s on %s: %s", options.model, device.platform, config.summary())
    if files.prompt:
        log.info("the model's authors put %r in front of every text; clients do that themselves", files.prompt)
    _check_fits(model, config, device)
    params = _load_params(checkpoint, model, config, report)
    executables = compile_all(pooling_programs(model, config), _kept(options, path, model, config), report)
    report("warm up", 0, 1)
    runner = PoolingRunner(model, config, params, executables, counters)
    runner.warm_up()
    engine = PoolingEngine(
        config,
        runner,
        vocab_size=model.vocab_size,
        num_types=model.num_types if isinstance(model, EncoderConfig) else 1,
        tokenizer=tokenizer,
        model_name=display_name(options.model),
        counters=counters,
    )
    keep_memory()
    gc.collect()
    gc.freeze()  # what start-up made lives as long as the process: collections need not walk it
    counters.ready = True
    return engine


def _open(path: Path, max_model_len: int | None) -> tuple[Checkpoint | EncoderCheckpoint, PoolingModel]:
    """The checkpoint, and what pooling runs of it: a decoder without its head."""
    if is_encoder(_config_of(path)):
        encoder = open_encoder(path)
        return encoder, encoder.config
    is_hf = (path / "config.json").is_file()
    checkpoint = open_hf(path, max_model_len, with_head=False) if is_hf else open_checkpoint(path, max_model_len)
    return checkpoint, replace(checkpoint.config, tie_embeddings=True)


def _config_of(path: Path) -> Mapping[str, Any]:
    """config.json of a Hugging Face folder; empty for other files."""
    file = path / "config.json"
    return read_json(file) if file.is_file() else {}


def _matryoshka(path: Path) -> Matryoshka:
    """`is_matryoshka` and `matryoshka_dimensions` of config.json, vLLM's keys."""
    hf = _config_of(path)
    dimensions, flag = hf.get("matryoshka_dimensions") or [], hf.get("is_matryoshka", False)
    if not isinstance(dimensions, list) or not all(type(size) is int and size > 0 for size in dimensions):
        raise ModelError(f"{path}: config.json: matryoshka_dimensions = {dimensions!r} must be positive integers")
    if not isinstance(flag, bool):
        raise ModelError(f"{path}: config.json: is_matryoshka = {flag!r} must be true or false")
    return Matryoshka(flag or bool(dimensions), tuple(dimensions))


def _check_task(options: EngineOptions, config: PoolingConfig) -> None:
    if options.task not in ("auto", config.task):
        raise InvalidParam("task", f"{options.model} is for {config.task}, not for {options.task}")


def pooling_closed_set(options: EngineOptions, path: Path) -> tuple[ProgramKey, list[Program], ProgramCache]:
    """What `load_pooling_engine` would compile for the model at `path`, and where it would keep it."""
    checkpoint, model = _open(path, options.max_model_len)
    files, device = read_pooling(path), device_facts()
    config = resolve_pooling(options, model, files, checkpoint.dtype, device, _matryoshka(path))
    _check_task(options, config)
    key = _key(model, config)
    return key, pooling_programs(model, config), _cache(options, key)


def _kept(options: EngineOptions, path: Path, model: PoolingModel, config: PoolingConfig) -> ProgramCache:
    """Where the programs are: in a bundle that is for them, else in the cache."""
    key, bundle = _key(model, config), bundle_of(options, path)
    return bundle if bundle is not None and fits(options, bundle, key) else _cache(options, key)


def _key(model: PoolingModel, config: PoolingConfig) -> ProgramKey:
    return program_key("engine.pooling.programs", model=model, config=config)


def _cache(options: EngineOptions, key: ProgramKey) -> ProgramCache:
    return ProgramCache(cache_root(options.cache_dir), key) if options.compile_cache else NoProgramCache()


def _check_fits(model: PoolingModel, config: PoolingConfig, device: DeviceFacts) -> None:
    used = tree_bytes(param_shapes(model, config))
    if used > usable_bytes(device):
        raise CapacityError(f"weights of {used:,} bytes do not fit: {usable_bytes(device):,} may be used")


def _load_params(
    checkpoint: Checkpoint | EncoderCheckpoint, model: PoolingModel, config: PoolingConfig, report: Report
) -> dict[str, Any]:
    """All weights on the device, one at a time, in the engine's dtype or packed as asked."""
    specs = specs_of(model, config.dtype)
    loaded = 0

    def put(name: str, array: np.ndarray) -> Any:
        nonlocal loaded
        loaded += 1
        report("load weights", loaded, len(specs))
        return jax.device_put(pack(specs[name], array, config.quantization, config.target))

    params = checkpoint.load(specs, put)
    jax.block_until_ready(params)
    return params
