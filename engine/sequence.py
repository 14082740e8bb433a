"""One choice of a request while the engine works on it: its tokens, pages, slot and progress.

Plain bookkeeping, mutated by the scheduler alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.outcome import Outcome
from engine.prefix_cache import Node
from engine.request import FinishReason, Request, TokenLogprobs


class State(Enum):
    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"  # has a slot and pages
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Token positions are half-open: KV is launched for [0, computed).

    A decoding sequence feeds its last token next, so that it has `computed` + 1 tokens once all that was launched is
    read. That is an upper bound until then: proposed tokens that were refused leave `computed` when the step is read.
    """

    request: Request
    index: int  # choice
    order: int  # arrival; lower is served first and preempted last
    seed: int
    max_total_len: int  # prompt and output tokens, at most
    leader: Sequence | None  # choice 0, whose prompt pages this choice waits for and shares
    token_ids: list[int] = field(default_factory=list)
    group: int = 0  # of requests, whose slots and pages it has
    state: State = State.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)  # what the prefix cache knew when it was last asked, while waiting
    node: Node | None = None  # content of the pages registered so far
    num_sent_pages: int = 0  # pages that the device's block table holds
    num_registered: int = 0  # pages whose content the prefix cache was told
    state_row: int = -1  # of the state pool that the next chunk continues from; -1: zeros
    left: tuple[Node, int] | None = None  # the page and row of the newest state that decoding left
    branch: int = 0  # tokens of known pages at the last admission: a state is kept where prompts part
    prefill_len: int = 0  # len(token_ids) at the last admission
    computed: int = 0
    last_step: int = 0  # the scheduler's number of the last step that holds this sequence
    # While decoding stays below these it is nothing but counting; -1: every step is looked at.
    smooth_computed: int = -1  # with more tokens launched, it needs a page or is at its end
    smooth_len: int = -1  # with as many tokens known, it may have ended, or somebody wants more than tokens
    full_page_len: int = 0  # with as many tokens known, there is a page for the prefix cache to know
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # collected so far
    prompt_logprobs_sent: bool = False
    num_preemptions: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(stop_token_ids(self.request))

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def prefilling(self) -> bool:
        """Tokens known at admission still lack KV. Afterwards the device feeds its own tokens."""
        return self.computed < self.prefill_len

    @property
    def num_unread(self) -> int:
        """Of the tokens known at admission, those that lack KV."""
        return self.prefill_len - self.computed

    @property
    def wants_logprobs(self) -> bool:
        return self.request.params.logprobs is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.index == 0 and self.request.params.prompt_logprobs is not None and not self.prompt_logprobs_sent

    def absorb(self, drawn: list[int]) -> Outcome:
        """Append tokens up to the ending, if one of them is the last. The device stops by the same rule."""
        params = self.request.params
        for i, token in enumerate(drawn):
            self.token_ids.append(token)
            if token in self.stop_ids and self.num_output > params.min_tokens:
                return Outcome(i + 1, FinishReason.STOP, token)
            if len(self.token_ids) >= self.max_total_len:
                return Outcome(i + 1, FinishReason.LENGTH, None)
        return Outcome(len(drawn), None, None)


def stop_token_ids(request: Request) -> tuple[int, ...]:
    """Tokens that end a choice: the request's own, and the model's unless ignore_eos."""
    end = () if request.params.ignore_eos else request.end_token_ids
    return tuple(dict.fromkeys((*request.params.stop_token_ids, *end)))
