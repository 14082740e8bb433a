"""Prompts of real text with an exact number of tokens, each different from the first token on.

The text is the reference manual that every Python carries (`pydoc_data.topics`): English prose
with code, half a megabyte, nothing to download.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data import topics

import numpy as np

from engine.errors import InvalidParam
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    token_ids: tuple[int, ...]


NOTHING = Prompt("", ())


@dataclass(frozen=True, slots=True)
class Mix:
    """Lengths in tokens, log-normal around a median and cut to a range: most are short, some are long."""

    input_median: int
    input_sigma: float
    input_range: tuple[int, int]
    output_median: int
    output_sigma: float
    output_range: tuple[int, int]


# Made up after what such uses look like, not measured on anyone's traffic.
MIXES = {
    "chat": Mix(120, 0.9, (16, 1024), 160, 0.7, (16, 512)),
    "summary": Mix(900, 0.4, (256, 1536), 80, 0.4, (32, 192)),
    "code": Mix(400, 0.8, (64, 1024), 48, 0.9, (8, 256)),
}


def mixed_lengths(mix: Mix, count: int, seed: int) -> list[tuple[int, int]]:
    """(input, output) tokens of `count` requests."""
    rng = np.random.default_rng(seed)

    def draw(median: int, sigma: float, limits: tuple[int, int]) -> list[int]:
        return np.clip(rng.lognormal(np.log(median), sigma, count).round(), *limits).astype(int).tolist()

    inputs = draw(mix.input_median, mix.input_sigma, mix.input_range)
    return list(zip(inputs, draw(mix.output_median, mix.output_sigma, mix.output_range), strict=True))


def make_prompts(tokenizer: Tokenizer, num_tokens: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of one length, see `Cutter`."""
    cutter = Cutter(tokenizer, seed)
    return [cutter.cut(num_tokens) for _ in range(count)]


class Cutter:
    """Cuts prompts from random places, so that no two begin alike and no prefix cache could help.

    A place is kept only when its text encodes to the very ids it was cut from, so that every
    engine sees that number of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        corpus = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(corpus, add_special_tokens=False, parse_special=False)
        self._starts = list(range(len(self._ids)))
        random.Random(seed).shuffle(self._starts)
        self._heads: set[tuple[int, ...]] = set()

    def cut(self, num_tokens: int, after: Prompt = NOTHING) -> Prompt:
        """`num_tokens` more behind those of `after`. Raises InvalidParam when the text has no place left."""
        while self._starts:
            start = self._starts.pop()
            if start + num_tokens > len(self._ids):
                continue
            head = tuple(self._ids[start : start + min(4, num_tokens)])
            if head in self._heads:
                continue
            piece = self._ids[start : start + num_tokens]
            prompt = Prompt(
                after.text + self._tokenizer.decode(piece, skip_special_tokens=False), (*after.token_ids, *piece)
            )
            if (
                tuple(self._tokenizer.encode(prompt.text, add_special_tokens=False, parse_special=False))
                == prompt.token_ids
            ):
                self._heads.add(head)
                return prompt
        raise InvalidParam("num_prompts", f"the text has no place left for another prompt of {num_tokens} tokens")
