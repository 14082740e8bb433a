"""Reading a Hugging Face config key by key, so that no key that matters is passed over.

Knows which keys never change a token's logits; what each family does with the others is not
known here. Values are checked as they are read; errors name the key and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import ModelError
from engine.model.config import Rope
from engine.model.rope import Context, make_rope

MAX_COUNT = 2**31 - 1
MAX_LAYERS = 4096  # more is a broken file, not a model

# Keys without effect on inference mathematics: training, bookkeeping, token ids, sampling defaults.
_INERT_KEYS = """
    model_type architectures transformers_version torch_dtype dtype auto_map _name_or_path name_or_path
    _commit_hash use_cache cache_implementation bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id cls_token_id decoder_start_token_id initializer_range pretraining_tp
    output_hidden_states output_attentions output_scores return_dict return_dict_in_generate use_return_dict
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer_class prefix torchscript use_bfloat16 tf_legacy_loss
    _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    use_flash_attn _experts_implementation experts_implementation unsloth_version unsloth_fixed
    transformers.js_config is_llama_config gradient_checkpointing
    do_sample temperature top_p top_k min_p typical_p epsilon_cutoff eta_cutoff num_beams num_beam_groups
    num_return_sequences max_length max_new_tokens min_length min_new_tokens early_stopping length_penalty
    repetition_penalty diversity_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty
"""
# How weights are stored, which is the loader's to read or refuse (`weights/hf_packed.py`), and what may be done with
# an embedding (`engine/pooling/load.py`).
INERT = frozenset({*_INERT_KEYS.split(), "quantization_config", "is_matryoshka", "matryoshka_dimensions"})
INERT_ENDINGS = ("dropout", "dropout_prob", "_pdrop")  # dropout is for training


class Keys:
    """A config dict whose reads are counted; `finish` refuses what nobody read.

    A missing key takes the family's default from `defaults` (what transformers' config class has).
    """

    def __init__(self, hf: Mapping[str, Any], defaults: Mapping[str, Any], max_model_len: int | None) -> None:
        self._hf = hf
        self._defaults = defaults
        self._read: set[str] = set()
        self._max_model_len = max_model_len

    def value(self, key: str, default: Any = None) -> Any:
        """The raw value; null is None. A missing key takes the family's default, then `default`."""
        self._read.add(key)
        return self._hf[key] if key in self._hf else self._defaults.get(key, default)

    def count(self, key: str, default: int | None = None, limit: int = MAX_COUNT) -> int:
        """A required positive integer; `default` also stands for null."""
        value = self.value(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"config.json has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise self.wrong(key, f"must be an integer in 1..{limit}")
        return value

    def spelling(self, *keys: str) -> str:
        """Which of several spellings of one key is written; the first if none is. Two must agree."""
        written = [key for key in keys if self._hf.get(key) is not None]
        for key in written[1:]:
            if self.value(key) != self.value(written[0]):
                raise self.wrong(key, f"contradicts {written[0]} = {self.value(written[0])!r}")
        return written[0] if written else keys[0]

    def optional_count(self, key: str) -> int | None:
        return None if self.value(key) is None else self.count(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; `default` also stands for null."""
        value = self.value(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"config.json has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "must be a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "must be greater than 0")
        return value

    def optional_positive(self, key: str) -> float | None:
        return None if self.value(key) is None else self.positive(key)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value not in (None, False, True) or (isinstance(value, int) and not isinstance(value, bool)):
            raise self.wrong(key, "must be true or false")
        return bool(value)

    def choice(self, key: str, table: Mapping[str, str], default: str) -> str:
        value = self.value(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in table:
            raise self.wrong(key, f"is not supported; known: {', '.join(table)}")
        return table[value]

    def per_layer(self, key: str, num_layers: int, allowed: Sequence[Any]) -> list[Any] | None:
        """A list of one of `allowed` for each layer, or None when there is no such key."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < num_layers:
            raise self.wrong(key, f"must be a list with one entry for each of the {num_layers} layers")
        for layer, entry in enumerate(value[:num_layers]):
            if entry not in allowed:
                raise ModelError(f"config.json: {key}[{layer}] = {entry!r} is not supported; known: {allowed}")
        return value[:num_layers]

    def neutral(self, key: str, value: float) -> None:
        """A key of some exporters that is supported only with the value that changes nothing."""
        if self.value(key, value) not in (value, None):
            raise self.wrong(key, f"is not supported; only {value} is")

    def wrong(self, key: str, why: str) -> ModelError:
        return ModelError(f"config.json: {key} = {self.value(key)!r} {why}")

    @property
    def max_position(self) -> int:
        return self.count("max_position_embeddings")

    def rope(self, head_dim: int, *, partial: bool = False) -> Rope:
        """The one rope of a model, from either spelling. `partial`: the family can rotate a part of head_dim."""
        fields, where = self.rope_fields()
        rope = self.make_rope(fields, head_dim, where)
        if not partial and 2 * len(rope.inv_freq) != head_dim:
            raise ModelError(f"config.json: partial_rotary_factor of {2 * len(rope.inv_freq) / head_dim} "
                             "is not supported for this family")  # fmt: skip
        return rope

    def rope_fields(self) -> tuple[dict[str, Any], str]:
        """The rope dict as written, and its name: `rope_parameters` (new) or `rope_scaling` (old)."""
        new, old = self.value("rope_parameters"), self.value("rope_scaling")
        if new and old and new != old:
            raise ModelError("config.json has both rope_parameters and rope_scaling, and they differ")
        where = "rope_parameters" if new else "rope_scaling"
        fields = new or old or {}
        if not isinstance(fields, dict):
            raise self.wrong(where, "must be an object")
        return dict(fields), f"config.json: {where}"

    def make_rope(self, fields: dict[str, Any], head_dim: int, where: str, theta_key: str = "rope_theta") -> Rope:
        """`fields` completed from the keys that the old spelling keeps next to them."""
        for name, key in (("rope_theta", theta_key), ("partial_rotary_factor", "partial_rotary_factor")):
            beside = self.value(key)
            fields[name] = beside if fields.get(name) is None else fields[name]
        outer_length = self.value("original_max_position_embeddings")
        if outer_length is not None and fields.get("rope_type", fields.get("type")) in ("llama3", "yarn", "longrope"):
            fields["original_max_position_embeddings"] = outer_length  # transformers gives it priority
        if fields["rope_theta"] is None:
            fields["rope_theta"] = 10_000.0
        context = Context(self.max_position, self._max_model_len or self.max_position)
        return make_rope(fields, head_dim, context, where)

    def finish(self, family: str) -> None:
        """Refuse the keys that were not read and could change the mathematics."""
        for key, value in self._hf.items():
            inert = key in INERT or key.endswith(INERT_ENDINGS)
            if key in self._read or inert or value is None or value is False or value in ([], {}):
                continue
            raise ModelError(f"config.json: {key} = {value!r} is not known for {family} and could change its results")
