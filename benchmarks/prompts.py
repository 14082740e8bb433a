"""Prompts of real text with an exact number of tokens, each different from the first token on.

The text is the reference manual that every Python carries (`pydoc_data.topics`): English prose
with code, half a megabyte, nothing to download.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pydoc_data import topics

from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    token_ids: tuple[int, ...]


def make_prompts(tokenizer: Tokenizer, num_tokens: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts cut from disjoint places, so that no two share a prefix that a cache could use.

    A place is kept only when its text encodes to the very ids it was cut from, so that every
    engine sees `num_tokens` tokens. Raises ValueError when the text is too short for `count`.
    """
    corpus = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = tokenizer.encode(corpus, add_special_tokens=False, parse_special=False)
    starts = list(range(0, len(ids) - num_tokens, num_tokens))
    random.Random(seed).shuffle(starts)
    found: list[Prompt] = []
    first_words: set[tuple[int, ...]] = set()
    for start in starts:
        piece = ids[start : start + num_tokens]
        text = tokenizer.decode(piece, skip_special_tokens=False)
        head = tuple(piece[:4])
        if head in first_words or tokenizer.encode(text, add_special_tokens=False, parse_special=False) != piece:
            continue
        first_words.add(head)
        found.append(Prompt(text, tuple(piece)))
        if len(found) == count:
            return found
    raise ValueError(f"the text holds {len(found)} prompts of {num_tokens} tokens, {count} are needed")
