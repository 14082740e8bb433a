"""The JSON of answers: from text deltas to OpenAI's objects, whole or in chunks.

Pure functions of deltas and a tokenizer. Knows nothing about sockets or the engine's state.
"""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.request import FinishReason, Logprob, TextDelta, TokenLogprobs
from server.lifecycle import TextCodec
from server.session import Session

LOWEST_LOGPROB = -9999.0  # OpenAI's spelling of minus infinity, which JSON has not
_PAD_CHARS = 32  # obfuscated chunks carry text plus padding of a multiple of this

Json = dict[str, Any]


def finite(logprob: float) -> float:
    return logprob if logprob >= LOWEST_LOGPROB else LOWEST_LOGPROB  # NaN compares false, too


class TokenNames:
    """How answers spell single tokens. Without a tokenizer a token is spelled by its id."""

    def __init__(self, tokenizer: TextCodec | None) -> None:
        self._tokenizer = tokenizer
        self._hidden: dict[int, bool] = {}

    def raw(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def shown(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_str(token_id)

    def legacy(self, token_id: int) -> str:
        """As OpenAI's completions spell it: a part of a character as 'bytes:' and its bytes."""
        raw = self.raw(token_id)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self.shown(token_id)

    def hidden(self, token_id: int) -> bool:
        """A special token: it has a spelling, and adds nothing to the text."""
        if self._tokenizer is None:
            return True
        if token_id not in self._hidden:
            self._hidden[token_id] = not self._tokenizer.decode([token_id], skip_special_tokens=True)
        return self._hidden[token_id]


@dataclass(slots=True)
class Choice:
    """Everything that one choice said, for an answer in one piece."""

    deltas: list[TextDelta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        return next((delta.prompt_logprobs for delta in self.deltas if delta.prompt_logprobs is not None), None)


def usage(session: Session) -> Json:
    prompt, output = session.work.num_prompt_tokens, session.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": session.num_cached_tokens},
    }


def finish(delta: TextDelta) -> str | None:
    """OpenAI's word. Only stop and length get this far: the others end a request as errors."""
    if delta.finish_reason is None:
        return None
    if delta.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise ValueError(f"{delta.finish_reason} is no ending that OpenAI's API can tell")
    return delta.finish_reason.value


def padding(text: str) -> str:
    """Random characters that bring a chunk's text to a multiple of `_PAD_CHARS`."""
    return secrets.token_urlsafe(_PAD_CHARS)[: -len(text) % _PAD_CHARS]


def chat_logprobs(names: TokenNames, entries: Iterable[TokenLogprobs], num_top: int) -> Json:
    def item(token_id: int, logprob: float) -> Json:
        return {"token": names.shown(token_id), "logprob": finite(logprob), "bytes": list(names.raw(token_id))}

    content = [
        item(entry.token_id, entry.logprob)
        | {"top_logprobs": [item(top.token_id, top.logprob) for top in entry.top[:num_top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """Completions' parallel lists; one object a choice, because offsets run on through chunks.

    `text_offset` is where a token's text begins in the choice's `text`, in characters. `text` is
    how that text begins: SentencePiece puts a space before the first word that is not in it.
    """

    def __init__(self, names: TokenNames, num_top: int, skip_special_tokens: bool, text: str) -> None:
        self._names = names
        self._drop_space = bool(text) and not text.startswith(" ")
        self._num_top = num_top
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def rows(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Json:
        """An entry is None where nothing predicts the token: the first of a prompt."""
        shown: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            shown["tokens"].append(self._names.legacy(token_id))
            shown["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            shown["top_logprobs"].append(None if entry is None else self._top(entry))
            shown["text_offset"].append(self._offset)
            self._offset += self._num_chars(token_id)
        return shown

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The best and the chosen one: k or k + 1 entries. Of two tokens spelled alike the better stays."""
        found = {}
        for top in (*entry.top[: self._num_top], Logprob(entry.token_id, entry.logprob)):
            logprob = entry.logprob if top.token_id == entry.token_id else top.logprob
            found.setdefault(self._names.legacy(top.token_id), finite(logprob))
        return found

    def _num_chars(self, token_id: int) -> int:
        if self._skip_special_tokens and self._names.hidden(token_id):
            return 0
        raw = self._names.raw(token_id)
        if self._drop_space and raw:
            raw, self._drop_space = raw.removeprefix(b" "), False
        return len(self._decoder.decode(raw))


def prompt_logprobs(
    names: TokenNames, entries: Sequence[TokenLogprobs | None] | None, num_top: int
) -> list[Json | None] | None:
    """vLLM's shape: for each position a map from token id to logprob, rank and text."""
    if entries is None:
        return None
    return [None if entry is None else _position(names, entry, num_top) for entry in entries]


def _position(names: TokenNames, entry: TokenLogprobs, num_top: int) -> Json:
    def item(token_id: int, logprob: float, rank: int | None) -> Json:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": names.shown(token_id)}

    ranked = {str(top.token_id): item(top.token_id, top.logprob, i + 1) for i, top in enumerate(entry.top)}
    shown = dict(list(ranked.items())[:num_top])
    key = str(entry.token_id)
    shown[key] = ranked.get(key) or item(entry.token_id, entry.logprob, None)
    return shown
