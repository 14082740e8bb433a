"""The device sampler: each parameter by hand, all of them against `world.oracle_scores`, chance by chi-square.

Rows go through `build_configure` and `configure`, so the way from request to device is under test too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from scipy.stats import chisquare

from engine import sampler, steps
from engine.batch import USES_LOGPROBS, build_configure, configure_layout, sampling_row
from engine.model.place import ALONE
from engine.request import MAX_LOGPROBS, MAX_STOP_IDS, Request, SamplingParams
from engine.sampler import Drawn
from engine.sequence import Sequence
from engine.slots import Sampling, Slots, slots_shape
from tests.engine.fakes import config
from tests.engine.world import oracle_scores

ROWS = 8
CONFIG = config(max_num_seqs=ROWS, max_model_len=48)
jit_draw = jax.jit(partial(sampler.draw, place=ALONE))
jit_process = jax.jit(sampler.process)


@dataclass(frozen=True)
class Row:
    """A sequence about to draw: prompt, output so far, and the model's logits."""

    logits: Any
    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()

    @property
    def request(self) -> Request:
        return Request(
            request_id="r",
            prompt_token_ids=self.prompt,
            params=self.params,
            end_token_ids=self.end,
            banned_token_ids=self.banned,
        )

    @property
    def seed(self) -> int:
        return (self.params.seed or 0) & (1 << 64) - 1

    def sequence(self, slot: int) -> Sequence:
        total = len(self.prompt) + (self.params.max_tokens or 0)
        seq = Sequence(self.request, 0, 0, self.seed, total, None, [*self.prompt, *self.output])
        seq.slot = slot
        return seq


def row(logits: Any, *, prompt: Any = (0,), output: Any = (), end: Any = (), banned: Any = (), **params: Any) -> Row:
    params = {"max_tokens": 40} | params
    return Row(logits, SamplingParams(**params), tuple(prompt), tuple(output), end, banned)


@partial(jax.jit, static_argnums=0)
def _configure(vocab: int, slots: Slots, vector: Array) -> Slots:
    return steps.configure(configure_layout(CONFIG, vocab), slots, vector)


def device_state(rows: list[Row], vocab: int) -> tuple[Array, Slots, Array, Sampling, Array]:
    """The arguments of `draw`: a slot a row, in reverse order; stale rows hold rubbish."""
    shapes = slots_shape(CONFIG.max_num_seqs, CONFIG.max_pages_per_seq, vocab)
    slots: Slots = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    layout = configure_layout(CONFIG, vocab)
    seqs = [r.sequence(CONFIG.max_num_seqs - 1 - i) for i, r in enumerate(rows)]
    for seq in seqs:
        slots = _configure(vocab, slots, jnp.asarray(build_configure(CONFIG, layout, seq, vocab)))
    values = [sampling_row(seq) for seq in seqs]
    dtypes = {name: np.asarray(leaf).dtype for name, leaf in vars(slots.sampling).items()}
    fields = {name: jnp.asarray(np.asarray([v[name] for v in values], dtypes[name])) for name in values[0]}
    stops = [[*sorted(s.stop_ids), *[-1] * (MAX_STOP_IDS - len(s.stop_ids))] for s in seqs]
    sampling = Sampling(**fields, stop_ids=jnp.asarray(stops, jnp.int32))
    slot = jnp.asarray([seq.slot for seq in seqs], jnp.int32)
    length = jnp.asarray([len(seq.token_ids) for seq in seqs], jnp.int32)
    return jnp.asarray([r.logits for r in rows], jnp.float32), slots, slot, sampling, length


def draw(rows: list[Row], vocab: int | None = None) -> Drawn:
    """Rows drawn together, filled up to ROWS with plain greedy ones."""
    vocab = vocab or len(rows[0].logits)
    filled = [*rows, *[row(np.zeros(vocab), temperature=0.0)] * (ROWS - len(rows))]
    drawn = jit_draw(*device_state(filled, vocab))
    return jax.tree.map(lambda a: np.asarray(a)[: len(rows)], drawn)


def processed(one: Row) -> np.ndarray:
    filled = [one, *[row(np.zeros(len(one.logits)), temperature=0.0)] * (ROWS - 1)]
    return np.asarray(jit_process(*device_state(filled, len(one.logits))))[0]


