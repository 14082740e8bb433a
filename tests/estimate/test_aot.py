"""`octavo plan` through the compilers of chips that are not here."""

from __future__ import annotations

import pytest

from engine.config import EngineOptions
from engine.estimate.chips import topology_of
from engine.estimate.compiled import How
from engine.estimate.layouts import Question, compiled, judged
from engine.model.known import known_config

OPTIONS = EngineOptions(max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64, sharding="tp")


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x2", "v5p:2x1x1", "v6e:1x2", "tpu7x:1x1x1", "h100:2", "h200:2", "b200:2"])
def test_layouts_compile(topology: str) -> None:
    """The compiler's arguments are what is predicted, to what tiles round up; and the counted sums are its own."""
    layout = judged(OPTIONS, known_config("qwen3-0.6b"), topology_of(topology), Question())
    found = compiled(layout, How())
    assert found.problem is None and found.fits
    decode = found.compiled[0]
    predicted = layout.memory.held + layout.memory.pool
    assert decode.memory.arguments == pytest.approx(predicted, rel=0.01)
    assert {call.kind for call in decode.collectives.always} == {call.kind for call in layout.counted}
    assert sum(call.count for call in decode.collectives.always) == sum(call.count for call in layout.counted)


def test_a_chip_without_a_compiler_says_so() -> None:
    """libtpu sees two devices a chip where a v4 serves as one."""
    layout = judged(OPTIONS, known_config("qwen3-0.6b"), topology_of("v4:1x2x1"), Question())
    assert layout.fits and layout.decodes
    assert compiled(layout, How()).problem
