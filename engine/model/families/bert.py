"""BERT and RoBERTa (XLM-R has its spelling): config.json -> `EncoderConfig`.

Knows their keys, those of sentence-transformers' cross-encoders included; reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ModelError
from engine.model.encoder_config import EncoderConfig
from engine.model.families.common import ACTIVATIONS, layer_count
from engine.model.families.keys import Keys

Head = Literal["none", "pooler", "dense"]


@dataclass(frozen=True)
class EncoderFamily:
    """A model_type: its architectures with the head of each, and the defaults of keys left out."""

    architectures: Mapping[str, Head]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    counts_from_padding: bool = False  # positions begin behind pad_token_id


_BERT = {"vocab_size": 30_522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
_ROBERTA = {**_BERT, "vocab_size": 50_265, "pad_token_id": 1}
ENCODERS: dict[str, EncoderFamily] = {
    "bert": EncoderFamily({"BertModel": "none", "BertForSequenceClassification": "pooler"}, _BERT),
    "roberta": EncoderFamily({"RobertaModel": "none", "RobertaForSequenceClassification": "dense"}, _ROBERTA, True),
    "xlm-roberta": EncoderFamily(
        {"XLMRobertaModel": "none", "XLMRobertaForSequenceClassification": "dense"}, {**_ROBERTA, "vocab_size": 30_522},
        True,
    ),
}  # fmt: skip
# What torch calls the function on a cross-encoder's logit.
_SCORES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}
# Of multilingual BERT and of pretraining; nothing that a forward reads.
_UNUSED = ("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
           "pooler_size_per_head", "pooler_type", "output_past")  # fmt: skip


def encoder_config(hf: Mapping[str, Any]) -> EncoderConfig:
    """`EncoderConfig` of a config.json whose model_type is in ENCODERS. Raises ModelError that names the key."""
    model_type = str(hf.get("model_type"))
    family = ENCODERS[model_type]
    architectures = hf.get("architectures")
    known = ", ".join(family.architectures)
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in family.architectures:
        raise ModelError(f"config.json: architectures = {architectures!r} is not supported for {model_type}; "
                         f"known: {known}")  # fmt: skip
    keys = Keys(hf, family.defaults, None)
    try:
        config = _read(keys, model_type, family, family.architectures[architectures[0]])
    except ValueError as error:  # EncoderConfig's own checks
        raise ModelError(f"config.json: {error}") from error
    keys.finish(model_type)
    return config


def _read(keys: Keys, model_type: str, family: EncoderFamily, head: Head) -> EncoderConfig:
    keys.choice("position_embedding_type", {"absolute": "absolute"}, "absolute")
    for key in _UNUSED:
        keys.value(key)
    keys.flag("tie_word_embeddings")  # of a language model's head, which is not there
    return EncoderConfig(
        family=model_type,
        vocab_size=keys.count("vocab_size"),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        num_heads=keys.count("num_attention_heads"),
        num_layers=layer_count(keys),
        num_positions=keys.count("max_position_embeddings"),
        num_types=keys.count("type_vocab_size"),
        activation=keys.choice("hidden_act", ACTIVATIONS, "gelu"),  # type: ignore[arg-type]
        norm_eps=keys.positive("layer_norm_eps", 1e-12),
        padding_id=_padding_id(keys) if family.counts_from_padding else None,
        head=head,
        num_labels=_num_labels(keys) if head != "none" else 0,
        score=_score(keys),
    )


def _padding_id(keys: Keys) -> int:
    value = keys.value("pad_token_id")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise keys.wrong("pad_token_id", "must be a token id: positions are counted from it")
    return value


def _num_labels(keys: Keys) -> int:
    """transformers writes names of labels; without any there are two."""
    names = keys.value("id2label")
    if names is None:
        return keys.count("num_labels", default=2)
    if not isinstance(names, dict) or not names:
        raise keys.wrong("id2label", "must be an object with an entry for each label")
    return len(names)


def _score(keys: Keys) -> Literal["sigmoid", "identity"]:
    """sentence-transformers' key, in its old and its new place; the default is its own for one label."""
    new, old = keys.value("sentence_transformers"), keys.value("sbert_ce_default_activation_function")
    if new is not None and not isinstance(new, dict):
        raise keys.wrong("sentence_transformers", "must be an object")
    named = (new or {}).get("activation_fn", old)
    if named is None:
        return "sigmoid"
    if named not in _SCORES:
        where = "sbert_ce_default_activation_function" if named == old else "sentence_transformers"
        raise keys.wrong(where, f"names an activation that is not supported; known: {', '.join(_SCORES)}")
    return _SCORES[named]  # type: ignore[return-value]
