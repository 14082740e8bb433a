"""A device in plain Python for the scheduler and the loop: pages of tokens instead of KV, a formula as model.

Every token is a function of the tokens that the sequence's pages hold at that moment, so a
wrong page, slot or position gives other tokens. Checks of each plan what a program's shape demands.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from engine.batch import StepKey
from engine.config import EngineConfig
from engine.pages import TRASH_PAGE
from engine.plan import DecodeResult, DecodeRow, PrefillRow, PromptLogprobs, RowResult, StepPlan, StepResult
from engine.request import MAX_LOGPROBS, Request, SamplingParams
from engine.sequence import Sequence, stop_token_ids
from pallas_kernels.target import CPU

VOCAB = 251
CONFIG = EngineConfig(
    dtype="float32",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_prefill_rows=3,
    kv_cache_dtype="float32",
    quantization=None,
    target=CPU,
    page_size=4,
    num_pages=33,
    decode_steps=3,
    token_buckets=(16,),
    prefill_decode_buckets=(0, 4),
    decode_buckets=(2, 4),
    enable_prefix_caching=True,
    overlap=False,
    max_queued_requests=1000,
    seed=0,
)


def config(**changes: object) -> EngineConfig:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


def request(
    name: str, prompt: int | Tokens[int], *, end: tuple[int, ...] = (), salt: str = "", **params: object
) -> Request:
    """A request; a prompt given as a number of tokens is made of tokens that belong to its name."""
    if isinstance(prompt, int):
        prompt = [zlib.crc32(f"{name} {i}".encode()) % VOCAB for i in range(prompt)]
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),  # type: ignore[arg-type]
        end_token_ids=end,
        cache_salt=salt,
    )


def next_token(tokens: Tokens[int], seed: int) -> int:
    """The model."""
    return zlib.crc32(np.asarray(tokens, np.int64).tobytes(), seed & 0xFFFFFFFF) % VOCAB


def prompt_logprob(token: int, position: int) -> float:
    return -position - token / 1024


def expected_tokens(request: Request, seed: int, max_model_len: int = CONFIG.max_model_len) -> list[int]:
    """What a choice must come to, without pages, steps or batches."""
    params, tokens = request.params, list(request.prompt_token_ids)
    limit = max_model_len if params.max_tokens is None else len(tokens) + params.max_tokens
    while len(tokens) < limit:
        tokens.append(next_token(tokens, seed))
        num_output = len(tokens) - len(request.prompt_token_ids)
        if tokens[-1] in stop_token_ids(request) and num_output > params.min_tokens:
            break
    return tokens[len(request.prompt_token_ids) :]


@dataclass
class Slot:
    """What the device knows of a running sequence."""

    table: list[int] = field(default_factory=list)
    last_token: int = -1
    position: int = -1
    active: bool = False


KEY = StepKey(0, 8)  # of every program


@dataclass
class FakePending:
    plan: StepPlan
    step: StepResult | Exception
    key: StepKey = KEY

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult:
        if isinstance(self.step, Exception):
            raise self.step
        return self.step


class FakeRunner:
    """A `StepRunner`. Steps happen at launch, in launch order, as on a device."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.plans: list[StepPlan] = []
        self.num_resets = 0
        self.faulty: set[str] = set()  # ids of requests whose numbers are not finite
        self.fail_launch: set[int] = set()  # steps whose launch raises
        self.fail_result: set[int] = set()  # steps whose result raises
        self.fail_reset = False
        self.reset()
        self.num_resets = 0

    def reset(self) -> None:
        if self.fail_reset:
            raise RuntimeError("the device is gone")
        self.num_resets += 1
        self.pages = np.full((self.config.num_pages, self.config.page_size), -1, np.int64)
        self.states: dict[int, list[int]] = {}  # row of the state pool -> the tokens that made the state
        self.slots = [Slot() for _ in range(self.config.max_num_seqs)]

    def launch(self, plan: StepPlan) -> FakePending:
        number = len(self.plans)
        self.plans.append(plan)
        if number in self.fail_launch:
            raise RuntimeError("launch failed")
        check_plan(self.config, plan)
        sources = [list(self.states[row.state.source]) if row.state and row.state.source >= 0 else []
                   for row in plan.prefill_rows]  # fmt: skip
        for row, state in zip(plan.prefill_rows, sources, strict=True):  # all were read before one is written
            self._keep_states(row, state)
        prefill = tuple(self._prefill(row) for row in plan.prefill_rows)
        decode = columns([self._decode(row) for row in plan.decode_rows])
        prompt = tuple(_prompt_logprobs(row) if row.wants_prompt_logprobs else None for row in plan.prefill_rows)
        if number in self.fail_result:
            return FakePending(plan, RuntimeError("step failed"))
        return FakePending(plan, StepResult(prefill, decode, prompt))

    def _keep_states(self, row: PrefillRow, state: list[int]) -> None:
        if row.state is None:
            return
        if len(state) != row.start:
            raise AssertionError(f"a chunk from {row.start} continues a state of {len(state)} tokens")
        state = state + row.seq.token_ids[row.start : row.start + row.count]
        self.states[row.seq.slot] = state
        if row.state.copy_to >= 0:
            self.states[row.state.copy_to] = state[: row.start + row.state.copy_at]

    def _prefill(self, row: PrefillRow) -> RowResult:
        seq = row.seq
        slot = self.slots[seq.slot] = Slot(table=list(seq.pages))
        for position in range(row.start, row.start + row.count):
            self._write(slot, position, seq.token_ids[position])
        if not row.samples:
            return self._result(seq, [])
        return self._result(seq, [self._draw(slot, seq, row.start + row.count)])

    def _decode(self, row: DecodeRow) -> RowResult:
        slot = self.slots[row.seq.slot]
        if row.new_pages:
            slot.table[row.first_new_page :] = row.new_pages
        drawn: list[int] = []
        if slot.active and slot.position != row.start:
            raise AssertionError(f"host decodes from {row.start}, device from {slot.position}")
        while slot.active and len(drawn) < row.count:
            self._write(slot, slot.position, slot.last_token)
            if self.config.checkpoint_rows is not None:
                self.states[row.seq.slot].append(slot.last_token)
            if row.state is not None and len(drawn) + 1 == row.state.copy_at:
                self.states[row.state.copy_to] = list(self.states[row.seq.slot])
            drawn.append(self._draw(slot, row.seq, slot.position + 1))
        return self._result(row.seq, drawn)

    def _write(self, slot: Slot, position: int, token: int) -> None:
        page = slot.table[position // self.config.page_size]
        if page == TRASH_PAGE:
            raise AssertionError("a sequence writes to the trash page")
        self.pages[page, position % self.config.page_size] = token

    def _draw(self, slot: Slot, seq: Sequence, length: int) -> int:
        tokens = self.pages[slot.table].reshape(-1)[:length].tolist()
        if self.config.checkpoint_rows is not None and self.states[seq.slot] != tokens:
            raise AssertionError("the state is not that of the tokens in the pages")
        token = next_token(tokens, seq.seed)
        slot.last_token, slot.position = token, length
        stops = token in seq.stop_ids and length >= seq.prompt_len + seq.request.params.min_tokens
        slot.active = not stops and length + 1 < seq.max_total_len
        return token

    def _result(self, seq: Sequence, drawn: list[int]) -> RowResult:
        count = len(drawn)
        top = np.zeros((count, MAX_LOGPROBS))
        faulty = bool(drawn) and seq.request.request_id in self.faulty
        return RowResult(np.asarray(drawn, np.int32), -np.asarray(drawn, np.float32), top.astype(int), top, faulty)


def columns(rows: Tokens[RowResult]) -> DecodeResult:
    """As wide as the longest, and a column of noise behind it."""
    counts = [len(row.token_ids) for row in rows]
    shape = len(rows), max(counts, default=0) + 1
    made = DecodeResult(
        tokens=np.full(shape, VOCAB - 1, np.int32),
        num_drawn=np.asarray(counts, np.int32),
        faulty=np.asarray([row.faulty for row in rows], bool),
        logprobs=np.full(shape, np.nan, np.float32),
        top_ids=np.zeros((*shape, MAX_LOGPROBS), np.int32),
        top_logprobs=np.full((*shape, MAX_LOGPROBS), np.nan),
    )
    for i, row in enumerate(rows):
        made.tokens[i, : counts[i]] = row.token_ids
        made.logprobs[i, : counts[i]] = row.logprobs
        made.top_ids[i, : counts[i]] = row.top_ids
        made.top_logprobs[i, : counts[i]] = row.top_logprobs
    return made


def check_plan(config: EngineConfig, plan: StepPlan) -> None:
    """What the compiled programs can hold."""
    slots = [row.seq.slot for row in chain(plan.prefill_rows, plan.decode_rows)]
    if len(set(slots)) != len(slots) or not all(0 <= slot < config.max_num_seqs for slot in slots):
        raise AssertionError(f"slots {slots}")
    if len(plan.prefill_rows) > config.max_prefill_rows or plan.num_prefill_tokens > config.max_num_batched_tokens:
        raise AssertionError(f"{len(plan.prefill_rows)} rows of {plan.num_prefill_tokens} tokens in one step")
    if any(row.count < 1 for row in chain(plan.prefill_rows, plan.decode_rows)):
        raise AssertionError("an empty row")
    if any((row.state is None) != (config.checkpoint_rows is None) for row in plan.prefill_rows):
        raise AssertionError("states move for models that have them, and only for those")
    rows = (*plan.prefill_rows, *plan.decode_rows)
    copies = [row.state.copy_to for row in rows if row.state and row.state.copy_to >= 0]
    if len(set(copies)) != len(copies) or not set(copies) <= set(config.checkpoint_rows or ()):
        raise AssertionError(f"copies to rows {copies} of the checkpoints {config.checkpoint_rows}")
    for row in rows:
        at = row.state.copy_at if row.state and row.state.copy_to >= 0 else None
        if at is not None and (not 0 < at <= row.count or (row.start + at) % config.page_size):
            raise AssertionError(f"a copy after {at} of {row.count} tokens from {row.start}")
    steps = 1 if plan.prefill_rows else config.most_steps(plan.drafts)
    new_pages = -(-steps // config.page_size)
    for row in plan.decode_rows:
        if row.count > steps or len(row.new_pages) > new_pages:
            raise AssertionError(f"{row.count} tokens and {len(row.new_pages)} new pages in a step of {steps}")


def _prompt_logprobs(row: PrefillRow) -> PromptLogprobs:
    tokens = [*row.seq.token_ids, -1][row.start + 1 : row.start + row.count + 1]
    values = [prompt_logprob(token, row.start + 1 + i) for i, token in enumerate(tokens)]
    ids = np.tile(np.arange(MAX_LOGPROBS), (row.count, 1))
    return PromptLogprobs(np.asarray(values), ids, -ids.astype(float))
