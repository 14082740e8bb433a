"""What one device step shall do, and what it did: the types between scheduler and runner.

A row is "count tokens from start". Knows no JAX; results are numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from engine.config import EngineConfig
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.batch import StepKey


@dataclass(frozen=True, slots=True)
class StateMove:
    """Where a row's recurrent state comes from, and the copy that is kept of it: rows of the state pool."""

    source: int  # -1: zeros
    copy_to: int = -1  # -1: no copy
    copy_at: int = 0  # tokens of the row after which the copy is taken


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A chunk of known tokens: positions [start, start + count) of `seq`."""

    seq: Sequence
    start: int
    count: int
    samples: bool  # the chunk ends the known tokens, so the next token is drawn
    wants_prompt_logprobs: bool
    state: StateMove | None = None  # of a model with recurrent layers


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Up to `count` tokens decoded from `start` at the latest, after `new_pages` joined the block table."""

    seq: Sequence
    start: int
    count: int
    first_new_page: int  # index in the block table
    new_pages: tuple[int, ...]
    state: StateMove | None = None  # where the row leaves a copy of its recurrent state


@dataclass(slots=True)
class DecodeRows:
    """The decode rows of a step, in columns: a step has hundreds, and most of them hold nothing but a count.

    `pages` and `states` are by the row's number, of those rows that have any.
    """

    seqs: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    pages: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # (first_new_page, new_pages)
    states: dict[int, StateMove] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[DecodeRow]) -> Self:
        made = cls()
        for row in rows:
            made.add(row)
        return made

    def add(self, row: DecodeRow) -> None:
        if row.new_pages:
            self.pages[len(self)] = row.first_new_page, row.new_pages
        if row.state is not None:
            self.states[len(self)] = row.state
        self.seqs.append(row.seq)
        self.starts.append(row.start)
        self.counts.append(row.count)

    def __len__(self) -> int:
        return len(self.seqs)

    def __getitem__(self, i: int) -> DecodeRow:
        first_new_page, new_pages = self.pages.get(i, (0, ()))
        return DecodeRow(self.seqs[i], self.starts[i], self.counts[i], first_new_page, new_pages, self.states.get(i))

    def __iter__(self) -> Iterator[DecodeRow]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One device step. With prefill rows, decode rows ride along for one token each."""

    prefill_rows: tuple[PrefillRow, ...]
    decode_rows: DecodeRows
    admitted: tuple[Sequence, ...]  # new in their slots with this step
    drafts: int = 0  # tokens that a decode step proposes for each row, and verifies
    wants_logprobs: bool = False  # of drawn tokens; some sequence that runs does

    def of_group(self, group: int) -> StepPlan:
        """The rows of one group of requests."""
        return StepPlan(
            tuple(row for row in self.prefill_rows if row.seq.group == group),
            DecodeRows.of(row for row in self.decode_rows if row.seq.group == group),
            tuple(seq for seq in self.admitted if seq.group == group),
            self.drafts,
        )

    @property
    def num_steps(self) -> int:
        """Tokens that a decode step may draw for a sequence."""
        return max(self.decode_rows.counts, default=0)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(row.count for row in self.prefill_rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """Tokens that one row drew, with logprobs beside them."""

    token_ids: np.ndarray  # int32 [drawn]
    logprobs: np.ndarray  # float32 [drawn], of the drawn tokens
    top_ids: np.ndarray  # int32 [drawn, MAX_LOGPROBS], best first
    top_logprobs: np.ndarray  # float32 [drawn, MAX_LOGPROBS]
    faulty: bool  # the logits were not finite; the tokens mean nothing


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What decode rows drew, in columns."""

    tokens: np.ndarray  # int32 [rows, steps], the first num_drawn of each
    num_drawn: np.ndarray  # int32 [rows]
    faulty: np.ndarray  # bool [rows]
    logprobs: np.ndarray  # float32 [rows, steps]
    top_ids: np.ndarray  # int32 [rows, steps, MAX_LOGPROBS]
    top_logprobs: np.ndarray  # float32 [rows, steps, MAX_LOGPROBS]

    def __getitem__(self, i: int) -> RowResult:
        count = int(self.num_drawn[i])
        detail = (self.logprobs[i, :count], self.top_ids[i, :count], self.top_logprobs[i, :count])
        return RowResult(self.tokens[i, :count], *detail, bool(self.faulty[i]))

    def take(self, rows: np.ndarray | slice) -> DecodeResult:
        """Some of the rows."""
        columns = (self.tokens, self.num_drawn, self.faulty, self.logprobs, self.top_ids, self.top_logprobs)
        return DecodeResult(*(column[rows] for column in columns))


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """For the tokens of one prefill row: how likely the token after each one was."""

    logprobs: np.ndarray  # float32 [count]; the last is undefined where the next token is unknown
    top_ids: np.ndarray  # int32 [count, MAX_LOGPROBS]
    top_logprobs: np.ndarray  # float32 [count, MAX_LOGPROBS]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Row by row in the plan's order."""

    prefill: tuple[RowResult, ...]
    decode: DecodeResult
    prompt_logprobs: tuple[PromptLogprobs | None, ...]  # one a prefill row
    expert_tokens: np.ndarray | None = None  # int32 [layers with experts, experts], tokens that chose each
    num_proposed: int = 0  # draft tokens of all rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Another way to lie on the devices, ready to be taken."""

    config: EngineConfig  # the old one but for shards and pages
    adopt: Callable[[], None]  # between steps: moves the weights, forgets what was kept; all or nothing


class PendingStep(Protocol):
    @property
    def plan(self) -> StepPlan: ...
    @property
    def key(self) -> StepKey: ...  # of its program
    def is_done(self) -> bool: ...  # `result` will not wait
    def result(self) -> StepResult: ...


class StepRunner(Protocol):
    """What the loop needs of a device; tests bring one whose tokens are a formula."""

    def launch(self, plan: StepPlan) -> PendingStep: ...
    def reset(self) -> None: ...
