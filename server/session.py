"""From a checked request to the engine and back: text -> ids, submit, the deltas, abort.

`prepare_chat` and `prepare_completion` are the only ways from protocol to `Request`. Knows
nothing about the shape of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from engine.errors import InvalidParam
from engine.request import FinishReason, Request, SamplingParams, TextDelta
from server.errors import ApiError, engine_fault, shutting_down
from server.lifecycle import EngineHandle, Lifecycle, TextCodec
from server.metrics import ChoiceTimer, Metrics, observe_request
from server.protocol import COMPLETION_MAX_TOKENS, ChatRequest, CompletionRequest, Prompt, TokenizeRequest

log = logging.getLogger("octavo.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request made ready: what the engine gets, and what the answer needs to know."""

    body: ChatRequest | CompletionRequest
    requests: tuple[Request, ...]  # one a prompt; choice index = prompt * n + index
    echo: tuple[str, ...] = ()  # the prompts as text, when the answer repeats them
    arrival_s: float
    # The engine's word for a field -> the client's, where they differ.
    param_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        return self.body.n * len(self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)


def prepare_chat(engine: EngineHandle, body: ChatRequest, arrival_s: float) -> Work:
    """Slow for long texts: call it in a thread. Raises `InvalidParam`."""
    tokenizer = _tokenizer(engine, "messages")
    ids = tokenizer.encode(render(tokenizer, body), add_special_tokens=body.add_special_tokens)
    limit, names = body.max_tokens, {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        limit, names["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    requests = _requests(engine, body, body.sampling(limit), [tuple(ids)], "messages")
    return Work(body=body, requests=requests, arrival_s=arrival_s, param_names=names)


def prepare_completion(engine: EngineHandle, body: CompletionRequest, arrival_s: float) -> Work:
    """Slow for long texts: call it in a thread. Raises `InvalidParam`."""
    prompts = [_prompt_ids(engine, prompt, body.add_special_tokens) for prompt in body.prompt]
    echoed = body.logprobs if body.echo else None  # echo shows the prompt's logprobs, too
    wanted = {} if echoed is None else {"prompt_logprobs": max(echoed, body.prompt_logprobs or 0)}
    max_tokens = body.max_tokens
    if max_tokens is None:  # a default is no demand: near the end of the context it gives way
        room = engine.config.max_model_len - max(map(len, prompts))
        max_tokens = max(1, min(COMPLETION_MAX_TOKENS, room))
    params = body.sampling(max_tokens, **wanted)
    requests = _requests(engine, body, params, prompts, "prompt")
    pairs = zip(body.prompt, prompts, strict=True) if body.echo else ()
    echo = tuple(_prompt_text(engine, prompt, ids, params) for prompt, ids in pairs)
    return Work(body=body, requests=requests, echo=echo, arrival_s=arrival_s)


def render(tokenizer: TextCodec, body: ChatRequest | TokenizeRequest) -> str:
    """The messages as the model's template writes them. Raises `InvalidParam`."""
    add_prompt = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    return tokenizer.render_chat(
        [message.model_dump(exclude_none=True) for message in body.messages or ()],
        add_generation_prompt=add_prompt,
        continue_final_message=body.continue_final_message,
        **body.chat_template_kwargs,
    )


def check_budget(body: ChatRequest | CompletionRequest, max_choices: int) -> None:
    """Refuses a product of n and prompts that is too large, before anything is made of it."""
    num_prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
    if num_prompts * body.n > max_choices:
        name = "n" if body.n > 1 else "prompt"
        raise InvalidParam(name, f"{num_prompts} prompts times n {body.n} is more than {max_choices} choices")


def _tokenizer(engine: EngineHandle, param: str) -> TextCodec:
    if engine.tokenizer is None:
        raise InvalidParam(param, "this server has no tokenizer; send token ids to /v1/completions")
    return engine.tokenizer


def _prompt_ids(engine: EngineHandle, prompt: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(_tokenizer(engine, "prompt").encode(prompt, add_special_tokens=add_special_tokens))
    return prompt


def _prompt_text(engine: EngineHandle, prompt: Prompt, ids: tuple[int, ...], params: SamplingParams) -> str:
    if isinstance(prompt, str):
        return prompt
    if engine.tokenizer is None:
        return ""
    return engine.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)


def _requests(
    engine: EngineHandle,
    body: ChatRequest | CompletionRequest,
    params: SamplingParams,
    prompts: list[tuple[int, ...]],
    param: str,
) -> tuple[Request, ...]:
    for ids in prompts:
        if not ids:
            raise InvalidParam(param, "must not be empty")
        if max(ids) >= engine.vocab_size:  # the engine says so too, but `echo` decodes them before
            raise InvalidParam(param, f"token ids must be below {engine.vocab_size}")
    banned = {i for word in params.bad_words for i in _tokenizer(engine, "bad_words").single_tokens(word)}
    unique = uuid.uuid4().hex
    return tuple(
        Request(
            request_id=f"{unique}-{i}",
            prompt_token_ids=ids,
            params=params,
            end_token_ids=engine.end_token_ids,
            banned_token_ids=tuple(sorted(banned)),
            cache_salt=body.cache_salt or "",
            arrival_time_s=time.monotonic(),
        )
        for i, ids in enumerate(prompts)
    )


class Mailbox:
    """Carries deltas or vectors from the engine's thread to the event loop, one wake-up for a burst.

    A step of the engine may wake hundreds of streams: they get their mail by and by, so that others have their turn.
    """

    AT_ONCE = 32  # streams that write their frames before the loop looks at its timers and sockets again

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._items: deque[tuple[asyncio.Queue, list[Any]]] = deque()

    def put(self, queue: asyncio.Queue, deltas: list[Any]) -> None:
        """Called by the engine's thread. Never blocks or raises."""
        with self._lock:
            self._items.append((queue, deltas))
            is_first = len(self._items) == 1
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to listen
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            items = [self._items.popleft() for _ in range(min(self.AT_ONCE, len(self._items)))]
            if self._items:
                self._loop.call_soon(self._deliver)
        for queue, deltas in items:
            queue.put_nowait(deltas)


class ChoiceDelta(NamedTuple):
    choice: int  # index in the answer, over all prompts
    delta: TextDelta


class Session:
    """One HTTP request's stay in the engine: `open`, `next` until `done`, and always `close`."""

    def __init__(self, work: Work, lifecycle: Lifecycle, mailbox: Mailbox, metrics: Metrics) -> None:
        self.work = work
        self._engine = lifecycle.generating()
        self._lifecycle = lifecycle
        self._mailbox = mailbox
        self._metrics = metrics
        self._queue: asyncio.Queue[list[TextDelta] | ApiError] = asyncio.Queue()
        self._first_choice = {r.request_id: i * work.body.n for i, r in enumerate(work.requests)}
        self._running = {i: ChoiceTimer(metrics, work.arrival_s) for i in range(work.num_choices)}
        self._submitted: list[str] = []
        self._num_cached = dict.fromkeys(self._first_choice, 0)
        self._error: ApiError | None = None
        self.num_output_tokens = 0

    def open(self) -> None:
        """Submit every prompt or, if one is refused, none. Raises the engine's errors."""
        self._lifecycle.enter(self)
        try:
            for request in self.work.requests:
                self._engine.submit(request, partial(self._mailbox.put, self._queue))
                self._submitted.append(request.request_id)
        except Exception as error:
            self._running.clear()  # never admitted, so nothing to count as aborted
            self._abort()
            self._lifecycle.leave(self)
            if isinstance(error, InvalidParam):
                raise type(error)(self.work.param_names.get(error.param, error.param), error.message) from None
            raise
        for request in self.work.requests:
            observe_request(self._metrics, request)

    @property
    def done(self) -> bool:
        """Every choice has had its ending, and `next` has nothing more to say."""
        return not self._running and self._error is None

    @property
    def num_cached_tokens(self) -> int:
        return sum(self._num_cached.values())

    async def next(self, timeout_s: float) -> list[ChoiceDelta]:
        """All deltas that are there, waiting for the first; empty when none came in time.

        Raises `ApiError`, after the deltas before it, when the engine failed a choice or the
        server shuts down.
        """
        events: list[ChoiceDelta] = []
        if self._error is None:
            try:
                self._take(await asyncio.wait_for(self._queue.get(), timeout_s), events)
            except TimeoutError:
                return []
        while not self._queue.empty():
            self._take(self._queue.get_nowait(), events)
        if self._error is not None and not events:
            raise self._error
        return events

    def _take(self, item: list[TextDelta] | ApiError, events: list[ChoiceDelta]) -> None:
        if isinstance(item, ApiError):
            self._error = self._error or item
            return
        for delta in item:
            choice = self._first_choice[delta.request_id] + delta.index
            timer = self._running.get(choice)
            if timer is None or self._error is not None:
                continue  # it has had its ending
            timer.delta(delta)
            if delta.finish_reason is not None:
                del self._running[choice]
            self._error = _failure(delta)
            if delta.index == 0:  # the other choices of a prompt find what this one computed
                self._num_cached[delta.request_id] = delta.num_cached_tokens
            if self._error is None:
                self.num_output_tokens += len(delta.token_ids)
                events.append(ChoiceDelta(choice, delta))

    def fail(self, error: ApiError) -> None:
        self._queue.put_nowait(error)

    def close(self) -> None:
        """Free what still runs. Idempotent; every path out of a request ends here."""
        for timer in self._running.values():
            timer.end(FinishReason.ABORT)
        if self._running:
            self._abort()
        self._running.clear()
        self._lifecycle.leave(self)

    def _abort(self) -> None:
        for request_id in self._submitted:
            self._engine.abort(request_id)
        self._submitted.clear()


def _failure(delta: TextDelta) -> ApiError | None:
    if delta.finish_reason is FinishReason.ERROR:
        log.error("request %s failed in the engine: %s", delta.request_id, delta.error)
        return engine_fault()
    if delta.finish_reason is FinishReason.ABORT:  # not ours: the engine is being stopped
        return shutting_down()
    return None