def kept(logits: Any, **params: Any) -> list[int]:
    """Tokens that the filters leave."""
    filled = [row(logits, **params), *[row(np.zeros(len(logits)), temperature=0.0)] * (ROWS - 1)]
    values, _, _, sampling, _ = device_state(filled, len(logits))
    return np.flatnonzero(np.isfinite(np.asarray(jax.jit(sampler.filter_logits)(values, sampling))[0])).tolist()


def probabilities(logits: Any) -> np.ndarray:
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


# -- what changes the logits ------------------------------------------------------------------

FIVE = [2.0, 1.0, 0.0, -1.0, -2.0]
NO = -np.inf


def test_nothing_asked_nothing_changed() -> None:
    assert processed(row(FIVE)).tolist() == FIVE


def test_logit_bias_is_added() -> None:
    assert processed(row(FIVE, logit_bias={0: -1.5, 4: 100.0})).tolist() == [0.5, 1.0, 0.0, -1.0, 98.0]


def test_allowed_and_banned_tokens() -> None:
    assert processed(row(FIVE, allowed_token_ids=(1, 3, 4))).tolist() == [NO, 1.0, NO, -1.0, -2.0]
    assert processed(row(FIVE, banned=(0, 3))).tolist() == [NO, 1.0, 0.0, NO, -2.0]
    assert processed(row(FIVE, allowed_token_ids=(1, 3), banned=(1,))).tolist() == [NO, NO, NO, -1.0, NO]


def test_a_bias_cannot_free_a_forbidden_token() -> None:
    assert processed(row(FIVE, banned=(0,), logit_bias={0: 100.0}))[0] == NO


@pytest.mark.parametrize(("num_output", "forbidden"), [(0, True), (1, True), (2, False)])
def test_stop_tokens_are_forbidden_until_min_tokens(num_output: int, forbidden: bool) -> None:
    one = row(FIVE, prompt=(1, 2), output=(3,) * num_output, min_tokens=2, stop_token_ids=(0,), end=(4,))
    assert (processed(one) == NO).tolist() == [forbidden, False, False, False, forbidden]


def test_repetition_penalty_is_of_prompt_and_output_and_by_sign() -> None:
    one = row(FIVE, prompt=(0, 3), output=(4,), repetition_penalty=2.0)
    assert processed(one).tolist() == [1.0, 1.0, 0.0, -2.0, -4.0]


def test_frequency_and_presence_are_of_the_output_alone() -> None:
    one = row(FIVE, prompt=(0, 0), output=(1, 1, 1, 2), frequency_penalty=0.5, presence_penalty=0.25)
    assert processed(one).tolist() == [2.0, 1.0 - 1.5 - 0.25, -0.5 - 0.25, -1.0, -2.0]


def test_order_is_bias_then_repetition_then_frequency_and_presence() -> None:
    one = row(
        FIVE,
        output=(0, 0),
        prompt=(4,),
        logit_bias={0: 2.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=-1.0,
    )
    assert processed(one)[0] == (2.0 + 2.0) / 2.0 - 0.5 * 2 + 1.0


def test_drawing_counts_and_saturates() -> None:
    _, slots, slot, _, _ = device_state([row(FIVE)] * ROWS, 5)
    slots = replace(slots, token_counts=slots.token_counts.at[slot[1], 2].set(32767))
    token, counted = jnp.full(ROWS, 2, jnp.int32), jnp.asarray([True, True, False] + [True] * 5)
    counts = np.asarray(jax.jit(sampler.count_output)(slots, slot, token, counted))
    assert counts[np.asarray(slot)][:3].tolist() == [[1, 0, 2, 0, 0], [1, 0, 32767, 0, 0], [1, 0, 0, 0, 0]]


# -- what is left to chance -------------------------------------------------------------------


def test_top_k() -> None:
    logits = [0.0, 3.0, 1.0, 2.0, -1.0]
    assert [kept(logits, top_k=k) for k in (1, 2, 4)] == [[1], [1, 3], [0, 1, 2, 3]]
    assert kept(logits, top_k=0) == kept(logits, top_k=-1) == kept(logits, top_k=5) == kept(logits, top_k=99)


def test_ties_at_a_threshold_stay_together() -> None:
    assert kept([1.0, 1.0, 0.0, 2.0], top_k=2) == [0, 1, 3]
    assert kept([1.0, 1.0, 0.0, 2.0], top_p=0.6) == [0, 1, 3]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    cases = {1e-9: [1], 0.39: [1], 0.41: [1, 3], 0.69: [1, 3], 0.71: [1, 2, 3], 0.99: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    assert {p: kept(logits, top_p=p) for p in cases} == cases


def test_min_p_is_relative_to_the_best() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert [kept(logits, min_p=p) for p in (0.0, 0.24, 0.26, 0.51, 0.76, 1.0)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3],
        [1, 3],
        [1],
        [1],
    ]


def test_top_p_is_of_what_top_k_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, top_k=2, top_p=0.6) == [0, 1], "0.4 of the 0.7 that are left is 0.57"
    assert kept(logits, top_p=0.39) == [0]


