"""Our own count of a step, against sizes worked out by hand and against XLA's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.batch import StepKey
from engine.config import EngineConfig, EngineOptions
from engine.estimate.chips import Topology, topology_of
from engine.estimate.count import Count, Span, Step, count_step, decode_step, prefill_steps
from engine.estimate.links import Collective, merged
from engine.estimate.roofline import bound, decode_bound, prefill_bound
from engine.explain import planned_config
from engine.model.config import ModelConfig
from engine.model.known import known_config
from engine.programs import local_shapes, page_bytes, step_program

LLAMA = known_config("llama-3.1-70b")
V6E = topology_of("v6e:2x4")


def config_of(model: ModelConfig, topology: Topology, **options: Any) -> EngineConfig:
    return planned_config(EngineOptions(max_model_len=4096, **options), model, topology.device)


def test_spans_count_what_loops_count() -> None:
    for start in (0, 3, 7):
        for tokens in (1, 2, 5):
            for window in (None, 1, 4, 100):
                seen = [
                    {key for key in range(i + 1) if window is None or key > i - window}
                    for i in range(start, start + tokens)
                ]
                span = Span(tokens, start, sequences=2)
                assert span.pairs(window) == 2 * sum(map(len, seen))
                assert span.keys(window) == 2 * len(set().union(*seen))


def test_a_decode_step_of_llama_70b() -> None:
    """On eight devices: an eighth of every matrix, one KV head of eight, two sums a layer."""
    config = config_of(LLAMA, V6E, sharding="tp")
    step = decode_step(config, 64, 2048)
    assert step == Step(64, 64, (Span(1, 2047, 64),))
    found = count_step(LLAMA, config, step)
    matrices = 80 * (8192 * 80 * 128 + 8192 * 8192 + 3 * 8192 * 28672) // 8 + 128256 * 8192 // 8
    attention = 80 * 8 * 64 * 2048 * 4 * 128
    assert found.flops == (("bfloat16", 2.0 * 64 * matrices + attention),)
    norms = 161 * 8192 * 4
    assert found.weight_bytes == pytest.approx(2 * matrices + norms, rel=1e-5)  # the final norm is not in a layer
    assert found.cache_bytes == 64 * 2049 * page_bytes(LLAMA, config) // config.page_size
    assert list(merged(found.collectives)) == [
        Collective("all-reduce", ("tensor",), 64 * 8192 * 2, 161),
        Collective("all-gather", ("tensor",), 64 * 128256 * 4, 1),
    ]


def test_experts_are_read_as_far_as_somebody_chose_them() -> None:
    """One token of Qwen3 30B-A3B reads 8 of 128 experts; a thousand read all of them."""
    model = known_config("qwen3-30b-a3b")
    config = config_of(model, topology_of("v6e:1x1"))
    weights = local_shapes(model, config)
    experts = sum(w.size * 2 for name, w in weights.items() if "experts_" in name)
    rest = count_step(model, config, Step(0, 1, ())).weight_bytes
    one = count_step(model, config, Step(1, 1, (Span(1, 0),))).weight_bytes
    many = count_step(model, config, Step(1024, 1, (Span(1024, 0),))).weight_bytes
    assert one - rest == pytest.approx(experts * 8 / 128)
    assert many - rest == pytest.approx(experts)


def test_experts_over_devices_share_the_rows() -> None:
    model = known_config("qwen3-30b-a3b")
    step = Step(64, 64, (Span(1, 99, 64),))
    apart = count_step(model, config_of(model, topology_of("v6e:1x2"), sharding="ep"), step)
    cut = count_step(model, config_of(model, topology_of("v6e:1x2"), sharding="tp"), step)
    assert apart.all_flops == cut.all_flops and apart.weight_bytes == pytest.approx(cut.weight_bytes)


def test_groups_of_requests_attend_for_themselves() -> None:
    """Four groups of 32 rows, each on two devices that halve its attention; MLPs see the tokens of all."""
    config = config_of(LLAMA, V6E, sharding="dp-attention")
    assert config.num_groups == 4 and config.max_num_seqs == 64
    found = count_step(LLAMA, config, decode_step(config, 128, 2048))
    qkv_and_o = 80 * (8192 * 80 * 128 + 8192 * 8192) // 2
    attention = 80 * 32 * 32 * 2048 * 4 * 128
    mlp = 80 * 3 * 8192 * 28672 // 8
    head = 128256 * 8192 // 2
    assert found.all_flops == 2.0 * (32 * (qkv_and_o + head) + 128 * mlp) + attention
    every, own = 128 * 8192 * 2, 32 * 8192 * 2
    assert list(merged(found.collectives)) == [
        Collective("all-reduce", ("tensor",), own, 81),
        Collective("all-gather", ("tensor",), 32 * 128256 * 4, 1),
        Collective("all-gather", ("data",), every, 80),
        Collective("all-reduce", ("tensor",), every, 80),
        Collective("reduce-scatter", ("data",), every, 80),
    ]


def test_prompts_come_in_chunks() -> None:
    config = config_of(LLAMA, V6E, sharding="tp", max_num_batched_tokens=1024)
    steps = prefill_steps(config, 2100)
    assert [step.tokens for step in steps] == [1024, 1024, 64]
    assert [step.spans[0] for step in steps] == [Span(1024, 0), Span(1024, 1024), Span(52, 2048)]


# At these sizes what is elementwise hardly counts, and pages are as many as one turn of the reference's loop sees.
DENSE = replace(known_config("llama-3.1-8b"), layers=known_config("llama-3.1-8b").layers[:1], vocab_size=1024)
MIXTURE = replace(known_config("mixtral-8x7b"), layers=known_config("mixtral-8x7b").layers[:1], vocab_size=1024)
PLAIN = ("matmul=reference", "grouped_matmul=reference")  # XLA does not see into kernels
SHORT = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "page_size": 16, "kernel": PLAIN}


def xla_flops(model: ModelConfig, config: EngineConfig, key: StepKey) -> float:
    """As XLA counts the lowered program; the body of a loop once."""
    cost = step_program(model, config, key).lower().cost_analysis()
    return (cost or {})["flops"]


@pytest.mark.parametrize("key", [StepKey(0, 64), StepKey(64, 0)], ids=lambda key: key.name)
def test_flops_of_a_dense_step_are_those_that_xla_counts(key: StepKey) -> None:
    config = planned_config(EngineOptions(max_model_len=128, **SHORT), DENSE, topology_of("cpu:1").device)
    spans = (Span(1, 127, 64),) if key.rows else (Span(64, 0),)
    found = count_step(DENSE, config, Step(64, 64 if key.rows else config.max_prefill_rows, spans))
    assert found.all_flops == pytest.approx(xla_flops(DENSE, config, key), rel=0.03)


def test_flops_of_a_mixture_are_those_that_xla_counts() -> None:
    """The reference multiplies a block of rows by one expert a turn of its loop, and XLA counts one turn."""
    config = planned_config(EngineOptions(max_model_len=128, **SHORT), MIXTURE, topology_of("cpu:1").device)
    found = count_step(MIXTURE, config, Step(64, 64, (Span(1, 127, 64),)))
    experts = MIXTURE.experts
    assert experts is not None
    row = 2.0 * 3 * MIXTURE.hidden_size * experts.intermediate_size
    in_loop = 16 * row  # block_rows(128 slots, 8 experts)
    others = xla_flops(MIXTURE, config, StepKey(0, 64)) - in_loop
    assert found.all_flops - 64 * experts.per_token * row == pytest.approx(others, rel=0.15)


def test_what_binds() -> None:
    """A lone decode row waits for the weights; a long prompt for the products, or for sums over two links."""
    config = config_of(LLAMA, V6E, sharding="tp")
    decode, prefill = decode_bound(LLAMA, config, V6E, 1, 1024), prefill_bound(LLAMA, config, V6E, 4096)
    assert decode.bound.binds == "memory" and prefill.bound.binds == "links"
    h200 = topology_of("h200:4")
    assert prefill_bound(LLAMA, config_of(LLAMA, h200, sharding="tp"), h200, 4096).bound.binds == "compute"
    read = 70.55e9 * 2 / 8 / 1638e9
    assert decode.tpot_s == pytest.approx(read, rel=0.05)
    assert prefill.ttft_s > 2 * 70e9 * 4096 / 8 / 918e12
    assert decode.tokens_per_s == 1 / decode.tpot_s
    assert decode.cost(V6E, 2.7) == pytest.approx(2.7 * 8 / 3600 * decode.tpot_s * 1e6)


def test_links_come_on_top() -> None:
    config = config_of(LLAMA, V6E, sharding="tp")
    found = count_step(LLAMA, config, decode_step(config, 256, 1024))
    without = bound(replace(found, collectives=()), V6E, config)
    with_links = bound(found, V6E, config)
    assert with_links.seconds == pytest.approx(without.seconds + with_links.links_s) and without.links_s == 0


def test_packed_weights_are_fewer_bytes_and_the_same_products() -> None:
    step = Step(64, 64, (Span(1, 1023, 64),))
    plain = count_step(LLAMA, config_of(LLAMA, V6E, sharding="tp"), step)
    packed = count_step(LLAMA, config_of(LLAMA, V6E, sharding="tp", quantization="int8"), step)
    assert packed.flops == plain.flops
    assert 0.5 < packed.weight_bytes / plain.weight_bytes < 0.52


def test_a_count_without_a_matrix_is_seen_to_be_wrong() -> None:
    """What the comparison with XLA is worth: without `down` it must not hold."""
    config = planned_config(EngineOptions(max_model_len=128, **SHORT), DENSE, topology_of("cpu:1").device)
    found = count_step(DENSE, config, Step(64, 64, (Span(1, 127, 64),)))
    missing = Count((("float32", -2.0 * 64 * DENSE.hidden_size * DENSE.intermediate_size),))
    assert (found + missing).all_flops != pytest.approx(xla_flops(DENSE, config, StepKey(0, 64)), rel=0.03)
