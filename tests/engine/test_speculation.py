"""Tokens proposed from the text itself: what and when. That the output is decoding's own: test_equality.py."""

from __future__ import annotations

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.batch import StepKey
from engine.config import EngineOptions
from engine.drafts import LEAST_MATCHED, MOST_MATCHED, propose
from engine.errors import InvalidParam
from engine.kernels import kernel_choices
from engine.programs import step_program
from engine.resolve import DeviceFacts, resolve
from engine.speculation import PROBE_EVERY, TRIALS, Speculation
from tests.engine.world import CONFIG, LATENT, MODEL


def by_hand(tokens: list[int], count: int) -> list[int]:
    """The same, one token at a time: longest match, then latest."""
    last, found = len(tokens) - 1, (0, -1)
    for j in range(last):
        length = 0
        while length < min(MOST_MATCHED, j + 1) and tokens[j - length] == tokens[last - length]:
            length += 1
        found = max(found, (length, j))
    length, j = found
    if length < LEAST_MATCHED:
        return [-1] * count
    return [tokens[j + 1 + i % (last - j)] for i in range(count)]


def test_proposed_is_what_followed_the_longest_then_latest_match() -> None:
    rng, count = random.Random(1), 6
    proposed = jax.jit(propose, static_argnums=2)
    some = none = 0
    for _ in range(60):
        history = np.array([[rng.randrange(5) for _ in range(40)] for _ in range(8)], np.int32)
        position = np.array([rng.randrange(40) for _ in range(8)], np.int32)
        got = np.asarray(proposed(history, position, count)).tolist()
        wanted = [by_hand(row[: last + 1].tolist(), count) for row, last in zip(history, position, strict=True)]
        assert got == wanted
        some += sum(row[0] >= 0 for row in wanted)
        none += sum(row[0] < 0 for row in wanted)
    assert some > 100 and none > 20


def test_a_loop_is_proposed_on_and_on() -> None:
    history = np.array([[7, 1, 2, 1, 2, 9, 9, 9]], np.int32)
    assert np.asarray(propose(jnp.asarray(history), jnp.array([4], jnp.int32), 5)).tolist() == [[1, 2, 1, 2, 1]]


def test_both_ways_are_tried_then_the_faster_one_is_kept_and_the_other_probed() -> None:
    speculation = Speculation(3)
    tried = []
    for _ in range(2 * TRIALS):
        drafts = speculation.drafts(2)
        tried.append(drafts)
        speculation.observe(2, drafts, num_tokens=4 if drafts else 2, seconds=0.01)
    assert sorted(tried) == [0] * TRIALS + [3] * TRIALS
    later = [speculation.drafts(2) for _ in range(2 * PROBE_EVERY)]
    assert later.count(0) == 2 and later[0] == 3
    for _ in range(40):  # the text no longer repeats itself
        speculation.observe(2, 3, num_tokens=2, seconds=0.015)
    assert speculation.drafts(2) == 0
    assert speculation.drafts(32) == 3, "another number of sequences is measured on its own"


def test_without_draft_tokens_nothing_is_proposed() -> None:
    speculation = Speculation(0)
    speculation.observe(1, 0, 1, 0.1)
    assert [speculation.drafts(1) for _ in range(10)] == [0] * 10


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"draft_tokens": 4}, MODEL, "draft_tokens: needs speculation"),
        ({"speculation": "eagle"}, MODEL, "speculation: must be one of none, ngram"),
        ({"speculation": "ngram", "draft_tokens": 0}, MODEL, "draft_tokens: must be a positive integer"),
    ],
)
def test_what_is_refused(options: dict, model: object, message: str) -> None:
    with pytest.raises(InvalidParam, match=message):
        resolve(EngineOptions(**options), model, "float32", DeviceFacts("cpu", 1 << 34, False))  # type: ignore[arg-type]


def test_verifying_over_latents_absorbs_however_many_rows() -> None:
    """All rows together have tokens enough to expand, but each would expand a context of its own for a few of them."""
    config = replace(CONFIG, draft_tokens=3, token_buckets=(16,), decode_buckets=(8,), prefill_decode_buckets=(0,))

    def expands(key: StepKey) -> bool:
        return "latent_attention/reference" in step_program(LATENT, config, key).lower().as_text(debug_info=True)

    assert expands(StepKey(32, 0)) and not expands(StepKey(0, 8, 3))
    said = {line.split(":")[0] for line in kernel_choices(LATENT, config)}
    assert "prefill_attention" in said and "expanded_prefill" not in said
