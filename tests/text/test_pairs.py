"""Texts and pairs as encoders read them: ids, segments and cuts are the tokenizers library's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from engine.text import Tokenizer, load_tokenizer

FOLDER = Path(__file__).parent.parent / "fixtures" / "encoders" / "bert"
WORDS = ["the", "cat", "sat", "on", "it's", "ship", "42", "Fish!", "unknownword", "é", "[SEP]", "blue,", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


@pytest.fixture
def oracle() -> Backend:
    return Backend.from_file(str(FOLDER / "tokenizer.json"))


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["", *(" ".join(rng.choices(WORDS, k=rng.randint(1, 15))) for _ in range(count))]


@pytest.mark.parametrize("special", [True, False])
def test_ids_and_segments(tokenizer: Tokenizer, oracle: Backend, special: bool) -> None:
    listed = texts(60)
    for first, second in zip(listed, reversed(listed), strict=True):
        for pair in (None, second):
            want = oracle.encode(first, pair, add_special_tokens=special)
            got = tokenizer.encode_parts(first, pair, add_special_tokens=special)
            assert got == (want.ids, want.type_ids)
    assert set(tokenizer.encode_parts("the cat", "sat")[1]) == {0, 1}


def test_cuts_are_longest_first(tokenizer: Tokenizer, oracle: Backend) -> None:
    """Special tokens stay; of a pair the longer text loses first, then both alike."""
    listed, rng = texts(200), random.Random(1)
    for first, second in zip(listed, reversed(listed), strict=True):
        limit = rng.randint(3, 40)
        oracle.enable_truncation(limit)
        for pair in (None, second):
            want = oracle.encode(first, pair)
            assert tokenizer.encode_parts(first, pair, max_tokens=limit) == (want.ids, want.type_ids)


def test_a_limit_below_the_special_tokens_holds_all_the_same(tokenizer: Tokenizer) -> None:
    for limit in (1, 2):
        assert len(tokenizer.encode_parts("the cat", "sat", max_tokens=limit)[0]) == limit


def test_word_pieces_decode_as_the_library_does(tokenizer: Tokenizer, oracle: Backend) -> None:
    for text in texts(60):
        ids = oracle.encode(text).ids
        assert tokenizer.decode(ids) == oracle.decode(ids)


def test_lone_surrogates_count_as_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_parts("cat \ud800", "\udfff") == tokenizer.encode_parts("cat �", "�")
