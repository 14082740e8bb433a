"""The offline API on a tiny random checkpoint, from folder to results; logits against the naive forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine import LLM, RequestOutput, SamplingParams
from engine.errors import ContextOverflow, EngineStopped, InvalidParam, OctavoError, QueueFull
from engine.model.params import param_specs
from engine.model.quantization import pack
from pallas_kernels.kv_layout import kv_layout
from tests.model import models
from tests.oracle import naive_greedy, naive_logits

VOCAB = 256
PROMPTS = [[(11 * i + 3 * n) % 250 + 3 for i in range(n)] for n in (1, 5, 40, 23)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    seen: list[tuple[str, int, int]] = []
    with LLM(
        str(models.FOLDER / "llama"),
        report=lambda phase, done, of: seen.append((phase, done, of)),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        page_size=8,
        decode_steps=2,
        max_queued_requests=6,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    ) as made:
        phases = list(dict.fromkeys(phase for phase, _, _ in seen))
        assert phases == ["find model", "load weights", "compile", "warm up"]
        assert all(0 <= done <= of for _, done, of in seen)
        yield made


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | options)


def tokens(results: list[RequestOutput]) -> list[list[list[int]]]:
    return [[out.token_ids for out in result.outputs] for result in results]


def naive(token_ids: list[int]) -> np.ndarray:
    return naive_logits(models.checkpoint("llama").config, models.params("llama"), token_ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def test_greedy_tokens_are_those_of_the_naive_forward(llm: LLM) -> None:
    results = llm.generate(PROMPTS, params_of(temperature=0.0))
    model, params = models.checkpoint("llama").config, models.params("llama")
    for prompt, result in zip(PROMPTS, results, strict=True):
        (out,) = result.outputs
        assert result.finished and result.prompt_token_ids == prompt and result.prompt is None
        assert out.token_ids == naive_greedy(model, params, prompt, 12)
        assert (out.text, out.finish_reason, out.stop_reason, out.index) == ("", "length", None, 0)
        assert out.logprobs is None and out.cumulative_logprob is None and result.prompt_logprobs is None


def test_prompts_in_every_form(llm: LLM) -> None:
    greedy = params_of(temperature=0.0)
    expected = tokens(llm.generate([PROMPTS[1]], greedy))
    one = PROMPTS[1]
    forms: list[Any] = [one, tuple(one), np.asarray(one), {"prompt_token_ids": one}, [{"prompt_token_ids": one}]]
    for form in forms:
        assert tokens(llm.generate(form, greedy)) == expected
    assert llm.generate([], greedy) == []
    each = llm.generate(
        [one, {"prompt_token_ids": one, "cache_salt": "x"}], [greedy, params_of(temperature=0.0, max_tokens=3)]
    )
    assert tokens(each) == [expected[0], [expected[0][0][:3]]]


def test_n_choices(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[2], params_of(n=3, seed=5))
    drawn = [tuple(out.token_ids) for out in result.outputs]
    assert [out.index for out in result.outputs] == [0, 1, 2] and len(set(drawn)) == 3
    (single,) = llm.generate(PROMPTS[2], params_of(seed=5))
    assert tuple(single.outputs[0].token_ids) == drawn[0]


def test_seeds_repeat_in_any_batch(llm: LLM) -> None:
    """Alone, among others, in another order, with a warm prefix cache: the same tokens."""
    hot = [params_of(seed=i, temperature=1.5, top_p=0.9) for i in range(4)]
    together = tokens(llm.generate(PROMPTS, hot))
    assert [tokens(llm.generate([p], s))[0] for p, s in zip(PROMPTS, hot, strict=True)] == together
    assert tokens(llm.generate(PROMPTS[::-1], hot[::-1]))[::-1] == together
    assert tokens(llm.generate(PROMPTS, [params_of(seed=9 + i, temperature=1.5) for i in range(4)])) != together


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    prompts = [[i + 3, i + 4] for i in range(30)]
    results = llm.generate(prompts, params_of(temperature=0.0, max_tokens=2))
    assert [result.prompt_token_ids for result in results] == prompts and all(r.finished for r in results)
    with pytest.raises(QueueFull):
        llm.generate(prompts[0], params_of(n=7))


def test_logprobs_are_log_softmax_of_the_logits(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[3], params_of(seed=1, logprobs=4, logit_bias={7: 3.0}))
    (out,) = result.outputs
    expected = log_softmax(naive([*PROMPTS[3], *out.token_ids]))[len(PROMPTS[3]) - 1 :]
    assert out.logprobs is not None and [item.token_id for item in out.logprobs] == out.token_ids
    for item, row in zip(out.logprobs, expected, strict=False):
        np.testing.assert_allclose(item.logprob, row[item.token_id], atol=1e-4)
        np.testing.assert_allclose([t.logprob for t in item.top], np.sort(row)[::-1][:4], atol=1e-4)
        np.testing.assert_allclose([row[t.token_id] for t in item.top], [t.logprob for t in item.top], atol=1e-4)
    assert out.cumulative_logprob == pytest.approx(sum(item.logprob for item in out.logprobs))


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_are_log_softmax_of_the_logits(llm: LLM, max_tokens: int) -> None:
    """Across chunks of 32 tokens, warm or cold."""
    prompt = [(7 * i) % 250 + 3 for i in range(75)]
    for _ in range(2):
        (result,) = llm.generate(prompt, params_of(prompt_logprobs=2, max_tokens=max_tokens))
        assert len(result.outputs[0].token_ids) == max_tokens and result.outputs[0].finish_reason == "length"
        expected = log_softmax(llm.logits(prompt))
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == 75
        assert result.prompt_logprobs[0] is None
        for position, item in enumerate(result.prompt_logprobs[1:], start=1):
            assert item is not None and item.token_id == prompt[position] and len(item.top) == 2
            np.testing.assert_allclose(item.logprob, expected[position - 1, prompt[position]], atol=1e-4)
            np.testing.assert_allclose(item.top[0].logprob, expected[position - 1].max(), atol=1e-4)


def test_stop_tokens(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[1], params_of(seed=3))
    drawn = free.outputs[0].token_ids
    stop = next(t for i, t in enumerate(drawn) if i >= 2 and t not in drawn[:i])
    (result,) = llm.generate(PROMPTS[1], params_of(seed=3, stop_token_ids=[stop]))
    (out,) = result.outputs
    assert out.token_ids == drawn[: drawn.index(stop) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_the_models_own_end_token_ends_unless_ignored(llm: LLM) -> None:
    assert llm.engine.end_token_ids == (2,)
    want_end = {"logit_bias": {2: 100.0}, "temperature": 0.0}
    (ended,) = llm.generate(PROMPTS[1], params_of(**want_end, ignore_eos=False))
    assert ended.outputs[0].token_ids == [2]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    (ignored,) = llm.generate(PROMPTS[1], params_of(**want_end))
    assert ignored.outputs[0].token_ids == [2] * 12 and ignored.outputs[0].finish_reason == "length"
    (late,) = llm.generate(PROMPTS[1], params_of(**want_end, ignore_eos=False, min_tokens=4))
    assert late.outputs[0].token_ids[4:] == [2] and 2 not in late.outputs[0].token_ids[:4]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 128])
def test_logits_across_chunk_borders(llm: LLM, length: int) -> None:
    token_ids = [(13 * i) % 250 for i in range(length)]
    got = llm.logits(token_ids)
    assert got.shape == (length, VOCAB) and got.dtype == np.float32
    np.testing.assert_allclose(got, naive(token_ids), atol=1e-4)


def test_logits_leave_the_engine_as_it_was(llm: LLM) -> None:
    before = tokens(llm.generate(PROMPTS, params_of(temperature=0.0)))
    llm.logits(PROMPTS[2])
    llm.engine.call(llm.engine.scheduler.check)
    assert llm.engine.stats().kv_usage == 0.0
    assert tokens(llm.generate(PROMPTS, params_of(temperature=0.0))) == before


@pytest.mark.parametrize("bad", [[], [0] * 129, [-1], [VOCAB]])
def test_logits_refuse_bad_tokens(llm: LLM, bad: list[int]) -> None:
    with pytest.raises(InvalidParam) as error:
        llm.logits(bad)
    assert error.value.param == "token_ids"


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("text", {}, "prompt"),
        ([[]], {}, "prompt"),
        ([[VOCAB]], {}, "prompt"),
        ({"prompt_tokens": [1]}, {}, "prompt"),
        ({}, {}, "prompt"),
        ({"prompt": "text"}, {}, "prompt"),
        ([3] * 128, {"max_tokens": 1}, "prompt"),
        ([3] * 120, {"max_tokens": 9}, "max_tokens"),
        ([3], {"stop": "x"}, "stop"),
        ([3], {"bad_words": "x"}, "prompt"),
        ([3], {"stop_token_ids": [999]}, "stop_token_ids"),
    ],
)
def test_errors_name_the_field(llm: LLM, prompt: Any, params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParam) as error:
        llm.generate(prompt, params_of(**params))
    assert error.value.param == field


def test_one_bad_prompt_aborts_its_batch_and_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ContextOverflow):
        llm.generate([PROMPTS[0], PROMPTS[1], [3] * 129], params_of())
    with pytest.raises(InvalidParam, match="2 given for 1 prompts"):
        llm.generate([PROMPTS[0]], [params_of(), params_of()])
    assert llm.engine.call(lambda: list(llm.engine.scheduler.sequences())) == []


def test_a_failed_request_raises(llm: LLM) -> None:
    """The device fails once; the next call is served as if nothing had been."""
    before = tokens(llm.generate(PROMPTS, params_of(temperature=0.0)))
    launch = llm.engine.runner.launch

    def fail(plan: object) -> Any:
        llm.engine.runner.launch = launch  # type: ignore[method-assign]
        raise RuntimeError("the device failed")

    llm.engine.runner.launch = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(OctavoError, match="the engine failed this request"):
        llm.generate(PROMPTS[0], params_of())
    assert tokens(llm.generate(PROMPTS, params_of(temperature=0.0))) == before


def test_no_feature_compiles_anything(llm: LLM) -> None:
    before = llm.engine.stats().compiles
    features: list[dict[str, Any]] = [
        {"n": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.5},
        {"logit_bias": {3: 1.0}, "allowed_token_ids": (3, 4, 5)},
        {"logprobs": 20, "prompt_logprobs": 20, "max_tokens": 1},
        {"min_tokens": 3, "stop_token_ids": (3, 4)},
        {"max_tokens": 0},
    ]
    for feature in features:
        llm.generate(PROMPTS, params_of(**feature))
    llm.generate(PROMPTS[:2] * 2, [params_of(**feature) for feature in features[:4]])
    assert llm.engine.stats().compiles == before


def test_unknown_options_and_fields_are_errors() -> None:
    with pytest.raises(InvalidParam, match="did you mean max_num_seqs"):
        LLM(str(models.FOLDER / "llama"), max_num_seq=4)
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]


def small_llm(name: str, cache_dir: Path, **options: Any) -> LLM:
    return LLM(
        str(models.FOLDER / name),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        page_size=8,
        decode_steps=2,
        cache_dir=str(cache_dir),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_experts_sinks_and_latents_from_folder_to_tokens(name: str, tmp_path: Path) -> None:
    """Chunked prefill and paged decode equal what transformers computed in one piece."""
    cases = models.expected(name)[1:4]
    with small_llm(name, tmp_path) as llm:
        results = llm.generate([case.prompt for case in cases], params_of(temperature=0.0))
    assert [out[0] for out in tokens(results)] == [case.greedy[:12] for case in cases]


@pytest.mark.parametrize(("name", "quantization", "head"), [
    ("qwen3_moe", "int8", False), ("qwen3_moe", "int8", True), ("qwen2", "w8a8", True),
])  # fmt: skip
def test_packed_weights_and_a_quantized_cache_from_options_to_tokens(
    name: str, quantization: Any, head: bool, tmp_path: Path
) -> None:
    config, prompt = models.checkpoint(name).config, models.expected(name)[3].prompt
    options = {"quantization": quantization, "quantize_lm_head": head, "kv_cache_dtype": "int8"}
    with small_llm(name, tmp_path, **options) as llm:
        ((out,),) = tokens(llm.generate([prompt], params_of(temperature=0.0)))
    arrays = {name: np.asarray(array) for name, array in models.params(name).items()}
    arrays["packed_head"] = arrays["embed" if config.tie_embeddings else "lm_head"].T
    params = {
        name: jax.device_put(pack(spec, arrays[name], quantization))
        for name, spec in param_specs(config, np.dtype(np.float32), head).items()
    }
    layout = kv_layout(config.num_kv_heads, config.head_dim, "int8")
    full = prompt + out
    best = naive_logits(config, params, full, layout).argmax(-1).tolist()
    assert out == best[len(prompt) - 1 : -1]
    assert out != models.expected(name)[3].greedy[:12], "rounding shows, or nothing was packed"


def test_after_shutdown_it_refuses(llm: LLM) -> None:
    llm.shutdown()
    with pytest.raises(EngineStopped):
        llm.generate(PROMPTS[0], params_of())
    with pytest.raises(EngineStopped):
        llm.logits(PROMPTS[0])
