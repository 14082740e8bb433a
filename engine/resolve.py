"""From what was asked and what the device is to one concrete configuration. Pure functions.

Every "auto" of `EngineOptions` is decided here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from engine.config import DEFAULT_MODEL, Draft, EngineConfig, EngineOptions
from engine.errors import CapacityError, InvalidParam
from engine.model.config import ModelConfig
from engine.model.packing import Packing, Packings
from engine.model.params import axis_sizes, param_axes, param_specs
from engine.model.place import one_stage, replicated
from engine.model.quantization import packed_shape
from pallas_kernels.quantized_matmul import api as quantized_matmul
from pallas_kernels.quantized_matmul import cpu as quantized_matmul_cpu
from pallas_kernels.target import KVDtype, Target
from sharding.params import ParamSpec
from sharding.rules import ShardingError, load_strategy
from sharding.shards import WHOLE, Shards

GIB = 1 << 30
CPU_KV_BYTES = 1 * GIB  # enough for dozens of chats with a small model; the rest stays the user's
CPU_MEMORY_FRACTION = 0.8  # of what the machine has
DEVICE_MEMORY_FRACTION = 0.92  # of what the runtime reports; the rest is for its own buffers
STATES_FRACTION = 0.25  # of what may be used, for recurrent states, where their number is not asked for

OPS = (
    "decode_attention",
    "prefill_attention",
    "expanded_prefill",
    "kv_write",
    "short_conv",
    "ssd",
    "gated_delta",
    "gated",
    "rms_norm",
    "matmul",
    "quantized_matmul",
    "grouped_matmul",
)
_KV_DTYPES: dict[str, KVDtype] = {
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


@dataclass(frozen=True)
class DeviceFacts:
    """What the choice depends on."""

    platform: Literal["cpu", "tpu", "gpu"]
    memory_bytes: int  # of one device; for a CPU, of the machine
    fast_bfloat16: bool
    chip: str = "cpu"  # as `pallas_kernels.target` names it
    count: int = 1  # devices of the process
    native: str = ""  # as `Target.native`


@dataclass(frozen=True)
class Defaults:
    """Per backend: a step must be worth its launch, and a CPU should not make anybody wait for it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_rows: int
    page_size: int
    fewest_decode_steps: int
    decode_steps: int  # the most
    draft_tokens: int
    smallest_tokens: int
    smallest_rows: int  # on a CPU 2: one row of bfloat16 falls off XLA's fast path
    decode_call_s: float  # at most: somebody who comes waits for two calls, one that runs and one queued behind it


DEFAULTS = {
    "cpu": Defaults(32, 512, 8, 16, 2, 8, 3, 32, 2, 0.04),  # a launch is work of these cores: never for one token
    "gpu": Defaults(256, 4096, 16, 32, 1, 32, 4, 64, 4, 0.02),
    "tpu": Defaults(256, 4096, 16, 32, 1, 32, 4, 64, 8, 0.02),
}


@dataclass(frozen=True)
class ModelFiles:
    """What a checkpoint's files say: the model, its dtype, and the parameters that are packed, and how."""

    model: ModelConfig
    native_dtype: str
    stored: Packings = ()


