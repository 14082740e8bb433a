"""The exact bytes that each token id adds to a text.

A text is the concatenation of its tokens' bytes, read as UTF-8; that is what makes streaming and
full decoding equal by construction. Knows the decoders of tokenizer.json, not where files lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Texts(dict[int, str | None]):
    """The text of each token that is whole characters by itself, else None; decoded when it is first asked for."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces

    def __missing__(self, token: int) -> str | None:
        try:
            text = self._pieces.get(token, b"").decode()
        except UnicodeDecodeError:
            text = None
        self[token] = text
        return text


@dataclass(frozen=True)
class Pieces:
    """`all[id]` are the bytes of a token; `plain[id]` the same with special tokens as b"".

    Both are dicts, so that an id that no token has (models pad their vocabulary) is just absent.
    `leading_space`: the decoder drops one space at the very start of a text.
    """

    all: dict[int, bytes]
    plain: dict[int, bytes]
    leading_space: bool

    def texts(self, skip_special_tokens: bool) -> Texts:
        """One for all streams of a kind: what it has looked up stays."""
        return self._plain_texts if skip_special_tokens else self._all_texts

    @cached_property
    def _plain_texts(self) -> Texts:
        return Texts(self.plain)

    @cached_property
    def _all_texts(self) -> Texts:
        return Texts(self.all)

    def join(self, ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        get = (self.plain if skip_special_tokens else self.all).get
        return b"".join([get(token, b"") for token in ids])

    def text(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """The whole text; bytes that are not UTF-8 become U+FFFD."""
        text = self.join(ids, skip_special_tokens).decode("utf-8", "replace")
        return text[1:] if self.leading_space and text.startswith(" ") else text


def build_pieces(vocab: Mapping[str, int], special_ids: frozenset[int], decoder: Mapping[str, Any] | None) -> Pieces:
    """`vocab` holds added tokens too; `decoder` is that entry of tokenizer.json."""
    to_bytes, leading_space = _decoder(decoder)
    in_order = sorted(vocab.items(), key=lambda item: item[1])
    every = {token_id: to_bytes(token) for token, token_id in in_order}
    plain = {token_id: b"" if token_id in special_ids else piece for token_id, piece in every.items()}
    return Pieces(every, plain, leading_space)


def _decoder(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """The function from a token to its bytes, and whether a text's first space is dropped."""
    if decoder is None:  # tokens are words
        return lambda token: b" " + token.encode(), True
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level, False
    replacements: list[tuple[str, str]] = []
    byte_fallback = leading_space = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
                leading_space = step.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                leading_space = True
            case {"type": "WordPiece", "prefix": prefix} if len(steps) == 1:
                return _word_piece(prefix, bool(step.get("cleanup"))), True
            case {"type": "Fuse"}:
                pass
            case _:
                raise ModelError(f"the tokenizer's decoder {step.get('type')!r} with {step} is not supported")

    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.match(token) if byte_fallback else None
        if match:
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes, leading_space


# What WordPiece's decoder cleans up: English written without a space before it.
_CLEANED = {f" {end}": end for end in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")} | {" ' ": "'"}


def _word_piece(prefix: str, cleanup: bool) -> Callable[[str], bytes]:
    """BERT's: a word has a space before it, a piece with the prefix goes on where the last one ended."""

    def to_bytes(token: str) -> bytes:
        text = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        return (_CLEANED.get(text, text) if cleanup else text).encode()

    return to_bytes


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # an added token, written as it is
        return token.encode()
