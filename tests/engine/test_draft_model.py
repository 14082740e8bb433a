"""Tokens proposed by a second model: the output is decoding's own, and a model drafts for itself without an error.

That proposals by the model's own weights are all accepted is the test of the draft model's cache: by the output alone
it could not be seen to be wrong.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from engine import LLM
from engine.config import EngineOptions
from engine.draft_model import BEHIND_TOKENS, PREFIX
from engine.errors import InvalidParam
from engine.estimate.chips import topology_of
from engine.estimate.memory import holding
from engine.explain import planned_config
from engine.load import check_same_tokens, closed_set
from engine.loop import Engine
from engine.model.known import known_config
from engine.programs import compute_of, page_bytes, param_shapes, slots_of
from engine.request import Request, SamplingParams
from engine.resolve import DeviceFacts, ModelFiles, resolve
from engine.runner import Runner
from engine.speculation import LAGGING_PROBE_EVERY, TRIALS, Speculation
from tests.engine.test_equality import run_schedule
from tests.engine.world import DELTA, LATENT, MODEL, Client, Told, World, check_choice, run, world
from tests.model import models
from tests.oracle import naive_greedy
from tests.text.small import byte_level, byte_level_json, write_hf_folder

CPU = DeviceFacts("cpu", 1 << 34, False)


@dataclass
class Accepted:
    """How many of the tokens that rows of verifying steps could draw they drew."""

    drawn: int = 0
    possible: int = 0

    def watch(self, engine: Engine, ways: Iterable[int]) -> None:
        scheduler = engine.scheduler
        commit = scheduler.commit

        def spy(plan: Any, result: Any) -> Any:
            if plan.drafts:
                self.drawn += int(result.decode.num_drawn.sum())
                self.possible += sum(plan.decode_rows.counts)
            return commit(plan, result)

        scheduler.speculation = Told(ways)  # type: ignore[misc]
        scheduler.commit = spy  # type: ignore[method-assign]


def poison(engine: Engine) -> None:
    """NaN in every page that nobody has written."""
    assert isinstance(engine.runner, Runner)
    engine.runner._kv = [jnp.full_like(kept, jnp.nan) for kept in engine.runner._kv]


def greedy(name: str, prompt: Iterable[int], max_tokens: int, **params: Any) -> Client:
    asked = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)
    return Client.of(Request(request_id=name, prompt_token_ids=tuple(prompt), params=asked))


def serve(w: World, engine: Engine, clients: list[Client]) -> None:
    for client in clients:
        engine.submit(client.request, client)
    run(engine)
    for client in clients:
        check_choice(w, client.request, 0, client.tokens[0], client.finished[0])


PROMPTS = [[(13 * i + n) % 97 for i in range(n)] for n in (5, 40, 70)]


TWINS = ["twin", "states-twin", pytest.param("delta-twin", marks=pytest.mark.slow)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", TWINS)
def test_a_model_that_drafts_for_itself_is_always_right(kind: str, overlap: bool) -> None:
    """From the prompts on, and again after steps that drafted nothing, more and fewer than one catching up holds."""
    w = world(kind)
    engine, seen = w.engine(overlap=overlap, enable_prefix_caching=False), Accepted()
    poison(engine)
    ways = [*[3] * 3, *[0] * 13, *[3] * 3, 0, *[3] * 99]
    assert 13 * w.config.decode_steps > 2 * BEHIND_TOKENS
    seen.watch(engine, ways)
    serve(w, engine, [greedy(str(len(p)), p, 90) for p in PROMPTS])
    assert seen.drawn == seen.possible > 100


@pytest.mark.parametrize("kind", TWINS)
def test_it_is_right_after_preemption_and_behind_shared_pages(kind: str) -> None:
    w = world(kind)
    engine, seen = w.engine(overlap=True, enable_prefix_caching=False, num_pages=48), Accepted()
    poison(engine)
    seen.watch(engine, itertools.repeat(3))
    before = w.counters.num_preemptions, w.counters.prefix_hits_tokens
    serve(w, engine, [greedy(str(len(p)), p, 80) for p in PROMPTS])
    assert w.counters.num_preemptions > before[0]
    engine = w.engine(overlap=True)
    poison(engine)
    seen.watch(engine, itertools.repeat(3))
    for i in range(2):
        serve(w, engine, [greedy(f"{i}-{j}", [*PROMPTS[2], i, j], 30) for j in range(2)])
    assert w.counters.prefix_hits_tokens > before[1]
    assert seen.drawn == seen.possible > 100


@pytest.mark.parametrize("ways", [(3,), (0, 3)], ids=["verifying", "taking turns"])
def test_the_next_turn_finds_a_draft_models_states_behind_the_answer(ways: tuple[int, ...]) -> None:
    """Beside the copy that the model's layers left lies one of the draft model's: it misses the last few tokens."""
    w = world("states-twin")
    engine, seen = w.engine(overlap=True), Accepted()
    poison(engine)
    seen.watch(engine, itertools.cycle(ways))
    prompt, before = [3, 4, 5, 6, 3, 4, 5], w.counters.prefix_hits_tokens
    for turn in range(4):
        client = greedy(str(turn), prompt, 30)
        serve(w, engine, [client])
        prompt = [*prompt, *client.tokens[0], 3]
    assert w.counters.prefix_hits_tokens - before > 3 * 30, "each turn starts behind the answer"
    assert seen.drawn > 0.8 * seen.possible


def test_what_the_draft_model_never_saw_costs_acceptance_and_nothing_else() -> None:
    """The slots say that it knows everything: it does not catch up."""
    w = world("twin")
    engine, seen = w.engine(overlap=False, enable_prefix_caching=False), Accepted()
    assert isinstance(engine.runner, Runner)
    runner, ways = engine.runner, [0] * 12 + [3] * 99
    launch, structure = runner.launch, jax.tree.structure(slots_of(runner.model, runner.config))

    def lying(plan: Any) -> Any:
        slots = jax.tree.unflatten(structure, list(runner._slots))
        runner._slots = jax.tree.leaves(replace(slots, drafted=slots.drafted.at[:].set(1000)))
        return launch(plan)

    runner.launch = lying  # type: ignore[method-assign]
    seen.watch(engine, ways)
    try:
        serve(w, engine, [greedy(str(len(p)), p, 90) for p in PROMPTS])
    finally:
        del runner.launch  # type: ignore[method-assign]
    assert 0 < seen.drawn < seen.possible


@pytest.mark.parametrize(
    "kind", ["draft", "states-twin", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("twin", "other"))]
)
@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_equal_naive_forward(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The equality net, of models that agree and that do not; which steps draft is random."""
    w = world(kind)
    before = w.counters.draft_tokens, w.counters.accepted_draft_tokens
    for seed in range(700 + block * 5, 705 + block * 5):
        rng = random.Random(seed)
        monkeypatch.setattr(Speculation, "drafts", lambda self, num_seqs, rng=rng: rng.choice((0, self.draft_tokens)))
        run_schedule(w, seed, overlap=seed % 2 == 0)
    proposed = w.counters.draft_tokens - before[0]
    accepted = w.counters.accepted_draft_tokens - before[1]
    low, high = (0.1, 1) if kind.endswith("twin") else (0, 0.1)
    assert low <= accepted / proposed <= high


