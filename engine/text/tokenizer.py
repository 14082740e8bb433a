"""`Tokenizer`: text to token ids and back, and chat messages to text.

Wraps the `tokenizers` library. Where the parts come from is the business of `hf.py` and `gguf.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from engine.errors import InvalidParam, ModelError
from engine.text.pieces import Pieces, build_pieces
from engine.text.template import ChatTemplate


@dataclass(frozen=True)
class TokenizerParts:
    """What makes a tokenizer, besides the `tokenizers` object itself.

    `special_tokens`: role (bos_token, eos_token, ...) to its spelling. `chat_templates`: "default"
    and perhaps "tool_use", as Jinja source.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    end_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    origin: str = "the model"


class Tokenizer:
    """Thread-safe after construction. Raises ModelError for a tokenizer that it cannot decode exactly."""

    def __init__(self, backend: Backend, parts: TokenizerParts) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._verbatim_backend: Backend | None = None
        self._lock = threading.Lock()
        self.parts = parts
        self._templates = {
            name: ChatTemplate(source, parts.special_tokens, parts.origin)
            for name, source in parts.chat_templates.items()
        }
        added = backend.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.pieces: Pieces = build_pieces(backend.get_vocab(), special, _decoder_state(backend))

    @property
    def vocab_size(self) -> int:
        """Ids are below this; a model may have more rows (padding)."""
        return max(self.pieces.all, default=-1) + 1

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn, ascending."""
        return self.parts.end_token_ids

    @property
    def bos_token_id(self) -> int | None:
        token = self.parts.special_tokens.get("bos_token")
        return None if token is None else self._backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role (bos_token, eos_token, ...) to its spelling."""
        return self.parts.special_tokens

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`. With `parse_special=False`, "<|im_end|>" is just these characters.

        Lone surrogates, which no UTF-8 text can hold, count as U+FFFD.
        """
        backend = self._backend if parse_special else self._verbatim
        return _encoded(backend, _sound(text), add_special_tokens).ids

    def encode_parts(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and the segment of each, of a text or of two, put together as the model was trained.

        What is longer than max_tokens is cut at its end, of two texts the longer one first; special tokens stay.
        """
        backend = self._backend
        text, pair = _sound(text), None if pair is None else _sound(pair)
        if max_tokens is None:
            whole = _encoded(backend, text if pair is None else (text, pair), add_special_tokens)
            return whole.ids, whole.type_ids
        found = [_encoded(backend, part, False) for part in (text, pair) if part is not None]
        special = backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
        for encoding, length in zip(found, _cut([len(e) for e in found], max_tokens - special), strict=True):
            encoding.truncate(length)
        whole = backend.post_process(*found, add_special_tokens=add_special_tokens)
        return whole.ids[:max_tokens], whole.type_ids[:max_tokens]

    @property
    def _verbatim(self) -> Backend:
        """A second backend that reads the spelling of special tokens as text (a switch would be shared)."""
        with self._lock:
            if self._verbatim_backend is None:
                backend = Backend.from_str(self._backend.to_str())
                backend.encode_special_tokens = True
                self._verbatim_backend = backend
            return self._verbatim_backend

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Never raises: unknown ids add nothing, broken UTF-8 becomes U+FFFD."""
        return self.pieces.text(ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, special tokens by their spelling; b"" for an unknown id."""
        return self.pieces.all.get(token_id, b"")

    def token_str(self, token_id: int) -> str:
        """`token_bytes` as text; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def single_tokens(self, word: str) -> tuple[int, ...]:
        """Every token that writes `word`, with or without a space before it.

        Raises InvalidParam("bad_words") when `word` itself takes more than one token.
        """
        stripped = word.strip(" ")
        if not stripped:
            raise InvalidParam("bad_words", "a word must not be empty")
        exact = self._ids_by_bytes.get(stripped.encode("utf-8", "replace"), ())
        spaced = self._ids_by_bytes.get(b" " + stripped.encode("utf-8", "replace"), ())
        if not exact:
            raise InvalidParam("bad_words", f"{word[:64]!r} is more than one token; only single tokens can be banned")
        return (*exact, *spaced)

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        table: dict[bytes, tuple[int, ...]] = {}
        for token_id, piece in self.pieces.all.items():
            table[piece] = (*table.get(piece, ()), token_id)
        return table

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a chat; encode it with add_special_tokens=False and parse_special=True.

        `variables` are names that the template reads (enable_thinking=False ...). Raises
        InvalidParam naming messages, chat_template, chat_template_kwargs or continue_final_message.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise InvalidParam("chat_template", "this model has no chat template; give one with the option "
                               "chat_template, or use completions")  # fmt: skip
        return template.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer folder that loads equal. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.parts.special_tokens}
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "generation_config.json", {"eos_token_id": list(self.end_token_ids)})
        for name, source in self.parts.chat_templates.items():
            path = folder / "chat_template.jinja"
            if name != "default":
                path = folder / "additional_chat_templates" / f"{name}.jinja"
                path.parent.mkdir(exist_ok=True)
            path.write_bytes(source.encode())


def _encoded(backend: Backend, text: str | tuple[str, str], add_special_tokens: bool) -> Encoding:
    """As a batch of one: unlike `Backend.encode` that lets other threads run, which a long text keeps for a second."""
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def _sound(text: str) -> str:
    """Without lone surrogates, which the library refuses."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _cut(lengths: list[int], room: int) -> list[int]:
    """Lengths that together are at most `room`: the longer loses first, as in Hugging Face's longest_first."""
    room = max(room, 0)
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    first, second = lengths
    shorter = min(first, second, room // 2)
    return [shorter, room - shorter] if first <= second else [room - shorter, shorter]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _decoder_state(backend: Backend) -> dict[str, Any] | None:
    """The decoder as tokenizer.json spells it (serialized alone: the vocabulary may have 10**5 entries)."""
    decoder = backend.decoder
    if decoder is None:
        return None
    try:
        return json.loads(decoder.__getstate__())
    except (ValueError, TypeError) as error:
        raise ModelError(f"the tokenizer's decoder cannot be read: {error}") from error
