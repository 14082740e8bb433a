"""The two kinds of answer, chat and completion, each whole or as chunks of a stream.

One object answers one HTTP request. Sending is not its business: see `sse.py` and `app.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from engine.request import TextDelta, TokenLogprobs
from server.lifecycle import TextCodec
from server.protocol import ChatRequest, CompletionRequest
from server.session import ChoiceDelta, Session
from server.shapes import (
    Choice,
    Json,
    LegacyLogprobs,
    TokenNames,
    chat_logprobs,
    finish,
    padding,
    prompt_logprobs,
    usage,
)


class Answer(Protocol):
    """What a route needs to turn a session's deltas into JSON."""

    session: Session

    def chunks(self, event: ChoiceDelta) -> Iterator[Json]: ...
    def usage_chunk(self) -> Json: ...
    def whole(self, choices: Sequence[Choice]) -> Json: ...


class _Base:
    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, session: Session, tokenizer: TextCodec | None, model: str) -> None:
        self.session = session
        self.names = TokenNames(tokenizer)
        self.head: Json = {
            "id": f"{self.prefix}-{session.work.body.request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._opened: set[int] = set()
        self._options = session.work.body.stream_options

    def usage_chunk(self) -> Json:
        return self.head | {"object": self.chunk_kind, "choices": [], "usage": usage(self.session)}

    def _chunk(self, choice: Json, text: str) -> Json:
        chunk = self.head | {"object": self.chunk_kind, "choices": [choice]}
        if self._options is not None and self._options.include_usage:
            chunk["usage"] = usage(self.session) if self._options.continuous_usage_stats else None
        if self._options is not None and self._options.include_obfuscation:
            chunk["obfuscation"] = padding(text)
        return chunk

    def _says_something(self, delta: TextDelta) -> bool:
        """False while the text of the new tokens is held back and nobody asked for the tokens."""
        shows_tokens = delta.logprobs is not None or self.session.work.body.return_token_ids
        return bool(delta.text or delta.finish_reason or (delta.token_ids and shows_tokens))

    def _opens(self, choice: int) -> bool:
        """True once a choice, at its first chunk."""
        if choice in self._opened:
            return False
        self._opened.add(choice)
        return True

    def _whole(self, choices: list[Json]) -> Json:
        return self.head | {"object": self.kind, "choices": choices, "usage": usage(self.session)}


class ChatAnswer(_Base):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, session: Session, tokenizer: TextCodec | None, model: str, body: ChatRequest) -> None:
        super().__init__(session, tokenizer, model)
        self._body = body

    def chunks(self, event: ChoiceDelta) -> Iterator[Json]:
        choice, delta = event
        if self._opens(choice):
            opening = self._choice(choice, {"role": "assistant", "content": ""})
            yield self._chunk(opening, "") | self._prompt_ids()
        if not self._says_something(delta):
            return
        shown = self._choice(choice, {"content": delta.text} if delta.text else {})
        shown |= {"logprobs": self._logprobs(delta.logprobs), "finish_reason": finish(delta)}
        shown |= self._extras(delta, delta.token_ids)
        yield self._chunk(shown, delta.text)

    def whole(self, choices: Sequence[Choice]) -> Json:
        shown = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            entry = {"index": index, "message": message, "finish_reason": finish(choice.deltas[-1])}
            entry["logprobs"] = self._logprobs(choice.logprobs)
            shown.append(entry | self._extras(choice.deltas[-1], choice.token_ids))
        answer = self._whole(shown) | self._prompt_ids()
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self.names, choices[0].prompt_logprobs, self._body.prompt_logprobs
            )
        return answer

    def _choice(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, entries: Sequence[TokenLogprobs] | None) -> Json | None:
        if self._body.num_top is None or entries is None:
            return None
        return chat_logprobs(self.names, entries, self._body.num_top)

    def _extras(self, delta: TextDelta, token_ids: Sequence[int]) -> Json:
        """vLLM's additions to a choice."""
        extras: Json = {"stop_reason": delta.stop_reason} if delta.finish_reason is not None else {}
        return extras | ({"token_ids": list(token_ids)} if self._body.return_token_ids else {})

    def _prompt_ids(self) -> Json:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self.session.work.requests[0].prompt_token_ids)}


class CompletionAnswer(_Base):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, session: Session, tokenizer: TextCodec | None, model: str, body: CompletionRequest) -> None:
        super().__init__(session, tokenizer, model)
        self._body = body
        self._legacy: dict[int, LegacyLogprobs] = {}

    def chunks(self, event: ChoiceDelta) -> Iterator[Json]:
        choice, delta = event
        first = self._opens(choice)
        echo = self._echo(choice) if first else ""
        if not first and not self._says_something(delta):
            return
        prompt = delta.prompt_logprobs if first else None
        logprobs = self._logprobs(choice, delta.token_ids, delta.logprobs or (), prompt)
        shown = self._choice(choice, echo + delta.text, delta, delta.token_ids, logprobs, first)
        yield self._chunk(shown, echo + delta.text)

    def whole(self, choices: Sequence[Choice]) -> Json:
        shown = []
        for index, choice in enumerate(choices):
            prompt = choices[index - index % self._body.n].prompt_logprobs
            logprobs = self._logprobs(index, choice.token_ids, choice.logprobs, prompt)
            text = self._echo(index) + choice.text
            entry = self._choice(index, text, choice.deltas[-1], choice.token_ids, logprobs, True)
            if self._body.prompt_logprobs is not None:
                entry["prompt_logprobs"] = prompt_logprobs(self.names, prompt, self._body.prompt_logprobs)
            shown.append(entry)
        return self._whole(shown)

    def _echo(self, choice: int) -> str:
        echo = self.session.work.echo
        return echo[choice // self._body.n] if echo else ""

    def _prompt_token_ids(self, choice: int) -> tuple[int, ...]:
        return self.session.work.requests[choice // self._body.n].prompt_token_ids

    def _choice(
        self, index: int, text: str, last: TextDelta, token_ids: Sequence[int], logprobs: Json | None, first: bool
    ) -> Json:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish(last)}
        if last.finish_reason is not None:
            choice["stop_reason"] = last.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(token_ids)
            if first:
                choice["prompt_token_ids"] = list(self._prompt_token_ids(index))
        return choice

    def _logprobs(
        self,
        choice: int,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        prompt: Sequence[TokenLogprobs | None] | None,
    ) -> Json | None:
        """`prompt` is given where the prompt's own tokens come first in the text."""
        if self._body.logprobs is None:
            return None
        if choice not in self._legacy:
            self._legacy[choice] = LegacyLogprobs(
                self.names, self._body.logprobs, self._body.skip_special_tokens, self._echo(choice)
            )
        if self._body.echo and prompt is not None:
            token_ids, entries = (*self._prompt_token_ids(choice), *token_ids), (*prompt, *entries)
        return self._legacy[choice].rows(token_ids, entries)
