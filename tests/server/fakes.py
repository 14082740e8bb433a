"""An engine and a tokenizer whose every answer can be worked out by hand.

Tokens are bytes. A prompt that begins with "=" is answered with its own rest, then the end
token; any other with letters: choice i's token p is the letter number (sum of ids + p + 3 i) mod 26.
"""

from __future__ import annotations

import codecs
import threading
from dataclasses import dataclass, field

import numpy as np

from engine.config import EngineConfig
from engine.errors import CapacityError, ContextOverflow, EngineStopped, InvalidParam, QueueFull
from engine.request import FinishReason, Logprob, Request, TextDelta, TokenLogprobs
from engine.stats import EngineStats
from pallas_kernels.target import CPU
from server.lifecycle import Sink

BOS, END, VOCAB = 256, 257, 260
SPECIAL = {BOS: "<s>", END: "<end>", 258: "<a>", 259: "<b>"}
MINUS_INFINITY = float("-inf")

CONFIG = EngineConfig(
    dtype="float32", max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=256, max_prefill_rows=4, page_size=16,
    kv_cache_dtype="float32", quantization=None, target=CPU,
    num_pages=1024, decode_steps=1, token_buckets=(256,), prefill_decode_buckets=(0, 8), decode_buckets=(8,),
    enable_prefix_caching=True, overlap=False, max_queued_requests=64, seed=0,
)  # fmt: skip


