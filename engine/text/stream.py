"""`TextStream`: the token events of one choice become text, as early as it is certain.

Owns stop strings. Knows nothing about requests on the wire, and never raises on any token ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.request import FinishReason, SamplingParams, TextDelta, TokenEvent, TokenLogprobs, made
from engine.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopStrings:
    """Finds the first of some strings in a text that arrives in pieces.

    First is the one that ends first (the model could have been stopped there), at equal ends the
    one that starts first; so the result does not depend on how the text was cut into pieces.
    Text is held back only while it may still become a stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include  # keep the stop string itself in the text
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, *, check: bool = True) -> str:
        """The text that is now certain. With `check=False` no stop string may end inside `text`."""
        text, num_old = self._held + text, len(self._held)
        cut = self._find(text, num_old) if check else None
        if cut is not None:
            self._held = ""
            return text[:cut]
        certain = min(self._maybe_from(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, num_old: int) -> int | None:
        """Where to cut `text`, if a stop string ends in text[num_old:]; sets `found`."""
        matches = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        end, start, self.found = min(matches)
        return end if self._include else start

    @staticmethod
    def _maybe_from(text: str, stop: str) -> int:
        """Start of the longest end of `text` that is a proper beginning of `stop`; len(text) if none."""
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[0], start + 1)
        return start if start >= 0 else len(text)


class TextStream:
    """One choice of one request. Not thread-safe; the loop thread owns it.

    The deltas' texts, joined, equal `Tokenizer.decode` of the output tokens, cut at the first stop
    string. `tokenizer` None, or detokenize=False, gives empty text.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._stops: StopStrings | None = None
        self._num_tokens = 0
        self._smooth = False  # the next tokens' texts may simply be joined
        self.stopped = False  # a stop string was found: the choice is over
        if tokenizer is None or not params.detokenize:
            self._get = None
            return
        pieces = tokenizer.pieces
        self._get = (pieces.plain if params.skip_special_tokens else pieces.all).get
        self._text_of = pieces.texts(params.skip_special_tokens).__getitem__
        self._utf8 = _Utf8Decoder("replace")
        # A decoder that drops the first space of a text does so in the prompt, if that has any text.
        self._drop_space = pieces.leading_space and not any(map(self._get, prompt_token_ids))
        if params.stop:
            self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._smooth = self._is_smooth()

    def push(self, event: TokenEvent) -> TextDelta:
        """The event with its text. After `stopped`, later events give empty deltas.

        Tokens after the one that completes a stop string are cut as the text is, so that a result
        does not depend on how many tokens came in one event.
        """
        request_id, index, token_ids, num_cached, logprobs, prompt_logprobs, finish_reason, _, _ = event
        if self._smooth and finish_reason is None:
            text = self._text_of(token_ids[0]) if len(token_ids) == 1 else self._joined(token_ids)
            if text is not None:
                shown = (request_id, index, text, token_ids, num_cached, logprobs, prompt_logprobs, None, None, None)
                return made(TextDelta, shown)
        return self._push_rough(event)

    def _joined(self, token_ids: tuple[int, ...]) -> str | None:
        """Their texts; None where one is a part of a character."""
        try:
            return "".join(map(self._text_of, token_ids))  # type: ignore[arg-type]
        except TypeError:
            return None

    def _push_rough(self, event: TokenEvent) -> TextDelta:
        """Of any event and state."""
        if self.stopped:
            return TextDelta(request_id=event.request_id, index=event.index)
        token_ids, logprobs = event.token_ids, event.logprobs
        text = ""
        if self._get is not None:
            visible = self._visible(event)
            if self._stops is None:
                text = self._decode(visible, final=event.finish_reason is not None)
            else:
                text, num_used = self._decode_until_stop(self._stops, visible, event.finish_reason is not None)
                if self.stopped:
                    token_ids, logprobs = token_ids[:num_used], _head(logprobs, num_used)
        return self._delta(event, text, token_ids, logprobs)

    def _visible(self, event: TokenEvent) -> tuple[int, ...]:
        """The tokens that make text: not the one that ended the choice, unless it is asked for."""
        hides_end = event.finish_reason == FinishReason.STOP and event.stop_token_id is not None
        if hides_end and not self._params.include_stop_str_in_output:
            return event.token_ids[:-1]
        return event.token_ids

    def _decode(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Text whose last character is complete (or nothing more will come)."""
        get = self._get
        if get is None:
            return ""
        text = self._utf8.decode(b"".join([get(token, b"") for token in token_ids]), final)
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        self._smooth = self._is_smooth()
        return text

    def _is_smooth(self) -> bool:
        return self._stops is None and not self._drop_space and not self._utf8.getstate()[0]

    def _decode_until_stop(self, stops: StopStrings, token_ids: Sequence[int], final: bool) -> tuple[str, int]:
        """Text, and how many tokens it took when a stop string ended it."""
        parts: list[str] = []
        for num_used, token in enumerate(token_ids, start=1):
            self._num_tokens += 1
            parts.append(stops.feed(self._decode((token,)), check=self._num_tokens > self._params.min_tokens))
            if stops.found is not None:
                self.stopped = True
                return "".join(parts), num_used
        if final:
            parts += (stops.feed(self._decode((), final=True), check=False), stops.flush())
        return "".join(parts), len(token_ids)

    def _delta(
        self,
        event: TokenEvent,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> TextDelta:
        finish_reason, stop_reason = event.finish_reason, None
        if self.stopped and self._stops is not None:
            finish_reason, stop_reason = FinishReason.STOP, self._stops.found
        elif event.stop_token_id is not None and event.stop_token_id in self._params.stop_token_ids:
            stop_reason = event.stop_token_id
        return TextDelta(
            request_id=event.request_id,
            index=event.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=event.num_cached_tokens,
            error=event.error if not self.stopped else None,
        )


def _head(logprobs: tuple[TokenLogprobs, ...] | None, count: int) -> tuple[TokenLogprobs, ...] | None:
    return None if logprobs is None else logprobs[:count]
