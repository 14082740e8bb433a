"""What a request is, from admission to its one ending.

Knows nothing about HTTP, text or devices: token ids in, token events out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NamedTuple

from engine.errors import InvalidParam

MAX_LOGPROBS = 20  # alternatives a position; the width of the device's top-k buffer
MAX_STOP_IDS = 32  # device slots for stop tokens, the model's own end tokens included
MAX_LOGIT_BIAS = 300
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024


class FinishReason(StrEnum):
    STOP = "stop"  # end token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # the engine failed this request


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. Names, meanings and defaults follow vLLM's `SamplingParams`.

    Raises `InvalidParam` (a ValueError that names the field) on construction.
    """

    n: int = 1
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context allows
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives besides the sampled token; 0 gives it alone
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()  # words of one token each; resolved by the tokenizer
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("stop", str), ("bad_words", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            items = (value,) if isinstance(value, kind) else tuple(value or ())
            if not all(isinstance(item, kind) for item in items):
                raise InvalidParam(name, f"must hold {kind.__name__} items")
            object.__setattr__(self, name, items)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise InvalidParam("allowed_token_ids", "must not be empty")
        _check_ranges(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, MAX_N),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-3, 1e3),
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (0, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


def _check_ranges(params: SamplingParams) -> None:
    integer = {f.name for f in fields(params) if str(f.type).startswith("int")}
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        kinds = int if name in integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise InvalidParam(name, f"must be {'an integer' if name in integer else 'a number'}, got {value!r}")
        if not math.isfinite(value) or not low <= value <= high:
            raise InvalidParam(name, f"must be between {low} and {high}, got {value}")
    if params.top_p == 0.0:
        raise InvalidParam("top_p", "must be above 0")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidParam("min_tokens", f"{params.min_tokens} is more than max_tokens {params.max_tokens}")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidParam("stop", f"at most {MAX_STOP_STRINGS} stop strings")
    for text in params.stop:
        if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            raise InvalidParam("stop", f"a stop string has 1 to {MAX_STOP_STRING_CHARS} characters")
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidParam("logit_bias", f"at most {MAX_LOGIT_BIAS} tokens")
    for token, bias in params.logit_bias.items():
        if isinstance(token, bool) or not isinstance(token, int):
            raise InvalidParam("logit_bias", f"keys must be token ids, got {token!r}")
        if not (isinstance(bias, (int, float)) and -100.0 <= bias <= 100.0):
            raise InvalidParam("logit_bias", f"values must be between -100 and 100, got {bias!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, fully tokenized and validated, with `params.n` choices to generate."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    end_token_ids: tuple[int, ...] = ()  # the model's own end-of-turn tokens
    banned_token_ids: tuple[int, ...] = ()  # `params.bad_words`, resolved
    cache_salt: str = ""  # namespace of the prefix cache
    arrival_time_s: float = 0.0  # on the engine's clock


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the chosen token and the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[Logprob, ...] = ()


# made(TokenEvent, its fields in order), all of them: a named tuple's own constructor takes twice as long, and two are
# made a sequence and step.
made = tuple.__new__


class TokenEvent(NamedTuple):
    """New tokens of one choice, and its ending if this was the last of them. One is made a sequence and step."""

    request_id: str
    index: int  # choice, 0 <= index < n
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one a token, when asked for
    # On the first event of choice 0, when asked for; entry 0 is None (nothing predicts it).
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop or end token that ended it (it is in token_ids)
    error: str | None = None  # set when finish_reason is ERROR


class TextDelta(NamedTuple):
    """A `TokenEvent` with its text: what clients see. The fields mean the same.

    `text` holds only characters that no later token can change; a stop string and what
    follows it are cut. The last delta of a choice carries `finish_reason`.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id; None at an end token
    error: str | None = None
