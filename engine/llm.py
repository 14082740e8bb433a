"""The offline API: `LLM.generate`, `.chat`, `.logits`, `.embed`, `.score`. Names and meanings follow vLLM's.

Knows the engine's front alone; the same engine serves HTTP.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from engine.config import EngineOptions, options_from_dict
from engine.errors import InvalidParam, OctavoError, QueueFull
from engine.executables import Report
from engine.logits import TokenLogits
from engine.loop import Engine
from engine.pooling.engine import PoolingEngine
from engine.pooling.offline import (
    EmbeddingRequestOutput,
    ScoringRequestOutput,
    embed_texts,
    score_pairs,
)
from engine.request import FinishReason, Request, SamplingParams, TextDelta, TokenLogprobs
from engine.start import load_any_engine

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


@dataclass
class CompletionOutput:
    """One choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """One prompt with its choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False

    def add(self, deltas: Iterable[TextDelta]) -> None:
        """Fold in what the engine sent. Raises OctavoError when it failed the request."""
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise OctavoError(f"request {self.request_id}: {delta.error}")
            out = self.outputs[delta.index]
            out.text += delta.text
            out.token_ids += delta.token_ids
            if delta.logprobs is not None:
                out.logprobs = [*(out.logprobs or ()), *delta.logprobs]
                out.cumulative_logprob = sum(item.logprob for item in out.logprobs)
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs = list(delta.prompt_logprobs)
            if delta.finish_reason is not None:
                out.finish_reason, out.stop_reason = str(delta.finish_reason), delta.stop_reason
            self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.finished = all(out.finish_reason is not None for out in self.outputs)


class LLM:
    """A model in this process. Options are the fields of `EngineOptions`; an unknown one is an error.

    >>> llm = LLM("smollm2-135m-instruct")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str | None = None, *, report: Report = lambda phase, done, of: None, **options: Any):
        if model is not None:
            options["model"] = model
        self._engine = load_any_engine(options_from_dict(EngineOptions, options), report).start()
        self._ids = itertools.count()
        self._logits: TokenLogits | None = None

    @property
    def engine(self) -> Engine:
        """The engine that generates. Raises InvalidParam when the model embeds or scores."""
        if isinstance(self._engine, PoolingEngine):
            raise InvalidParam("model", f"{self._engine.model_name} does not generate: see LLM.embed and LLM.score")
        return self._engine

    @property
    def pooling_engine(self) -> PoolingEngine:
        """The engine that embeds or scores. Raises InvalidParam when the model generates."""
        if isinstance(self._engine, Engine):
            raise InvalidParam("model", f"{self._engine.model_name} generates; task='embed' would embed with it")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: text, token ids, or {"prompt": ...} / {"prompt_token_ids": ...}; results in order."""
        listed = _as_list(prompts)
        params = _per_prompt(sampling_params, len(listed))
        return self._run([self._request(prompt, p) for prompt, p in zip(listed, params, strict=True)])

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = _per_prompt(sampling_params, len(chats))
        tokenizer = self._tokenizer()
        requests = []
        for chat, p in zip(chats, params, strict=True):
            text = tokenizer.render_chat(chat, **template)  # type: ignore[arg-type]
            ids = tokenizer.encode(text, add_special_tokens=False)
            requests.append((self._new_request(ids, p), text))
        return self._run(requests)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each text (or token ids), float32, in order.

        dimensions: cut to so many numbers, for models that were trained for it. normalize: to length one
        (default: as the model does). truncate_prompt_tokens: cut longer texts (-1: to what the model takes)
        instead of refusing them.
        """
        listed = [_plain(prompt) for prompt in _as_list(prompts)]
        return embed_texts(self.pooling_engine, listed, dimensions, normalize, truncate_prompt_tokens)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well text_2 fits text_1, one against each or pair by pair: a cross-encoder's score, else the cosine."""
        first, second = ([text] if isinstance(text, str) else list(text) for text in (text_1, text_2))
        return score_pairs(self.pooling_engine, first, second, truncate_prompt_tokens)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [tokens, vocab]: what the model says after each token, through the paged prefill path."""
        if self._logits is None:
            self._logits = TokenLogits(self.engine)
        return self._logits(token_ids)

    def reshard(self, sharding: str) -> None:
        """Cut the model over the devices by another sharding file or name; running requests go on afterwards.

        Raises InvalidParam and CapacityError, and then nothing has changed.
        """
        self.engine.reshard(sharding)
        self._logits = None

    def shutdown(self) -> None:
        self._engine.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[Request, str | None]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown:
                raise InvalidParam("prompt", f"has unknown keys {sorted(unknown)}")
            salt = str(prompt.get("cache_salt") or "")
            given = prompt.get("prompt_token_ids", prompt.get("prompt"))
            if given is None:
                raise InvalidParam("prompt", "needs prompt or prompt_token_ids")
            prompt = given
        else:
            salt = ""
        if isinstance(prompt, str):
            return self._new_request(self._tokenizer().encode(prompt), params, salt), prompt
        return self._new_request(prompt, params, salt), None  # type: ignore[arg-type]

    def _new_request(self, token_ids: Sequence[int], params: SamplingParams, salt: str = "") -> Request:
        return Request(
            request_id=f"offline-{next(self._ids)}",
            prompt_token_ids=tuple(token_ids),
            params=params,
            end_token_ids=self.engine.end_token_ids,
            banned_token_ids=tuple(t for word in params.bad_words for t in self._tokenizer().single_tokens(word)),
            cache_salt=salt,
        )

    def _run(self, requests: Sequence[tuple[Request, str | None]]) -> list[RequestOutput]:
        """Submit all, as fast as the queue takes them; wait for all."""
        results = [
            RequestOutput(
                r.request_id, text, list(r.prompt_token_ids), [CompletionOutput(i) for i in range(r.params.n)]
            )
            for r, text in requests
        ]
        inbox: queue.SimpleQueue[tuple[RequestOutput, list[TextDelta]]] = queue.SimpleQueue()
        waiting = 0
        try:
            for (request, _), result in zip(requests, results, strict=True):
                while not self._submit(request, lambda deltas, result=result: inbox.put((result, deltas)), waiting):
                    waiting -= _absorb(inbox.get())
                waiting += 1
            while waiting:
                waiting -= _absorb(inbox.get())
        except BaseException:
            for request, _ in requests:
                self.engine.abort(request.request_id)
            raise
        return results

    def _submit(self, request: Request, sink: Any, waiting: int) -> bool:
        """False when the queue is full, and one of the `waiting` requests must end first."""
        try:
            self.engine.submit(request, sink)
        except QueueFull:
            if not waiting:
                raise
            return False
        return True

    def _tokenizer(self) -> Any:
        if self.engine.tokenizer is None:
            raise InvalidParam("prompt", "is text, but the engine has no tokenizer (skip_tokenizer_init)")
        return self.engine.tokenizer


def _absorb(item: tuple[RequestOutput, list[TextDelta]]) -> int:
    result, deltas = item
    result.add(deltas)
    return int(result.finished)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    return [items] if items and all(isinstance(item, (int, np.integer)) for item in items) else items  # type: ignore[list-item,return-value]


def _plain(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
        raise InvalidParam("prompt", "needs prompt or prompt_token_ids, and nothing else")
    return next(iter(prompt.values()))


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidParam("sampling_params", f"{len(params)} given for {count} prompts")
    return list(params)
