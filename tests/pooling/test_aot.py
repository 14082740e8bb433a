"""The pooling programs, compiled for chips that are not here: all-MiniLM-L6-v2 whole, two layers of a decoder."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from engine.config import EngineOptions
from engine.model.config import ModelConfig
from engine.model.encoder_config import EncoderConfig
from engine.model.known import known_config
from engine.pooling.batch import batch_key
from engine.pooling.config import Matryoshka, Pooling
from engine.pooling.programs import PoolingModel, pooling_program
from engine.pooling.resolve import resolve_pooling
from tests.test_aot import CHIPS, compile_for

MINILM = EncoderConfig(
    family="bert", vocab_size=30_522, hidden_size=384, intermediate_size=1536, num_heads=12, num_layers=6,
    num_positions=512, num_types=2,
)  # fmt: skip
LLAMA = known_config("llama-3.1-8b")
DECODER: ModelConfig = replace(LLAMA, layers=LLAMA.layers[:2], tie_embeddings=True)


def cases() -> list:
    """(model, chip, quantization, length, tokens); the short run has one of each chip."""
    found = []
    for chip in ("v6e:2x2", "tpu7x:2x2x1", "h200:1"):
        for quantization in (None, "int8"):
            for length, tokens in ((16, 64), (512, 4096)):
                marks = [] if (quantization, length) == (None, 16) and chip != "tpu7x:2x2x1" else [pytest.mark.slow]
                name = f"minilm-{length}-{quantization or 'bf16'}-{chip}"
                found.append(pytest.param(MINILM, chip, quantization, length, tokens, marks=marks, id=name))
            name = f"llama8b-2-8192-{quantization or 'bf16'}-{chip}"
            found.append(pytest.param(DECODER, chip, quantization, 8192, 8192, marks=[pytest.mark.slow], id=name))
    return found


@pytest.mark.aot
@pytest.mark.parametrize(("model", "chip", "quantization", "length", "tokens"), cases())
def test_a_pooling_step_compiles(
    model: PoolingModel, chip: str, quantization: str | None, length: int, tokens: int
) -> None:
    """And attention's scores, chunk by chunk, leave most of the chip's memory alone."""
    options = EngineOptions(max_model_len=length, quantization=quantization or "auto")  # type: ignore[arg-type]
    config = resolve_pooling(options, model, Pooling(), "bfloat16", CHIPS[chip], Matryoshka())
    program = pooling_program(model, config, batch_key(config, length, tokens))
    memory = compile_for(chip, program)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.inputs[0]))
    assert memory.arguments < 1.1 * weights + (1 << 20)
    assert memory.temporary < CHIPS[chip].memory_bytes / 8