def resolve(
    options: EngineOptions,
    model: ModelConfig,
    native_dtype: str,
    device: DeviceFacts,
    stored: Packings = (),
    draft: ModelFiles | None = None,
) -> EngineConfig:
    """Concrete configuration but for the KV pool, which `with_pages` sizes (num_pages is 2 until then).

    stored: the parameters that the checkpoint has packed, and how. draft: of `options.draft_model`. Raises
    InvalidParam, also where the sharding file is wrong or does not fit the model and its devices.
    """
    if (draft is None) != (draft_model_of(options) is None):
        raise ValueError("a draft model is asked for, and its files are given, or neither")
    defaults = DEFAULTS[device.platform]
    max_model_len = options.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise InvalidParam("max_model_len", f"{max_model_len} is more than the model's {model.max_position} positions")
    dtype = dtype_of(options.dtype, native_dtype, device)
    shards = shards_of(options.sharding, model, device.count)
    seqs, checkpoints = _states(options, model, _state_bytes(options, model, dtype, draft, device), device)
    seqs = -(-seqs // shards.num_groups)
    tokens = -(-(options.max_num_batched_tokens or defaults.max_num_batched_tokens) // shards.num_groups)
    asked = options.quantization
    if options.quantize_lm_head and asked in ("auto", "stored", "none"):
        raise InvalidParam("quantize_lm_head", f"needs a quantization that packs while loading, not {asked}")
    target = target_of(device, options.kernel)
    config = EngineConfig(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_prefill_rows=min(defaults.max_prefill_rows, seqs),
        kv_cache_dtype=_KV_DTYPES.get(options.kv_cache_dtype, dtype),
        quantization=None if asked in ("auto", "stored", "none") else asked,
        stored=_kept_packed(asked, options.model, model, dtype, stored, target),
        packed_head=options.quantize_lm_head,
        state_checkpoints=checkpoints,
        target=target,
        shards=shards,
        in_panels=bool(target.native) and device.count == 1 and shards == WHOLE,
        page_size=page_size_of(options.page_size, defaults.page_size, shards),
        num_pages=2,
        **_call_length(options, target, defaults),
        draft_tokens=draft_tokens_of(options, defaults.draft_tokens),
        token_buckets=ladder(defaults.smallest_tokens, tokens, 2 if device.platform == "cpu" else 4),
        prefill_decode_buckets=(0, seqs),
        decode_buckets=ladder(defaults.smallest_rows, max(seqs, defaults.smallest_rows), 2),
        enable_prefix_caching=options.enable_prefix_caching,
        overlap=options.overlap,
        tpot_slo_s=None if options.tpot_slo_ms is None else options.tpot_slo_ms / 1e3,
        max_queued_requests=options.max_queued_requests,
        seed=options.seed,
    )
    return config if draft is None else replace(config, draft=_draft(options, model, config, draft, device))


def _call_length(options: EngineOptions, target: Target, defaults: Defaults) -> dict[str, Any]:
    """Fields of the configuration. A stated number of steps holds for every call."""
    if options.decode_steps is not None or target.loops_copy:
        return {"decode_steps": options.decode_steps or 1}
    return {
        "decode_steps": defaults.decode_steps,
        "fewest_decode_steps": defaults.fewest_decode_steps,
        "decode_call_s": defaults.decode_call_s,
    }


def draft_model_of(options: EngineOptions) -> str | None:
    """The model that shall propose tokens, if one shall. Raises InvalidParam where only half of it is asked for."""
    if options.draft_model is not None and options.speculation != "draft":
        raise InvalidParam("draft_model", "is for speculation draft")
    if options.draft_model is None and options.speculation == "draft":
        raise InvalidParam("speculation", "draft needs draft_model")
    return options.draft_model


def draft_tokens_of(options: EngineOptions, default: int) -> int:
    """Tokens to propose at once; 0 without speculation. Raises InvalidParam where they are asked for without it."""
    if options.speculation == "none":
        if options.draft_tokens is not None:
            raise InvalidParam("draft_tokens", "needs speculation")
        return 0
    return options.draft_tokens or default


def _kept_packed(asked: str, name: str, model: ModelConfig, dtype: str, stored: Packings, target: Target) -> Packings:
    """Of what the checkpoint called `name` has packed, what stays so.

    On a CPU that is by default what measured as fast as bfloat16 or faster: 4 bits, where compiled kernels multiply by
    them. The default model's numbers are those of bfloat16 weights, as its documentation has them.
    """
    if asked == "stored" or (asked == "auto" and target.platform != "cpu"):
        return stored
    if asked != "auto" or name == DEFAULT_MODEL or target.bfloat16_products:
        return ()
    specs = param_specs(model, jnp.dtype(dtype))
    return tuple((name, packing) for name, packing in stored if _served_in_4_bits(specs[name], packing, target))


def _served_in_4_bits(spec: ParamSpec, packing: Packing, target: Target) -> bool:
    if packing.format != "int4" or len(spec.device_shape) != 2:
        return False
    x = jax.ShapeDtypeStruct((1, spec.device_shape[0]), spec.dtype)
    call = quantized_matmul.spec_of(x, packed_shape(spec, packing))
    return target.asked("quantized_matmul") in (None, "cpu") and quantized_matmul_cpu.declines(call, target) is None


def _draft(
    options: EngineOptions, model: ModelConfig, config: EngineConfig, files: ModelFiles, device: DeviceFacts
) -> Draft:
    """What becomes of the draft model beside the model, under its configuration. Raises InvalidParam where it cannot
    draft for it."""
    drafting = files.model
    if drafting.vocab_size != model.vocab_size:
        raise InvalidParam(
            "draft_model", f"has a vocabulary of {drafting.vocab_size} tokens, the model one of {model.vocab_size}"
        )
    if drafting.recurrence is not None and model.recurrence is None:
        raise InvalidParam("draft_model", "has recurrent layers and the model none: prefixes are kept without states")
    if drafting.max_position < config.max_model_len:
        raise InvalidParam(
            "draft_model", f"has {drafting.max_position} positions; max_model_len {config.max_model_len} exceeds them"
        )
    if config.shards.count("layers") > 1:
        raise InvalidParam("speculation", "draft is not there where sharding cuts layers into stages")
    try:
        cut = shards_of(options.sharding, drafting, device.count)
    except InvalidParam as error:
        raise InvalidParam("draft_model", str(error)) from None
    dtype = dtype_of(options.dtype, files.native_dtype, device)
    kv_cache_dtype = _KV_DTYPES.get(options.kv_cache_dtype, dtype)
    named = options.draft_model or ""
    stored = _kept_packed(options.quantization, named, drafting, dtype, files.stored, config.target)
    return Draft(drafting, dtype, kv_cache_dtype, stored, cut)


def page_size_of(asked: int | None, default: int, shards: Shards) -> int:
    """Tokens in a page; by default each device that it is spread over gets as many as a whole one has elsewhere."""
    parts = shards.count("sequence")
    if asked is not None and asked % parts:
        raise InvalidParam("page_size", f"{asked} does not divide over the {parts} devices that have a page's tokens")
    return asked or default * parts


def shards_of(sharding: str, model: ModelConfig, num_devices: int) -> Shards:
    """What a sharding file, or one of configs/sharding, comes to for the model on so many devices."""
    try:
        shards = load_strategy(sharding).shards(axis_sizes(model), num_devices, param_axes(model))
    except ShardingError as error:
        raise InvalidParam("sharding", str(error)) from None
    if shards.count("sequence") > 1 and model.num_recurrent_layers == model.num_layers:
        raise InvalidParam("sharding", "spreads the pages of a sequence, but no layer of the model keeps any")
    _check_stages(model, shards)
    if shards.num_groups > 1 and model.recurrence is not None:
        raise InvalidParam("sharding", "divides requests, which is not there for recurrent layers")
    replicated(model, shards)  # raises where query heads do not divide over the copies of their KV head
    return shards


def _check_stages(model: ModelConfig, shards: Shards) -> None:
    """Raises InvalidParam where layers are cut into stages and something else cannot be with them."""
    if shards.count("layers") == 1:
        return
    one_stage(model, shards)
    wrong = {
        "recurrent layers, whose states micro-batches would share": model.recurrence is not None,
        "requests divided": shards.num_groups > 1,
        "pages of a sequence spread": shards.count("sequence") > 1,
        "overrides of layers": shards.in_layers,
    }
    for what, found in wrong.items():
        if found:
            raise InvalidParam("sharding", f"cuts layers into stages, which is not there with {what}")


def _state_bytes(
    options: EngineOptions, model: ModelConfig, dtype: str, draft: ModelFiles | None, device: DeviceFacts
) -> int:
    """Of one sequence, those of a draft model too."""
    both = [(model, dtype)]
    if draft is not None:
        both.append((draft.model, dtype_of(options.dtype, draft.native_dtype, device)))
    return sum(one.state_bytes(4 if own == "float32" else 2) for one, own in both)


def _states(
    options: EngineOptions, model: ModelConfig, state_bytes: int, device: DeviceFacts
) -> tuple[int, int | None]:
    """Sequences at once, and the states kept beside theirs for prefix reuse (None: the model has no states)."""
    seqs = options.max_num_seqs or DEFAULTS[device.platform].max_num_seqs
    if model.recurrence is None:
        if options.state_checkpoints is not None:
            raise InvalidParam("state_checkpoints", "the model has no recurrent layers")
        return seqs, None
    fit = int(usable_bytes(device) * STATES_FRACTION) // state_bytes
    if options.max_num_seqs is None:
        seqs = max(1, min(seqs, fit // 2))
    if not options.enable_prefix_caching:
        return seqs, 0
    asked = options.state_checkpoints
    return seqs, max(0, min(2 * seqs, fit - seqs - 1)) if asked is None else asked


def usable_bytes(device: DeviceFacts) -> int:
    """What weights, KV pool and temporaries may take together."""
    return int(device.memory_bytes * (CPU_MEMORY_FRACTION if device.platform == "cpu" else DEVICE_MEMORY_FRACTION))


def with_pages(
    config: EngineConfig, wanted_bytes: int | None, page_bytes: int, used_bytes: int, device: DeviceFacts
) -> EngineConfig:
    """`config` with as many pages as fit beside `used_bytes` (weights, slots, temporaries) and are of use.

    wanted_bytes: what the user asked for, or None. page_bytes 0: no layer attends, and pages are only counted.
    Raises CapacityError with the sizes.
    """
    budget = usable_bytes(device) - used_bytes
    if page_bytes == 0:
        return _countless(config, wanted_bytes, budget, device)
    useful = config.max_num_seqs * config.max_pages_per_seq * page_bytes
    default = (
        min(useful, max(CPU_KV_BYTES, page_bytes * config.max_pages_per_seq)) if device.platform == "cpu" else useful
    )
    target = wanted_bytes if wanted_bytes is not None else min(default, budget)
    if target > budget:
        raise CapacityError(
            f"kv_cache_memory_bytes: {target:,} bytes do not fit: the device has {device.memory_bytes:,}, of which "
            f"{usable_bytes(device):,} may be used and weights and programs take {used_bytes:,}"
        )
    pages = target // page_bytes
    if pages < 1:
        raise CapacityError(
            f"no room for a KV cache: a page of {config.page_size} tokens takes {page_bytes:,} bytes, "
            f"{max(target, 0):,} are left of {device.memory_bytes:,}"
        )
    return replace(config, num_pages=pages + 1)


def _countless(config: EngineConfig, wanted_bytes: int | None, budget: int, device: DeviceFacts) -> EngineConfig:
    """Pages for every sequence at its longest: they take no memory."""
    if wanted_bytes is not None:
        raise InvalidParam("kv_cache_memory_bytes", "no layer of the model keeps keys and values")
    if budget < 0:
        raise CapacityError(
            f"weights, {config.num_states} recurrent states and programs take {-budget:,} bytes more than the "
            f"{usable_bytes(device):,} that may be used of {device.memory_bytes:,}; lower max_num_seqs"
        )
    return replace(config, num_pages=config.max_num_seqs * config.max_pages_per_seq + 1)


def implementations(asked: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """("op", "implementation") of each "op=implementation"."""
    found = []
    for text in asked:
        op, _, name = text.partition("=")
        if op not in OPS or not name:
            raise InvalidParam("kernel", f"{text!r} is not op=implementation; the ops are {', '.join(OPS)}")
        found.append((op, name))
    return tuple(found)


def target_of(device: DeviceFacts, kernel: tuple[str, ...]) -> Target:
    """What programs are compiled for; kernel: op=implementation, as asked for by name."""
    own_products = device.platform == "cpu" and device.fast_bfloat16
    asked = implementations(kernel)
    return Target(device.platform, device.chip, asked, native=device.native, bfloat16_products=own_products)


def dtype_of(asked: str, native: str, device: DeviceFacts) -> Literal["bfloat16", "float32"]:
    """As asked; auto is the checkpoint's, but float32 where bfloat16 is slower: on a CPU without either such products
    or the compiled kernels."""
    fast = device.fast_bfloat16 or device.native
    if asked == "float32" or (asked == "auto" and (native == "float32" or not fast)):
        return "float32"
    return "bfloat16"


def ladder(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """smallest, smallest * factor, ... and at the end exactly `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return (*sizes, largest)