def files(**changes: Any) -> ModelFiles:
    return ModelFiles(replace(MODEL, **changes), "float32")


@pytest.mark.parametrize(
    ("options", "draft", "message"),
    [
        ({"draft_model": "some"}, None, "draft_model: is for speculation draft"),
        ({"draft_model": "some", "speculation": "ngram"}, None, "draft_model: is for speculation draft"),
        ({"speculation": "draft"}, None, "speculation: draft needs draft_model"),
        ({}, files(vocab_size=96), "draft_model: has a vocabulary of 96 tokens, the model one of 97"),
        ({}, files(max_position=256), "draft_model: has 256 positions; max_model_len 512 exceeds them"),
        ({}, ModelFiles(DELTA, "float32"), "draft_model: has recurrent layers and the model none"),
        (
            {"sharding": "tp"},
            files(num_q_heads=3, num_kv_heads=3, intermediate_size=512),
            "draft_model: sharding: .* 3 does not divide",
        ),
        ({"sharding": "pp"}, files(), "speculation: draft is not there where sharding cuts layers into stages"),
    ],
)
def test_what_is_refused(options: dict[str, Any], draft: ModelFiles | None, message: str) -> None:
    given: dict[str, Any] = {"speculation": "draft", "draft_model": "some"} if draft else {}
    model = replace(MODEL, layers=MODEL.layers[:1] * 2, num_kv_heads=4, intermediate_size=512)
    with pytest.raises(InvalidParam, match=message):
        resolve(EngineOptions(**given | options), model, "float32", replace(CPU, count=4), draft=draft)


def test_the_two_models_share_the_pages_and_nothing_else() -> None:
    """What a page holds of each, parameters by their names, and each in its own dtype."""
    options = EngineOptions(speculation="draft", draft_model="some", kv_cache_dtype="int8", dtype="auto")
    model, device = replace(MODEL, head_dim=32), replace(CPU, fast_bfloat16=True)
    config = resolve(options, model, "bfloat16", device, draft=ModelFiles(LATENT, "float32"))
    assert config.draft is not None and (config.dtype, config.draft.dtype) == ("bfloat16", "float32")
    own = config.of_draft(config.draft)
    alone = replace(config, draft=None)
    assert page_bytes(model, config) == page_bytes(model, alone) + page_bytes(LATENT, own)
    assert param_shapes(model, config) == param_shapes(model, alone) | {
        PREFIX + name: shape for name, shape in param_shapes(LATENT, own).items()
    }
    assert compute_of(model, config).draft == compute_of(LATENT, own)
    assert "draft test of 2 layers in float32" in config.summary()


