"""What every "auto" becomes, and how many pages a memory holds: tables over pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import pytest

from engine.batch import lattice
from engine.config import DEFAULT_MODEL, EngineConfig, EngineOptions, options_from_dict
from engine.errors import CapacityError, InvalidParam
from engine.kernels import kernel_choices
from engine.model.config import ModelConfig
from engine.model.packing import Packing, Packings
from engine.programs import compute_of, kv_shapes, page_bytes, state_bytes
from engine.resolve import GIB, DeviceFacts, resolve, usable_bytes, with_pages
from tests.engine.world import MIXED, MODEL, STATE_SPACE

CPU = DeviceFacts("cpu", 16 * GIB, fast_bfloat16=False)
CPU_BF16 = DeviceFacts("cpu", 16 * GIB, fast_bfloat16=True)
GPU = DeviceFacts("gpu", 80 * GIB, fast_bfloat16=True)
TPU = DeviceFacts("tpu", 32 * GIB, fast_bfloat16=True)


def resolved(device: DeviceFacts = CPU, native: str = "bfloat16", **options: Any) -> EngineConfig:
    return resolve(EngineOptions(**options), MODEL, native, device)


@pytest.mark.parametrize(
    ("asked", "native", "device", "expected"),
    [
        ("auto", "bfloat16", CPU, "float32"),
        ("auto", "bfloat16", CPU_BF16, "bfloat16"),
        ("auto", "bfloat16", replace(CPU, native="avx2"), "bfloat16"),
        ("auto", "bfloat16", GPU, "bfloat16"),
        ("auto", "float16", GPU, "bfloat16"),
        ("auto", "float32", GPU, "float32"),
        ("bfloat16", "float32", CPU, "bfloat16"),
        ("float32", "bfloat16", TPU, "float32"),
    ],
)
def test_dtype(asked: str, native: str, device: DeviceFacts, expected: str) -> None:
    assert resolved(device, native, dtype=asked).dtype == expected


@pytest.mark.parametrize(
    ("asked", "device", "quantization", "kept"),
    [
        ("auto", CPU, None, False),
        ("auto", TPU, None, True),
        ("auto", GPU, None, True),
        ("stored", CPU, None, True),
        ("none", TPU, None, False),
        ("int8", TPU, "int8", False),
    ],
)
def test_what_a_checkpoint_has_packed(asked: str, device: DeviceFacts, quantization: str | None, kept: bool) -> None:
    stored = (("layers.0.o", Packing("int4", 32)),)
    options = options_from_dict(EngineOptions, {"quantization": asked})
    config = resolve(options, MODEL, "bfloat16", device, stored)
    assert (config.quantization, config.stored) == (quantization, stored if kept else ())
    assert ("stored 1 weights" in config.summary()) == kept


def test_what_stays_packed_on_a_cpu_with_compiled_kernels() -> None:
    """Four bits that they multiply by; a Q6_K beside it, experts and the default model become float."""
    device = replace(CPU, native="avx2")
    four = ("layers.0.o", Packing("int4", 32))
    stored = (four, ("layers.0.qkv", Packing("int8", 16)), ("layers.1.o", Packing("int4", 32)))

    def kept(device: DeviceFacts = device, of: ModelConfig = MODEL, **options: Any) -> Packings:
        asked: dict[str, Any] = {"model": "mine.gguf", **options}
        return resolve(EngineOptions(**asked), of, "bfloat16", device, stored).stored

    assert kept() == (four, stored[2])
    assert kept(quantization="stored") == stored
    assert kept(of=replace(MODEL, hidden_size=40)) == (), "sizes that kernels decline"
    assert kept(quantization="none") == () == kept(kernel=("quantized_matmul=reference",))
    assert kept(model=DEFAULT_MODEL) == () and kept(model=DEFAULT_MODEL, quantization="stored") == stored
    assert kept(CPU) == () == kept(replace(device, fast_bfloat16=True))


def test_a_packed_head_needs_something_to_be_packed_into() -> None:
    assert resolved(quantization="int4", quantize_lm_head=True).packed_head
    for asked in ("auto", "stored", "none"):
        with pytest.raises(InvalidParam, match="quantize_lm_head"):
            resolved(quantization=asked, quantize_lm_head=True)


@pytest.mark.parametrize("device", [CPU, GPU, TPU], ids=lambda d: d.platform)
@pytest.mark.parametrize("seqs", [None, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("tokens", [None, 1, 31, 32, 33, 100])
def test_buckets_ascend_and_end_at_what_was_asked(device: DeviceFacts, seqs: int | None, tokens: int | None) -> None:
    config = resolved(device, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert seqs is None or config.max_num_seqs == seqs
    assert tokens is None or config.max_num_batched_tokens == tokens
    assert config.token_buckets[-1] == config.max_num_batched_tokens
    assert config.prefill_decode_buckets == (0, config.max_num_seqs)
    assert config.decode_buckets[-1] >= config.max_num_seqs
    for ladder in (config.token_buckets, config.decode_buckets):
        assert list(ladder) == sorted(set(ladder)) and ladder[0] > 0
    assert 1 <= config.max_prefill_rows <= config.max_num_seqs
    assert len(lattice(config)) < 25, "each program costs start-up time"


def test_options_win_over_defaults() -> None:
    options: dict[str, Any] = {
        "max_model_len": 100,
        "page_size": 8,
        "decode_steps": 2,
        "seed": 5,
        "max_queued_requests": 3,
    }
    config = resolved(**options, enable_prefix_caching=False, overlap=False)
    assert {name: getattr(config, name) for name in options} == options
    assert not config.enable_prefix_caching and not config.overlap and config.max_pages_per_seq == 13


def test_context_is_the_models_unless_asked() -> None:
    assert resolved().max_model_len == MODEL.max_position == resolved(max_model_len=512).max_model_len
    with pytest.raises(InvalidParam, match="max_model_len: 513 is more than the model's 512"):
        resolved(max_model_len=513)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "float32"), ("int8", "int8"), ("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn"),
     ("fp8_e5m2", "float8_e5m2")],
)  # fmt: skip
def test_kv_cache_dtype(asked: str, expected: str) -> None:
    config = resolved(kv_cache_dtype=asked)
    assert config.kv_cache_dtype == expected and compute_of(MODEL, config).kv.dtype == expected


def test_a_quantized_cache_holds_more_tokens_in_the_same_bytes() -> None:
    """bfloat16: 2 bytes a number; 8-bit: 1, and an exponent a head vector, padded to 16 bytes on a CPU."""
    plain, packed = (page_bytes(MODEL, resolved(dtype="bfloat16", kv_cache_dtype=kind)) for kind in ("auto", "int8"))
    numbers = 2 * MODEL.num_kv_heads * MODEL.head_dim
    assert plain == 16 * MODEL.num_layers * 2 * numbers
    assert packed == 16 * MODEL.num_layers * (numbers + 16)


def test_unknown_values_are_named() -> None:
    for name, value in (("kv_cache_dtype", "int4"), ("quantization", "int2")):
        with pytest.raises(InvalidParam, match="must be one of") as error:
            options_from_dict(EngineOptions, {name: value})
        assert error.value.param == name
    for text in ("kv_write", "kv_write=", "product=reference"):
        with pytest.raises(InvalidParam, match="is not op=implementation"):
            resolved(kernel=(text,))


def test_the_choices_of_a_model_are_said_once_each() -> None:
    lines = kernel_choices(MIXED, resolved())
    assert len(lines) == len(set(lines))
    for op in ("decode_attention", "prefill_attention", "kv_write", "grouped_matmul"):
        assert any(line.startswith(f"{op}: reference") for line in lines), op
    assert not any(line.startswith("quantized_matmul") for line in lines)
    packed = kernel_choices(MODEL, resolved(quantization="int8"))
    assert any(line.startswith("quantized_matmul: reference") for line in packed)


def test_a_kernel_asked_for_by_name_is_never_replaced() -> None:
    with pytest.raises(InvalidParam, match=r"asked for and declines: .*for tpu") as error:
        kernel_choices(MODEL, resolved(kernel=("kv_write=tpu",)))
    assert error.value.param == "kernel"
    with pytest.raises(InvalidParam, match="kv_write"):
        kernel_choices(MODEL, resolved(kernel=("kv_write=fastest",)))


def pages(config: EngineConfig, wanted: int | None, page_bytes: int, used: int, device: DeviceFacts = CPU) -> int:
    """Usable pages, without the trash page."""
    return with_pages(config, wanted, page_bytes, used, device).num_pages - 1


def test_pages_that_were_asked_for() -> None:
    config = resolved()
    assert pages(config, 1000, 100, 0) == 10 and pages(config, 1099, 100, 0) == 10 and pages(config, 100, 100, 0) == 1
    budget = usable_bytes(CPU)
    assert pages(config, 1000, 100, budget - 1000) == 10
    with pytest.raises(CapacityError, match="kv_cache_memory_bytes: 1,000 bytes do not fit"):
        pages(config, 1000, 100, budget - 999)
    with pytest.raises(CapacityError, match="a page of 16 tokens takes 100 bytes, 99 are left"):
        pages(config, 99, 100, 0)


def test_pages_by_default() -> None:
    """No more than of use; on a CPU a GiB, or one longest sequence; elsewhere what is left."""
    config = resolved(max_num_seqs=4, max_model_len=160)
    useful = 4 * 10
    assert pages(config, None, 100, 0) == useful
    assert pages(config, None, GIB // 20, 0) == 20
    assert pages(config, None, GIB // 5, 0) == 10, "one sequence of full length"
    assert pages(config, None, GIB, usable_bytes(CPU) - 3 * GIB) == 3, "whatever is left"
    on_gpu = resolved(GPU, max_num_seqs=4, max_model_len=160)
    assert pages(on_gpu, None, GIB, 0, GPU) == 20 and pages(on_gpu, None, 4 * GIB, GIB, GPU) == 18
    for used in (usable_bytes(CPU), 2 * usable_bytes(CPU)):
        with pytest.raises(CapacityError, match="no room for a KV cache"):
            pages(config, None, 100, used)


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_model_len", "page_size", "kv_cache_memory_bytes", "decode_steps"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_counts_must_be_positive_integers(name: str, value: object) -> None:
    with pytest.raises(InvalidParam) as error:
        EngineOptions(**{name: value})  # type: ignore[arg-type]
    assert error.value.param == name


def test_an_unknown_option_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(InvalidParam, match="max_num_seq: is not an option of EngineOptions; did you mean max_num_seqs"):
        options_from_dict(EngineOptions, {"max_num_seq": 3})
    with pytest.raises(InvalidParam) as error:
        options_from_dict(EngineOptions, {"zzz": 3})
    assert "mean" not in str(error.value) and error.value.param == "zzz"
    with pytest.raises(InvalidParam, match="dtype"):
        EngineOptions(dtype="float64")  # type: ignore[arg-type]


def with_states(device: DeviceFacts = CPU, state_dim: int = 8, **options: Any) -> EngineConfig:
    assert STATE_SPACE.state_space is not None
    model = replace(STATE_SPACE, state_space=replace(STATE_SPACE.state_space, state_dim=state_dim))
    return resolve(EngineOptions(**options), model, "float32", device)


def test_states_are_counted() -> None:
    """Per recurrent layer 3 tokens before the newest of 64 channels, and 4 matrices of 8 x 8; no pages for it."""
    config = with_states(max_num_seqs=4, state_checkpoints=5)
    assert config.num_states == 10 and state_bytes(STATE_SPACE, config) == 10 * 4 * (3 * 64 + 4 * 8 * 8)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv_shapes(STATE_SPACE, config)))
    assert held == state_bytes(STATE_SPACE, config) + config.num_pages * page_bytes(STATE_SPACE, config)
    assert page_bytes(STATE_SPACE, config) == page_bytes(MODEL, config) // 3


def test_states_by_default() -> None:
    """Two checkpoints a sequence, where a quarter of the memory holds them; else fewer sequences too."""
    assert (with_states().max_num_seqs, with_states().state_checkpoints) == (32, 64)
    assert with_states(enable_prefix_caching=False).state_checkpoints == 0
    large = with_states(state_dim=1 << 20)  # 32 rows of 4 MiB and a window of 3 x 16 MiB: 18 states in 3.2 GiB
    assert (large.max_num_seqs, large.state_checkpoints) == (9, 8)
    asked = with_states(state_dim=1 << 20, max_num_seqs=20, state_checkpoints=3)
    assert (asked.max_num_seqs, asked.state_checkpoints) == (20, 3)
    with pytest.raises(InvalidParam, match="state_checkpoints: the model has no recurrent layers"):
        resolved(state_checkpoints=3)
    with pytest.raises(InvalidParam, match="state_checkpoints: must be an integer of 0 or more"):
        with_states(state_checkpoints=-1)


def test_pages_without_keys_are_only_counted() -> None:
    config = with_states(max_num_seqs=3, max_model_len=100)
    assert pages(config, None, 0, 0) == 3 * 7
    with pytest.raises(InvalidParam, match="kv_cache_memory_bytes: no layer of the model keeps keys"):
        pages(config, 1000, 0, 0)
    with pytest.raises(CapacityError, match="lower max_num_seqs"):
        pages(config, None, 0, usable_bytes(CPU) + 1)


def test_recurrent_ops_have_a_choice() -> None:
    lines = kernel_choices(STATE_SPACE, with_states())
    assert {"short_conv: reference", "ssd: reference (tpu: for tpu)"} <= set(lines)
