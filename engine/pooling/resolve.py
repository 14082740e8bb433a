"""From what was asked, the model's files and the device to one concrete `PoolingConfig`. Pure functions."""

from __future__ import annotations

from engine.config import EngineOptions
from engine.errors import InvalidParam, ModelError
from engine.model.config import ModelConfig
from engine.model.encoder_config import EncoderConfig
from engine.pooling.config import Matryoshka, Pooling, PoolingConfig, PoolingKind
from engine.resolve import DEFAULTS, DeviceFacts, dtype_of, ladder, target_of

SMALLEST_LENGTH = 8  # tokens: with two special ones, a text of a few words
# Options that mean nothing without a cache or a next token.
_OF_GENERATION = (
    "page_size", "kv_cache_memory_bytes", "state_checkpoints", "decode_steps", "chat_template", "draft_tokens",
    "draft_model",
)  # fmt: skip


def resolve_pooling(
    options: EngineOptions,
    model: EncoderConfig | ModelConfig,
    pooling: Pooling,
    native_dtype: str,
    device: DeviceFacts,
    matryoshka: Matryoshka,
) -> PoolingConfig:
    """pooling, matryoshka: what the model's files say."""
    for name in _OF_GENERATION:
        if getattr(options, name) is not None:
            raise InvalidParam(name, f"is for models that generate text; {options.model} does not")
    if options.kv_cache_dtype != "auto":
        raise InvalidParam("kv_cache_dtype", f"is for models that generate text; {options.model} does not")
    if options.speculation != "none":
        raise InvalidParam("speculation", f"is for models that generate text; {options.model} does not")
    if options.sharding != "single":
        raise InvalidParam("sharding", f"{options.sharding} is for models that generate text; {options.model} does not")
    if options.quantization == "stored":
        raise InvalidParam("quantization", f"stored is for models that generate text; {options.model} does not")
    _check_parts(model)
    defaults, scores = DEFAULTS[device.platform], bool(isinstance(model, EncoderConfig) and model.num_labels)
    limit = _limit(options, model, pooling)
    tokens = options.max_num_batched_tokens or defaults.max_num_batched_tokens
    asked = options.quantization
    return PoolingConfig(
        task="score" if scores else "embed",
        dtype=dtype_of(options.dtype, native_dtype, device),
        pooling=_kind(options, model, pooling, scores),
        normalize=next(flag for flag in (options.normalize, pooling.normalize, True) if flag is not None),
        matryoshka=Matryoshka(options.is_matryoshka or matryoshka.possible, matryoshka.dimensions),
        score=model.score if isinstance(model, EncoderConfig) else "identity",
        hidden_size=model.hidden_size,
        max_model_len=limit,
        max_num_seqs=options.max_num_seqs or tokens,
        max_num_batched_tokens=tokens,
        length_buckets=ladder(min(SMALLEST_LENGTH, limit), limit, 2),
        token_buckets=ladder(min(defaults.smallest_tokens, tokens), tokens, 4),
        quantization=None if asked in ("auto", "stored", "none") else asked,
        target=target_of(device, options.kernel),
        overlap=options.overlap,
        max_queued_requests=options.max_queued_requests,
    )


def _limit(options: EngineOptions, model: EncoderConfig | ModelConfig, pooling: Pooling) -> int:
    """Tokens of the longest text: as asked, else as the model was trained (sentence-transformers' max_seq_length)."""
    if options.max_model_len is not None and options.max_model_len > model.max_position:
        raise InvalidParam(
            "max_model_len", f"{options.max_model_len} is more than the model's {model.max_position} positions"
        )
    return options.max_model_len or min(pooling.max_tokens or model.max_position, model.max_position)


def _kind(options: EngineOptions, model: EncoderConfig | ModelConfig, pooling: Pooling, scores: bool) -> PoolingKind:
    """As asked, else as the files say, else what sentence-transformers does: mean; of a decoder its last token."""
    if scores:
        for name in ("pooling", "normalize"):
            if getattr(options, name) is not None:
                raise InvalidParam(name, f"is for embeddings; {options.model} scores pairs by its first token")
        if options.is_matryoshka:
            raise InvalidParam("is_matryoshka", f"is for embeddings; {options.model} scores pairs")
        return "cls"
    usual: PoolingKind = "mean" if isinstance(model, EncoderConfig) else "last"
    return options.pooling or pooling.kind or usual


def _check_parts(model: EncoderConfig | ModelConfig) -> None:
    """Refuses what a forward without a cache, or an answer of one number, cannot be made of."""
    if isinstance(model, EncoderConfig):
        if model.num_labels > 1:
            raise ModelError(f"config.json: {model.num_labels} labels: a score is one number; classifiers with more "
                             "labels are not supported")  # fmt: skip
        return
    others = sorted({layer.mixer for layer in model.layers} - {"attention", "latent"})
    if others:
        raise ModelError(f"embeddings from layers that keep a state ({', '.join(others)}) are not supported")
