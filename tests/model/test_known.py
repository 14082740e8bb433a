"""The shapes in configs/models against the number of parameters that each maker publishes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.errors import InvalidParam
from engine.model.known import known_config, known_models
from engine.model.params import param_specs

# Of the published safetensors; without DeepSeek-V3's second-token layer and Gemma's vision tower.
PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "gemma-3-27b": 27_009_346_304,
    "gpt-oss-120b": 116_829_156_672,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
}


def test_every_model_is_checked() -> None:
    assert known_models() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    specs = param_specs(known_config(name), np.dtype(np.float32))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == PARAMETERS[name]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InvalidParam, match=r"did you mean llama-3\.1-8b"):
        known_config("llama-3.1-8")
