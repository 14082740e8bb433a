"""Which texts share a step: order, room, padding. Host bookkeeping, no device."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.pooling.batch import batch_key, batch_layout, build, choose, lattice, length_bucket, positions, sizes
from engine.pooling.request import TextIds
from engine.pooling.waiting import WaitingTexts
from tests.pooling.fakes import config

CONFIG = config()


def text(length: int) -> TextIds:
    return TextIds(tuple(range(1, length + 1)))


def test_the_lattice_is_closed() -> None:
    """Every step that `choose` can ask for, whatever waits, is a program of the lattice."""
    keys, rng = set(lattice(CONFIG)), random.Random(0)
    for _ in range(2000):
        length = rng.choice(CONFIG.length_buckets)
        counts = [rng.randint(1, length) for _ in range(rng.randint(1, 60))]
        key, taken = choose(CONFIG, length, counts)
        assert key in keys and 0 < taken <= key.rows and sum(counts[:taken]) <= key.tokens


def test_sizes() -> None:
    assert CONFIG.length_buckets == (8, 16, 32, 48) and CONFIG.token_buckets == (32, 128)
    assert [sizes(CONFIG, length) for length in (8, 32, 48)] == [[32, 128], [32, 128], [48, 128]]
    long = config(length_buckets=(8, 200), max_model_len=200)
    assert sizes(long, 200) == [200]  # a text of more tokens than a step has has its own
    assert [length_bucket(CONFIG, n) for n in (1, 8, 9, 48)] == [8, 8, 16, 48]
    # So many rows as texts of the bucket (each longer than the one below) can fill the tokens.
    assert (batch_key(CONFIG, 16, 128).rows, batch_key(CONFIG, 48, 48).rows) == (14, 1)
    assert batch_key(config(max_num_seqs=3), 16, 128).rows == 3


def test_a_step_is_at_most_a_quarter_empty_when_a_smaller_one_would_do() -> None:
    assert choose(CONFIG, 16, [10] * 12) == (batch_key(CONFIG, 16, 128), 12)  # 120 of 128
    assert choose(CONFIG, 16, [10] * 6) == (batch_key(CONFIG, 16, 32), 3)  # 60 of 128 would be half empty
    assert choose(CONFIG, 16, [10]) == (batch_key(CONFIG, 16, 32), 1)


def test_the_oldest_is_always_in_the_next_step_and_none_is_lost() -> None:
    rng = random.Random(1)
    waiting, left = WaitingTexts(CONFIG), {}
    for number in range(300):
        item = text(rng.randint(1, 48))
        waiting.add("r", number, item)
        left[number] = item
        if rng.random() < 0.1:
            taken = waiting.take()
            assert taken is not None and min(left) in {i.index for i in taken.items}
            for i in taken.items:
                assert left.pop(i.index) == i.text
    while taken := waiting.take():
        assert min(left) in {i.index for i in taken.items} and taken.num_tokens <= taken.key.tokens
        for i in taken.items:
            del left[i.index]
    assert not left and len(waiting) == 0


def test_shorter_texts_ride_along() -> None:
    waiting = WaitingTexts(CONFIG)
    for index, length in enumerate((30, 3, 20, 5)):
        waiting.add("r", index, text(length))
    batch = waiting.take()
    assert batch is not None and batch.key.length == 32
    assert [item.index for item in batch.items] == [0]  # 30 of 32; all four would leave half of 128 empty
    rest = waiting.take()
    assert rest is not None and [item.index for item in rest.items] == [1, 3]


def test_remove() -> None:
    waiting = WaitingTexts(CONFIG)
    for index in range(4):
        waiting.add("ab"[index % 2], index, text(5 + 5 * index))
    waiting.remove("a")
    taken = [item.index for _ in range(2) if (batch := waiting.take()) for item in batch.items]
    assert sorted(taken) == [1, 3] and waiting.take() is None


def test_a_step_as_a_vector() -> None:
    key = batch_key(CONFIG, 8, 32)
    layout = batch_layout(key)
    texts = [TextIds((7, 8, 9), (0, 1, 1)), TextIds((5,)), TextIds((1, 1))]
    fields = layout.split(build(key, layout, None, texts), lambda part, f: part.reshape(f.shape))
    assert fields["tokens"][:7].tolist() == [7, 8, 9, 5, 1, 1, 0]
    assert fields["types"][:4].tolist() == [0, 1, 1, 0]
    assert fields["positions"][:6].tolist() == [0, 1, 2, 0, 0, 1]
    assert fields["row"][:8].tolist() == [0, 0, 0, 1, 2, 2, -1, -1]
    assert fields["start"][:4].tolist() == [0, 3, 4, 0] and fields["length"][:4].tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "padding_id", "expected"),
    [([5, 6, 7], None, [0, 1, 2]), ([5, 6, 7], 1, [2, 3, 4]), ([5, 1, 7], 1, [2, 1, 3]), ([5, 6], 0, [1, 2])],
)
def test_positions_behind_a_padding_id(tokens: list[int], padding_id: int | None, expected: list[int]) -> None:
    assert positions(np.asarray(tokens, np.int32), padding_id).tolist() == expected