def test_a_plan_has_room_for_both() -> None:
    """Qwen3 0.6B drafts for 32B on four devices: 28 layers of two KV heads each, beside 64."""
    topology, model = topology_of("v6e:2x2"), known_config("qwen3-32b", 4096)
    options = EngineOptions(model="qwen3-32b", max_model_len=4096, sharding="tp")
    drafted = replace(options, speculation="draft", draft_model="qwen3-0.6b")
    plain, both = (holding(o, model, planned_config(o, model, topology.device), topology) for o in (options, drafted))
    assert (plain.page, both.page) == (32 * 64 * 2 * 2 * 128 * 2, 32 * (64 + 28) * 2 * 2 * 128 * 2)
    assert 0.29e9 < both.weights - plain.weights < 0.31e9, "a quarter of 0.6 G parameters of two bytes"
    assert both.tokens < plain.tokens


def test_bundles_and_stored_programs_are_for_one_draft_model() -> None:
    path = models.FOLDER / "llama"
    some: dict[str, Any] = {"model": str(path), "dtype": "float32", "max_model_len": 128, "compile_cache": False}
    plain, _, _ = closed_set(EngineOptions(**some), path)
    found = {}
    for name in ("llama", "qwen3"):
        draft: dict[str, Any] = {"speculation": "draft", "draft_model": str(models.FOLDER / name)}
        found[name], programs, _ = closed_set(EngineOptions(**some | draft), path)
        assert {"verify_2", "prefill_32_0"} <= {program.name for program in programs}
    (why,) = found["qwen3"].refusals(found["llama"])
    assert why.startswith("config.draft: Draft(model=ModelConfig(family='qwen3'")
    assert any(why.startswith("config.draft: ") for why in found["llama"].refusals(plain))


def test_tokens_that_mean_other_text_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "same")
    check_same_tokens(tokenizer, tmp_path / "same")
    check_same_tokens(tokenizer, tmp_path)  # has none
    text = byte_level_json().replace("<|im_start|>", "<|begin|>")
    check_same_tokens(tokenizer, write_hf_folder(tmp_path / "special", text))
    swapped = re.sub(r'"a":(\d+),"b":(\d+)', r'"b":\1,"a":\2', text)
    with pytest.raises(InvalidParam, match=r"draft_model: token .* is b'b' there, and b'a' in the model"):
        check_same_tokens(tokenizer, write_hf_folder(tmp_path / "other", swapped))


@pytest.mark.slow
def test_it_is_loaded_from_a_folder(tmp_path: Path) -> None:
    """Another family's drafts, from options to tokens; the second engine loads what the first one compiled."""
    some: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 2,
            "max_num_batched_tokens": 32, "cache_dir": str(tmp_path)}  # fmt: skip
    prompt = [(11 * i + 3) % 250 + 3 for i in range(20)]
    wanted = naive_greedy(models.checkpoint("llama").config, models.params("llama"), prompt, 24)
    for name in ("qwen3", "llama"):
        draft: dict[str, Any] = {"speculation": "draft", "draft_model": str(models.FOLDER / name)}
        with LLM(str(models.FOLDER / "llama"), **some | draft) as llm:
            (result,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
            stats = llm.engine.stats()
            with pytest.raises(InvalidParam, match="sharding: cannot change while a draft model proposes"):
                llm.engine.reshard("single")
        assert result.outputs[0].token_ids == wanted and stats.compiles_after_ready == 0
        assert (stats.accepted_draft_tokens > stats.draft_tokens / 2) == (name == "llama")


def test_steps_that_catch_up_are_not_compared() -> None:
    """Both ways are tried, the draft model's first; a probe of it is two steps, of which the second counts."""
    speculation, ways = Speculation(3, lags=True), []
    for _ in range(2 * TRIALS + 2 * LAGGING_PROBE_EVERY):
        ways.append(speculation.drafts(2))
        caught_up = len(ways) < 2 or ways[-2] > 0
        seconds = (0.02 if caught_up else 9.0) if ways[-1] else 0.01
        speculation.observe(2, ways[-1], num_tokens=3 if ways[-1] else 2, seconds=seconds)
    assert ways[: 2 * TRIALS] == [3] * TRIALS + [0] * TRIALS
    assert ways[2 * TRIALS :].count(3) == 4 and ways[2 * TRIALS + LAGGING_PROBE_EVERY - 2 :][:2] == [3, 3]
    pace = speculation._pace(2, drafted=True)
    assert pace.steps == TRIALS + 2 and pace.tokens_per_s == pytest.approx(150)
