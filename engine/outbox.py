"""Admitted requests and where their news goes: token events in, text deltas out to sinks.

Used by the loop's thread alone. A fault in one request's text or sink stays with that request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.request import FinishReason, Request, TextDelta, TokenEvent
from engine.text import TextStream, Tokenizer

Sink = Callable[[list[TextDelta]], None]
log = logging.getLogger("octavo.engine")
INTERNAL_ERROR = "the engine failed this request"


@dataclass
class Live:
    """An admitted request: where its deltas go, and the text state of each choice still open."""

    request: Request
    sink: Sink
    streams: dict[int, TextStream]
    news: list[TextDelta] = field(default_factory=list)  # of this step, not sent yet


class Outbox:
    """`end(request_id, index)` tells the scheduler that a choice is over before its tokens are."""

    def __init__(self, end: Callable[[str, int], None]) -> None:
        self._end = end
        self._live: dict[str, Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def ids(self) -> list[str]:
        return list(self._live)

    def open(self, request: Request, sink: Sink, tokenizer: Tokenizer | None) -> None:
        params = request.params
        tokenizer = tokenizer if params.detokenize else None
        streams = {i: TextStream(tokenizer, params, request.prompt_token_ids) for i in range(params.n)}
        self._live[request.request_id] = Live(request, sink, streams)

    def deliver(self, events: Iterable[TokenEvent]) -> None:
        """One sink call a request; a stop string ends its choice here."""
        self.send(self.translate(events))

    def translate(self, events: Iterable[TokenEvent]) -> list[Live]:
        """Those that have news. A stop string or a bug in detokenizing ends the choice alone."""
        told = []
        for event in events:
            live = self._live.get(event.request_id)
            stream = None if live is None else live.streams.get(event.index)
            if live is None or stream is None:
                continue
            try:
                delta = stream.push(event)
            except Exception:
                log.exception("text of request %s failed", event.request_id)
                delta = error_delta(event.request_id, event.index)
            if delta.finish_reason is not None:
                del live.streams[event.index]
                if event.finish_reason is None:
                    self._end(event.request_id, event.index)
            if not live.news:
                told.append(live)
            live.news.append(delta)
        return told

    def send(self, told: Iterable[Live]) -> None:
        """Their news to their sinks; who has heard the last of it is forgotten."""
        for live in told:
            deltas, live.news = live.news, []
            try:
                live.sink(deltas)
            except Exception:  # a client's sink must not reach the neighbours: nobody listens, so end it
                log.exception("the sink of request %s failed", live.request.request_id)
                for index in live.streams:
                    self._end(live.request.request_id, index)
                live.streams.clear()
            if not live.streams:
                del self._live[live.request.request_id]

    def fail_all(self, message: str) -> None:
        """Every choice still open ends with an error."""
        lives = list(self._live.values())
        for live in lives:
            live.news = [error_delta(live.request.request_id, i, message) for i in live.streams]
            live.streams.clear()
        self.send(lives)


def error_delta(request_id: str, index: int, message: str = INTERNAL_ERROR) -> TextDelta:
    return TextDelta(request_id=request_id, index=index, finish_reason=FinishReason.ERROR, error=message)