class ByteTokenizer:
    vocab_size = VOCAB
    bos_token_id = BOS
    special_tokens = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[END]}  # noqa: RUF012 - read only

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        parts = [b"" if skip_special_tokens and i in SPECIAL else self.token_bytes(i) for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL[token_id].encode() if token_id in SPECIAL else bytes([token_id])

    def token_str(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def single_tokens(self, word: str) -> tuple[int, ...]:
        if len(word.encode()) != 1:
            raise InvalidParam("bad_words", f"{word!r} is more than one token")
        return tuple(word.encode())

    def render_chat(self, messages, add_generation_prompt=True, continue_final_message=False, tools=None, **kwargs):
        if kwargs.keys() - {"enable_thinking"}:
            raise InvalidParam("chat_template_kwargs", "unknown to the template")
        last = messages[-1]["content"]
        return last if last.startswith("=") else "".join(f"{m['role']}:{m['content']};" for m in messages)


def output_ids(prompt: tuple[int, ...], count: int, index: int = 0) -> list[int]:
    """The formula of the docstring above, for the letters."""
    return [97 + (sum(prompt) + p + 3 * index) % 26 for p in range(count)]


def token_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The chosen token is the best; the fifth alternative is impossible."""
    best = -token_id / 128
    top = [Logprob((token_id + j) % 256, MINUS_INFINITY if j == 4 else best - j) for j in range(num_top)]
    return TokenLogprobs(token_id, best, tuple(top))


@dataclass
class _Row:
    request: Request
    sink: Sink
    index: int
    ids: list[int]
    limit: int
    emitted: int = 0
    text: str = ""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


class FakeEngine:
    """One token a choice and step, in a thread. `gate.clear()` stops time; `kill` is a crash."""

    def __init__(self, config: EngineConfig = CONFIG, tokenizer: ByteTokenizer | None = None, pace_s: float = 0.0):
        self.config = config
        self.tokenizer = tokenizer
        self.model_name = "fake-model"
        self.task = "generate"
        self.vocab_size = VOCAB
        self.end_token_ids = (END,)
        self.failure: str | None = None
        self.pace_s = pace_s
        self.gate = threading.Event()
        self.gate.set()
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.resharded: list[str] = []
        self._rows: list[_Row] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reshard(self, sharding: str) -> None:
        if sharding == "huge":
            raise CapacityError("no room")
        if sharding != "tp":
            raise InvalidParam("sharding", "no such file")
        self.resharded.append(sharding)

    def submit(self, request: Request, sink: Sink) -> None:
        with self._changed:
            if self._stopped or self.failure:
                raise EngineStopped("stopped")
            room = self.config.max_model_len - len(request.prompt_token_ids)
            wanted = request.params.max_tokens
            if room < (1 if wanted is None else wanted):
                raise ContextOverflow("prompt", f"has {len(request.prompt_token_ids)} tokens")
            self._check_ids(request)
            if len(self._rows) + request.params.n > self.config.max_queued_requests:
                raise QueueFull("the queue is full", 3.0)
            self.submitted.append(request)
            limit = room if wanted is None else wanted
            for index in range(request.params.n):
                prompt = request.prompt_token_ids
                echo = [*prompt[1:], END] if prompt[0] == ord("=") else output_ids(prompt, limit, index)
                self._rows.append(_Row(request, sink, index, echo, limit))
            self._changed.notify_all()

    def _check_ids(self, request: Request) -> None:
        params = request.params
        named = {"prompt": request.prompt_token_ids, "stop_token_ids": params.stop_token_ids}
        named |= {"logit_bias": tuple(params.logit_bias), "allowed_token_ids": params.allowed_token_ids or ()}
        for name, ids in named.items():
            if ids and not (min(ids) >= 0 and max(ids) < VOCAB):
                raise InvalidParam(name, f"token ids must be below {VOCAB}")

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            gone = [row for row in self._rows if row.request.request_id == request_id]
            self._rows = [row for row in self._rows if row not in gone]
            for row in gone:
                row.sink([TextDelta(request_id=request_id, index=row.index, finish_reason=FinishReason.ABORT)])

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.gate.set()
        self._thread.join(5)

    def kill(self) -> None:
        self.failure = "the loop crashed"
        self.stop()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._rows), num_waiting=2, kv_usage=0.25, num_preemptions=3, prefix_queries_tokens=100,
            prefix_hits_tokens=40, prompt_tokens=sum(len(r.prompt_token_ids) for r in self.submitted),
            generation_tokens=7, compiles=5, compile_s=1.5, compiles_after_ready=0,
            steps={"decode_8": 11}, step_s={"decode_8": 2.5}, phase_s={"plan": 0.5},
            flops=4e9, memory_bytes=5e9,
            tokens_used=90, tokens_padded=10, last_step_age_s=0.0, expert_tokens=np.array([[1, 3], [5, 5]]),
        )  # fmt: skip

    @property
    def num_running(self) -> int:
        return len(self._rows)

    def _run(self) -> None:
        while True:
            self.gate.wait()
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._stopped)
                if self._stopped:
                    return
                if self.gate.is_set():
                    self._step()
            if self.pace_s:
                threading.Event().wait(self.pace_s)

    def _step(self) -> None:
        by_request: dict[str, list[TextDelta]] = {}
        sinks = {row.request.request_id: row.sink for row in self._rows}
        for row in list(self._rows):
            delta = self._advance(row)
            by_request.setdefault(row.request.request_id, []).append(delta)
            if delta.finish_reason is not None:
                self._rows.remove(row)
        for request_id, deltas in by_request.items():
            sinks[request_id](deltas)

    def _advance(self, row: _Row) -> TextDelta:
        params, prompt = row.request.params, row.request.prompt_token_ids
        cached = len(prompt) - 1 if row.index else len(prompt) // 2
        first = TextDelta(request_id=row.request.request_id, index=row.index, num_cached_tokens=cached)
        if row.emitted == 0 and row.index == 0 and params.prompt_logprobs is not None:
            scored = [token_logprobs(t, params.prompt_logprobs) for t in prompt[1:]]
            first = first._replace(prompt_logprobs=(None, *scored))
        if row.limit == 0:
            return first._replace(finish_reason=FinishReason.LENGTH)
        if row.emitted == 2 and b"FAULT" in bytes(t for t in prompt if t < 256):
            return first._replace(finish_reason=FinishReason.ERROR, error="secret detail at 0x7f00")
        token = row.ids[row.emitted]
        row.emitted += 1
        reason = FinishReason.STOP if token == END else FinishReason.LENGTH if row.emitted == row.limit else None
        text = "" if token in SPECIAL else row.decoder.decode(bytes([token]), final=reason is not None)
        stop = next((s for s in params.stop if s in row.text + text), None)
        if stop is not None:
            text, reason = (row.text + text).split(stop)[0][len(row.text) :], FinishReason.STOP
        row.text += text
        logprobs = (token_logprobs(token, params.logprobs),) if params.logprobs is not None else None
        return first._replace(text=text, token_ids=(token,), logprobs=logprobs, finish_reason=reason, stop_reason=stop)
