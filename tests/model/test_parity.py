"""Every family against transformers: logits and greedy tokens, and that each feature is what makes them agree."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.config import LayerSpec, ModelConfig
from engine.model.decoder import hidden_states
from engine.model.params import param_specs
from engine.model.place import ALONE
from engine.model.rope import Context, make_rope
from tests.model.models import NAMES, checkpoint, expected, params, relative_error
from tests.oracle import DenseAttention, naive_greedy, naive_logits

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name: str) -> None:
    """One forward over prompt and greedy tokens checks both: by induction, argmax at each position is greedy."""
    config = checkpoint(name).config
    for case in expected(name):
        logits = naive_logits(config, params(name), case.prompt + case.greedy)
        assert relative_error(logits[case.positions], case.logits) < TOLERANCE
        assert logits[len(case.prompt) - 1 : -1].argmax(-1).tolist() == case.greedy


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_not_widened_on_the_way(name: str) -> None:
    """Only traced: no part mixes dtypes without saying so, and the last hidden states are as the first."""
    config = checkpoint(name).config
    weights = {
        key: jax.ShapeDtypeStruct(spec.device_shape, spec.dtype)
        for key, spec in param_specs(config, np.dtype(jnp.bfloat16)).items()
    }
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)

    def forward(params, tokens):
        caches = (None,) * config.num_layers
        return hidden_states(config, params, tokens, tokens, caches, None, DenseAttention(None), ALONE)[0]

    assert jax.eval_shape(forward, weights, tokens).dtype == jnp.bfloat16


def test_naive_greedy_is_the_same_loop() -> None:
    case = expected("smollm3")[2]
    assert naive_greedy(checkpoint("smollm3").config, params("smollm3"), case.prompt, 12) == case.greedy[:12]


def _layers(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, layers=tuple(dataclasses.replace(s, **changes) for s in config.layers))


def _no_window(config: ModelConfig) -> ModelConfig:
    return _layers(config, window=None)


def _one_wider(config: ModelConfig) -> ModelConfig:
    wider = tuple(dataclasses.replace(s, window=s.window + 1 if s.window else None) for s in config.layers)
    return dataclasses.replace(config, layers=wider)


def _default_rope(config: ModelConfig) -> ModelConfig:
    fields = {"rope_theta": 10_000.0}
    return _layers(config, rope=make_rope(fields, config.head_dim, Context(512, 512)))


def _rope_everywhere(config: ModelConfig) -> ModelConfig:
    return _layers(config, rope=next(s.rope for s in config.layers if s.rope))


def _unscaled_rope(config: ModelConfig) -> ModelConfig:
    layers = tuple(LayerSpec(dataclasses.replace(s.rope, scale=1.0), s.window) for s in config.layers if s.rope)
    return dataclasses.replace(config, layers=layers)


def _local_rope(config: ModelConfig) -> ModelConfig:
    return _layers(config, rope=config.layers[0].rope)


def _experts(config: ModelConfig, **changes) -> ModelConfig:
    assert config.experts is not None
    return dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes))


def _state_space(config: ModelConfig, **changes) -> ModelConfig:
    assert config.state_space is not None
    return dataclasses.replace(config, state_space=dataclasses.replace(config.state_space, **changes))


REMOVALS = [
    ("llama", "rope", lambda c: _layers(c, rope=None)),
    ("llama", "eps", lambda c: dataclasses.replace(c, norm_eps=1e-2)),
    ("llama_bias", "qkv_bias", lambda c: dataclasses.replace(c, qkv_bias=False)),
    ("llama_bias", "output_bias", lambda c: dataclasses.replace(c, output_bias=False)),
    ("llama_bias", "mlp_bias", lambda c: dataclasses.replace(c, mlp_bias=False)),
    ("llama_llama3", "llama3", _default_rope),
    ("llama_linear", "linear", _default_rope),
    ("qwen2_yarn", "yarn", _default_rope),
    ("qwen2_yarn", "yarn scale", _unscaled_rope),
    ("phi3", "partial rotary", _default_rope),
    ("phi3", "longrope scale", _unscaled_rope),
    ("phi3", "window", _no_window),
    ("phi3_long", "longrope scale", _unscaled_rope),
    ("mistral", "window", _no_window),
    ("mistral", "window edge", _one_wider),
    ("qwen2", "window", _no_window),
    ("qwen2", "qkv_bias", lambda c: dataclasses.replace(c, qkv_bias=False)),
    ("qwen3", "qk_norm", lambda c: dataclasses.replace(c, qk_norm="none")),
    ("smollm3", "no rope", _rope_everywhere),
    ("smollm3", "window", _no_window),
    ("gemma2", "attention softcap", lambda c: dataclasses.replace(c, attention_softcap=None)),
    ("gemma2", "final softcap", lambda c: dataclasses.replace(c, final_softcap=None)),
    ("gemma2", "embedding", lambda c: dataclasses.replace(c, embedding_multiplier=1.0)),
    ("gemma2", "scale", lambda c: dataclasses.replace(c, attention_scale=c.head_dim**-0.5)),
    ("gemma2", "activation", lambda c: dataclasses.replace(c, activation="gelu")),
    ("gemma2", "window", _no_window),
    ("gemma2", "post norm", lambda c: dataclasses.replace(c, norm_place="pre")),
    ("gemma3_text", "two ropes", _local_rope),
    ("gemma3_text", "qk_norm", lambda c: dataclasses.replace(c, qk_norm="none")),
    ("gemma3_text", "window", _no_window),
    ("granite", "embedding", lambda c: dataclasses.replace(c, embedding_multiplier=1.0)),
    ("granite", "residual", lambda c: dataclasses.replace(c, residual_multiplier=1.0)),
    ("granite", "logits", lambda c: dataclasses.replace(c, logits_multiplier=1.0)),
    ("granite", "scale", lambda c: dataclasses.replace(c, attention_scale=c.head_dim**-0.5)),
    ("olmo2", "qk_norm", lambda c: dataclasses.replace(c, qk_norm="none")),
    ("mixtral", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("mixtral", "window", _no_window),
    ("mixtral", "experts a token", lambda c: _experts(c, per_token=1)),
    ("qwen2_moe", "weights as they are", lambda c: _experts(c, normalize=True)),
    ("qwen2_moe", "shared expert", lambda c: _experts(c, shared_size=0, shared_gate=False)),
    ("qwen2_moe", "shared gate", lambda c: _experts(c, shared_gate=False)),
    ("qwen2_moe", "qkv_bias", lambda c: dataclasses.replace(c, qkv_bias=False)),
    ("qwen3_moe", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("qwen3_moe", "qk_norm", lambda c: dataclasses.replace(c, qk_norm="none")),
    ("granitemoe", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("granitemoe", "residual", lambda c: dataclasses.replace(c, residual_multiplier=1.0)),
    ("gpt_oss", "sinks", lambda c: dataclasses.replace(c, attention_sinks=False)),
    ("gpt_oss", "window", _no_window),
    ("gpt_oss", "clamp", lambda c: _experts(c, clamp=7.0)),
    ("gpt_oss", "clamped gate", lambda c: _experts(c, clamp=None)),
    ("gpt_oss", "experts' biases", lambda c: _experts(c, biases=False)),
    ("gpt_oss", "router bias", lambda c: _experts(c, router_bias=False)),
    ("gpt_oss", "yarn", _default_rope),
    ("deepseek_v2", "groups", lambda c: _experts(c, groups=1, groups_kept=1)),
    ("deepseek_v2", "a group's best", lambda c: _experts(c, group_best=2)),
    ("deepseek_v2", "scale", lambda c: _experts(c, scale=1.0)),
    ("deepseek_v2", "shared expert", lambda c: _experts(c, shared_size=0)),
    ("deepseek_v2", "yarn's mscale", lambda c: dataclasses.replace(c, attention_scale=c.head_dim**-0.5)),
    ("deepseek_v3", "correction", lambda c: _experts(c, correction=False)),
    ("deepseek_v3", "sigmoid", lambda c: _experts(c, scoring="softmax")),
    ("deepseek_v3", "groups", lambda c: _experts(c, groups=1, groups_kept=1)),
    ("deepseek_v3", "a group's two best", lambda c: _experts(c, group_best=1)),
    ("deepseek_v3", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("deepseek_v3", "yarn", lambda c: _layers(c, rope=make_rope({"rope_theta": 10_000.0}, 8, Context(512, 512)))),
    ("mamba2", "biases", lambda c: _state_space(c, bias=False)),
    ("mamba2", "convolution's bias", lambda c: _state_space(c, conv_bias=False)),
    ("mamba2", "shortest time step", lambda c: _state_space(c, least_step=0.0)),
    ("mamba2", "longest time step", lambda c: _state_space(c, most_step=1.0)),
    ("mamba2", "eps", lambda c: dataclasses.replace(c, norm_eps=1e-2)),
    ("granitemoehybrid", "no rope", lambda c: _layers(c, rope=make_rope({"rope_theta": 1e4}, 8, Context(512, 512)))),
    ("granitemoehybrid", "shared expert", lambda c: _experts(c, shared_size=0)),
    ("granitemoehybrid", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("granitemoehybrid", "convolution's bias", lambda c: _state_space(c, conv_bias=False)),
    ("granitemoehybrid", "embedding", lambda c: dataclasses.replace(c, embedding_multiplier=1.0)),
    ("granitemoehybrid", "residual", lambda c: dataclasses.replace(c, residual_multiplier=1.0)),
    ("granitemoehybrid", "logits", lambda c: dataclasses.replace(c, logits_multiplier=1.0)),
    ("granitemoehybrid", "scale", lambda c: dataclasses.replace(c, attention_scale=c.head_dim**-0.5)),
    ("granitemoehybrid_dense", "rope", lambda c: _layers(c, rope=None)),
    ("granitemoehybrid_dense", "qkv_bias", lambda c: dataclasses.replace(c, qkv_bias=False)),
    ("granitemoehybrid_dense", "mamba's biases", lambda c: _state_space(c, bias=False)),
    ("qwen3_next", "attention's gate", lambda c: dataclasses.replace(c, attention_gate=False)),
    ("qwen3_next", "partial rotary", _default_rope),
    ("qwen3_next", "qk_norm", lambda c: dataclasses.replace(c, qk_norm="none")),
    ("qwen3_next", "normalized weights", lambda c: _experts(c, normalize=False)),
    ("qwen3_next", "shared expert", lambda c: _experts(c, shared_size=0, shared_gate=False)),
    ("qwen3_next", "shared gate", lambda c: _experts(c, shared_gate=False)),
]


def removals(rows):
    """A feature is shown for the first family that has it; for the others on demand, since each compiles a forward."""
    first = {feature: name for name, feature, _ in reversed(rows)}
    return [
        pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=[] if first[row[1]] == row[0] else [pytest.mark.slow])
        for row in rows
    ]


@pytest.mark.parametrize(("name", "feature", "change"), removals(REMOVALS))
def test_every_feature_matters(name: str, feature: str, change) -> None:
    """Without the feature the same comparison fails, so the parity above does test it."""
    changed = change(checkpoint(name).config)
    kept = param_specs(changed, np.dtype(np.float32))
    weights = {key: array for key, array in params(name).items() if key in kept}
    case = expected(name)[-1]
    logits = naive_logits(changed, weights, case.prompt)
    assert relative_error(logits[case.positions], case.logits) > 2 * TOLERANCE


# What no field of the config takes away: (model, weight, what becomes of it).
WEIGHTS = [
    ("mamba2", "skip", jnp.zeros_like),
    ("mamba2", "a_log", lambda a: a + 0.1),  # all states fade a little sooner
    ("mamba2", "dt_bias", jnp.zeros_like),
    ("mamba2", "conv", lambda a: a.at[:-1].set(0)),
    ("mamba2", "ssm_norm", jnp.ones_like),
    ("granitemoehybrid", "a_log", lambda a: a + 0.1),
    ("qwen3_next", "a_log", lambda a: a + 0.1),
    ("qwen3_next", "dt_bias", jnp.zeros_like),
    ("qwen3_next", "conv", lambda a: a.at[:-1].set(0)),
    ("qwen3_next", "delta_norm", jnp.ones_like),
    ("qwen3_next", "delta_steps", jnp.zeros_like),
    ("qwen3_next", "q_norm", lambda a: a - 1),  # the file has what is added to 1
]


@pytest.mark.parametrize(("name", "weight", "change"), removals(WEIGHTS))
def test_every_weight_of_a_state_matters(name: str, weight: str, change) -> None:
    weights = {key: change(a) if key.endswith(f".{weight}") else a for key, a in params(name).items()}
    case = expected(name)[-1]
    logits = naive_logits(checkpoint(name).config, weights, case.prompt + case.greedy)  # as above: compiled already
    assert relative_error(logits[case.positions], case.logits) > 2 * TOLERANCE