def test_a_forbidden_token_is_never_drawn() -> None:
    rows = [row([0.0, NO, NO, 0.0], temperature=50.0, seed=s) for s in range(ROWS)]
    assert set(draw(rows).token.tolist()) <= {0, 3}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_greedy_by_any_name(params: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        logits = rng.normal(size=(ROWS, 33)).astype(np.float32)
        drawn = draw([row(x, **{"temperature": 3.0, "seed": i} | params) for i, x in enumerate(logits)])
        assert drawn.token.tolist() == logits.argmax(axis=1).tolist()


# -- everything at once -----------------------------------------------------------------------


def random_row(rng: random.Random, vocab: int) -> Row:
    some = lambda count: tuple(rng.randrange(vocab) for _ in range(count))  # noqa: E731
    options: dict[str, Any] = {"temperature": rng.choice([0.0, 0.2, 1.0, 2.5]), "seed": rng.randrange(-(2**63), 2**64)}
    maybe = {
        "top_k": rng.choice([1, 2, 5, vocab, 1000]),
        "top_p": rng.choice([1e-6, 0.3, 0.9, 0.999]),
        "min_p": rng.choice([0.01, 0.3, 1.0]),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.5, 2),
        "logit_bias": {t: rng.uniform(-100, 100) for t in some(5)},
        "allowed_token_ids": some(6),
        "min_tokens": rng.randrange(6),
        "logprobs": 3,
    }
    options |= {name: value for name, value in maybe.items() if rng.random() < 0.35}
    stops = some(2) if vocab > 8 else ()
    return row(
        np.asarray([rng.gauss(0, 2) for _ in range(vocab)], np.float32),
        prompt=some(rng.randrange(1, 6)),
        output=some(rng.randrange(8)),
        end=stops[:1],
        stop_token_ids=stops[1:],
        banned=some(1) if vocab > 8 and "allowed_token_ids" not in options else (),
        **options,
    )


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_equals_the_oracle(vocab: int) -> None:
    """The drawn token maximises the oracle's score, which sorts where the device searches."""
    rng = random.Random(vocab)
    checked = 0
    for _ in range(12 if vocab > 1 else 1):
        rows = [random_row(rng, vocab) for _ in range(ROWS)]
        for one, token in zip(rows, draw(rows).token.tolist(), strict=True):
            logits = np.asarray(one.logits, np.float64)
            scores = oracle_scores(logits, one.request, one.seed, [*one.prompt, *one.output])
            if np.isfinite(scores).any():  # else everything was forbidden
                assert scores[token] >= scores.max() - 1e-4, one
                checked += 1
    assert checked > 60 or vocab == 1


@pytest.mark.parametrize("vocab", [1, 33])
def test_logprobs_are_of_the_raw_logits(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(ROWS, vocab)).astype(np.float32)
    rows = [row(x, logprobs=5, logit_bias={0: 50.0}, temperature=0.0) for x in logits]
    drawn = draw(rows)
    assert drawn.token.tolist() == [0] * ROWS
    for i, x in enumerate(logits):
        expected = np.log(probabilities(x))
        order = np.argsort(-x, kind="stable")[:MAX_LOGPROBS]
        np.testing.assert_allclose(drawn.logprob[i], expected[0], atol=1e-5)
        assert drawn.top_ids[i][: len(order)].tolist() == order.tolist()
        np.testing.assert_allclose(drawn.top_logprobs[i][: len(order)], expected[order], atol=1e-5)
        assert (drawn.top_logprobs[i][len(order) :] == NO).all()


# -- chance -----------------------------------------------------------------------------------


