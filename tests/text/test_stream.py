"""Streams of token events become text: equal to one full decode, cut at stop strings, whatever the chunking."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, SamplingParams, TextDelta, TokenEvent, TokenLogprobs
from engine.text import TextStream, Tokenizer, load_tokenizer
from tests.text.small import byte_level, spm_gguf


@functools.cache
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """Byte-level, and byte-fallback with a leading space that decoding drops."""
    with tempfile.TemporaryDirectory() as folder:
        return byte_level(Path(folder) / "hf"), load_tokenizer(spm_gguf(Path(folder) / "spm.gguf"))


def events(
    ids: list[int], cuts: list[int], finish: FinishReason | None = FinishReason.LENGTH, **last
) -> list[TokenEvent]:
    """`ids` in chunks that end at `cuts` (any numbers), the last with the ending."""
    ends = sorted({cut % (len(ids) + 1) for cut in cuts} | {len(ids)})
    chunks = [tuple(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)] or [()]
    return [
        TokenEvent(
            request_id="r",
            index=1,
            token_ids=chunk,
            logprobs=tuple(TokenLogprobs(t, -1.0) for t in chunk),
            finish_reason=finish if i == len(chunks) - 1 else None,
            **(last if i == len(chunks) - 1 else {}),
        )
        for i, chunk in enumerate(chunks)
    ]


def run(stream: TextStream, pushed: list[TokenEvent]) -> list[TextDelta]:
    deltas = []
    for event in pushed:
        deltas.append(stream.push(event))
        if stream.stopped:
            break
    return deltas


any_ids = st.lists(st.one_of(st.integers(0, 430), st.integers(-3, 2**31)), max_size=40)
any_cuts = st.lists(st.integers(0, 40), max_size=8)


@given(
    which=st.integers(0, 1),
    ids=any_ids,
    cuts=any_cuts,
    skip=st.booleans(),
    prompt=st.lists(st.integers(0, 430), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_joined_deltas_are_the_full_decode(
    which: int, ids: list[int], cuts: list[int], skip: bool, prompt: list[int]
) -> None:
    tokenizer = tokenizers()[which]
    stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip), prompt)
    deltas = run(stream, events(ids, cuts))
    text = "".join(delta.text for delta in deltas)
    if tokenizer.decode(prompt, skip):  # what follows a text keeps its space: no text of the prompt shows
        whole = tokenizer.pieces.join(ids, skip).decode("utf-8", "replace")
        assert text == whole
    else:
        assert text == tokenizer.decode(ids, skip)
    assert [t for delta in deltas for t in delta.token_ids] == ids
    assert deltas[-1].finish_reason == FinishReason.LENGTH
    for delta in deltas[:-1]:
        assert delta.finish_reason is None


@given(text=st.text(max_size=30), cuts=any_cuts)
@example(text="▁", cuts=[])
@settings(deadline=None, max_examples=300)
def test_no_delta_holds_a_part_of_a_character(text: str, cuts: list[int]) -> None:
    """Any text, also emoji of many code points: no delta shows a replacement character."""
    if "�" in text:
        return
    for tokenizer, written in zip(tokenizers(), (text, text.replace("▁", " ")), strict=True):
        ids = tokenizer.encode(text, parse_special=False)
        deltas = run(TextStream(tokenizer, SamplingParams(skip_special_tokens=False), [5]), events(ids, cuts))
        assert all("�" not in delta.text for delta in deltas)
        assert "".join(delta.text for delta in deltas).endswith(written)  # "▁" is sentencepiece's space


def reference(
    text_by_token: list[str], stops: tuple[str, ...], include: bool, min_tokens: int
) -> tuple[str, str | None, int]:
    """The first stop string to be complete, character by character, after min_tokens: text, stop, tokens used."""
    text = ""
    for num_tokens, part in enumerate(text_by_token, start=1):
        for character in part:
            text += character
            complete = [stop for stop in stops if text.endswith(stop) and num_tokens > min_tokens]
            if complete:
                stop = max(complete, key=len)
                return text if include else text.removesuffix(stop), stop, num_tokens
    return text, None, len(text_by_token)


@given(
    letters=st.text("ab ", max_size=25),
    stops=st.lists(st.text("ab ", min_size=1, max_size=6), min_size=1, max_size=3),
    cuts=any_cuts,
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
)
@settings(deadline=None, max_examples=500)
def test_stop_strings(letters: str, stops: list[str], cuts: list[int], include: bool, min_tokens: int) -> None:
    """Equal to a search character by character, for any chunking; token ids and logprobs end with the text."""
    tokenizer = tokenizers()[0]
    ids = [i for letter in letters for i in tokenizer.encode(letter)]
    params = SamplingParams(
        stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None
    )
    stream = TextStream(tokenizer, params, [5])
    deltas = run(stream, events(ids, cuts))
    text, stop, num_used = reference(list(letters), tuple(stops), include, min_tokens)
    assert "".join(delta.text for delta in deltas) == text
    assert deltas[-1].stop_reason == stop and stream.stopped == (stop is not None)
    assert deltas[-1].finish_reason == (FinishReason.LENGTH if stop is None else FinishReason.STOP)
    assert [t for delta in deltas for t in delta.token_ids] == ids[:num_used]
    assert [p.token_id for delta in deltas for p in delta.logprobs or ()] == ids[:num_used]


def test_text_that_may_become_a_stop_string_is_held() -> None:
    tokenizer = tokenizers()[0]
    stream = TextStream(tokenizer, SamplingParams(stop=("\n\nUser:",)), [5])

    def push(text: str, **fields) -> str:
        ids = tuple(tokenizer.encode(text))
        return stream.push(TokenEvent(request_id="r", index=0, token_ids=ids, **fields)).text

    assert push("hello\n") == "hello"
    assert push("\nUse") == ""
    assert push("ful\n") == "\n\nUseful"
    assert push("\nUser") == ""
    assert push("", finish_reason=FinishReason.ABORT) == "\n\nUser"


def test_end_and_stop_tokens() -> None:
    """The token that ended the choice is no text unless asked for; only a user's stop token is a stop_reason."""
    tokenizer = tokenizers()[0]
    ids, end = tokenizer.encode("hello"), tokenizer.end_token_ids[0]

    def last(stop_token: int, **params) -> TextDelta:
        stream = TextStream(tokenizer, SamplingParams(**params), [5])
        [delta] = run(stream, events([*ids, stop_token], [], FinishReason.STOP, stop_token_id=stop_token))
        return delta

    delta = last(end)
    assert (delta.text, delta.stop_reason, delta.token_ids) == ("hello", None, (*ids, end))
    assert last(end, skip_special_tokens=False).text == "hello"
    assert last(end, skip_special_tokens=False, include_stop_str_in_output=True).text == "hello<|im_end|>"
    comma = tokenizer.encode(";")[0]
    assert (last(comma, stop_token_ids=(comma,)).text, last(comma, stop_token_ids=(comma,)).stop_reason) == (
        "hello",
        comma,
    )
    assert last(comma, stop_token_ids=(comma,), include_stop_str_in_output=True).text == "hello;"


def test_a_length_ending_keeps_the_last_token() -> None:
    tokenizer = tokenizers()[0]
    deltas = run(TextStream(tokenizer, SamplingParams(), []), events(tokenizer.encode("hello there"), [1]))
    assert "".join(delta.text for delta in deltas) == "hello there"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_without_text(with_tokenizer: bool) -> None:
    tokenizer = tokenizers()[0] if with_tokenizer else None
    stream = TextStream(tokenizer, SamplingParams(detokenize=False, stop=("a",)), [5])
    [delta] = run(stream, events([70, 71], []))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (70, 71), FinishReason.LENGTH)


def test_an_event_after_the_stop_is_empty() -> None:
    tokenizer = tokenizers()[0]
    stream = TextStream(tokenizer, SamplingParams(stop=("w",)), [5])
    run(stream, events(tokenizer.encode("hello world"), [], None))
    late = stream.push(TokenEvent(request_id="r", index=1, token_ids=(70,), finish_reason=FinishReason.ABORT))
    assert late == TextDelta(request_id="r", index=1)


def test_cost_per_token() -> None:
    """A thread that steps thousands of tokens a second cannot spend its time here."""
    tokenizer = tokenizers()[0]
    pushed = events(tokenizer.encode("hello there, the quick brown fox " * 400), list(range(40)))
    num_tokens = sum(len(event.token_ids) for event in pushed)
    best_s = 1.0
    for _ in range(3):
        start_s = time.perf_counter()
        run(TextStream(tokenizer, SamplingParams(), [5]), pushed)
        best_s = min(best_s, time.perf_counter() - start_s)
    assert best_s / num_tokens < 10e-6  # measured: 0.4 us in chunks, 2 us one by one