def empirical(one: Row, by: str, wanted: int = 20_000) -> np.ndarray:
    """Counts of tokens over many lengths of one seed, or many seeds of one length."""
    logits, slots, slot, sampling, length = device_state([one] * ROWS, len(one.logits))
    index = jnp.arange(wanted, dtype=jnp.int32)

    @jax.jit
    @jax.vmap
    def many(i: Array) -> Array:
        seeded, at = sampling, length
        if by == "length":
            at = length + i
        else:
            seeded = replace(sampling, seed_low=jnp.full_like(sampling.seed_low, i))
        cut = jax.tree.map(lambda a: a[:1], (logits, slot, seeded, at))
        return sampler.draw(cut[0], slots, cut[1], cut[2], cut[3], ALONE).token[0]

    return np.bincount(np.asarray(many(index)), minlength=len(one.logits))


@pytest.mark.parametrize("by", ["length", "seed"])
def test_tokens_come_as_often_as_their_probability(by: str) -> None:
    logits = np.asarray([1.0, 0.5, 0.0, -0.5, -1.0, 0.2, -3.0, 0.7])
    params = {"temperature": 0.7, "top_p": 0.95, "seed": 1234567890123456789}
    counts = empirical(row(logits, **params), by)
    p = probabilities(logits / 0.7)
    order = np.argsort(-p)
    p[order[np.cumsum(p[order]) - p[order] >= 0.95]] = 0.0
    p /= p.sum()
    assert not counts[p == 0].any()
    assert chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 1e-3
    wrong = np.where(p > 0, p ** (0.9), 0.0)
    assert chisquare(counts[p > 0], 20_000 * (wrong / wrong.sum())[p > 0]).pvalue < 1e-4, "the test can fail"


def test_both_words_of_the_seed_and_the_length_count() -> None:
    flat = np.zeros(33)
    seeds = [0, 1, 1 << 32, (1 << 32) + 1, (1 << 63) + 1, 2**64 - 1]
    drawn = {s: [draw([row(flat, seed=s, output=(0,) * n)]).token.item() for n in range(6)] for s in seeds}
    assert len({tuple(tokens) for tokens in drawn.values()}) == len(seeds)
    assert all(len(set(tokens)) > 2 for tokens in drawn.values())
    assert draw([row(flat, seed=-1)]).token == draw([row(flat, seed=2**64 - 1)]).token


# -- neighbours -------------------------------------------------------------------------------


def bits(drawn: Drawn, i: int) -> list[bytes]:
    return [np.asarray(a)[i].tobytes() for a in (drawn.token, drawn.faulty)]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(5)
    for _ in range(6):
        rows = [random_row(rng, 33) for _ in range(ROWS)]
        together = draw(rows)
        for i in range(ROWS):
            assert bits(draw([rows[i]]), 0) == bits(together, i)
        alone = np.stack([processed(r) for r in rows])
        assert alone.tobytes() == np.asarray(jit_process(*device_state(rows, 33))).tobytes()


def test_filters_of_neighbours_change_no_bit() -> None:
    logits = np.random.default_rng(1).normal(size=(ROWS, 33)).astype(np.float32)
    plain = [row(x) for x in logits]
    values, _, _, sampling, _ = device_state(
        [plain[0], *[row(x, top_k=3, top_p=0.5, min_p=0.2) for x in logits[1:]]], 33
    )
    filtered = np.asarray(jax.jit(sampler.filter_logits)(values, sampling))
    assert filtered[0].tobytes() == logits[0].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("vocab", [33, 4096])  # XLA's CPU backend drops NaN from a large array's highest numbers
def test_a_faulty_row_is_flagged_and_alone(vocab: int, value: float) -> None:
    rng = random.Random(9)
    rows = [random_row(rng, vocab) for _ in range(ROWS)]
    good = draw(rows)
    assert not good.faulty.any()
    for bad in (0, 5):
        spoilt = np.array(rows[bad].logits)
        spoilt[7] = value
        drawn = draw([*rows[:bad], replace(rows[bad], logits=spoilt), *rows[bad + 1 :]])
        assert np.flatnonzero(drawn.faulty).tolist() == [bad]
        for i in set(range(ROWS)) - {bad}:
            assert bits(drawn, i) == bits(good, i)
            assert drawn.logprob[i] == good.logprob[i]


def test_without_logprobs_none_are_computed() -> None:
    plain = draw([row(FIVE, temperature=0.0)])
    assert plain.logprob[0] == 0.0 and int(sampling_row(row(FIVE).sequence(0))["flags"]) & USES_LOGPROBS == 0
