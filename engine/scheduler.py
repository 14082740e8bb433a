"""Continuous batching: which tokens the next step computes, and what its results mean.

`add`, `abort`, `plan() -> StepPlan`, `commit(plan, result) -> events`. Plain Python: no JAX,
no threads, no clock. First come, first served, but that a long prompt lets short ones through; the newest are
preempted first, by recompute.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from engine.budget import PromptBudget
from engine.call_length import CallLength
from engine.config import EngineConfig
from engine.errors import CapacityError, ContextOverflow
from engine.outcome import Outcome, collect_prompt_logprobs, row_event
from engine.plan import DecodeResult, DecodeRow, DecodeRows, PrefillRow, RowResult, StateMove, StepPlan, StepResult
from engine.prefix_cache import Match, NoPrefixCache, PrefixCache
from engine.request import FinishReason, Request, TokenEvent, made
from engine.sequence import Sequence, State
from engine.speculation import Speculation
from engine.stats import Counters

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Together:
    """What a step is for all groups of requests."""

    mixed: bool  # it computes prompts of some
    drafts: int  # tokens that it proposes for each row


class Scheduler:
    """Owns every unfinished sequence, the slots and the pages."""

    def __init__(self, config: EngineConfig, counters: Counters, group: int = 0) -> None:
        self.config = config
        self.counters = counters
        self.speculation = Speculation(config.draft_tokens, lags=config.draft is not None)
        self.call_length = CallLength(
            config.decode_buckets, config.fewest_decode_steps, config.decode_steps, config.decode_call_s
        )
        self.prompt_budget = PromptBudget(config.token_buckets, config.max_num_batched_tokens, config.tpot_slo_s)
        self.cache = _empty_cache(config)
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # by order; all came after all that run
        self.running: list[Sequence] = []  # by order
        self.prompts: list[Sequence] = []  # by order: those of `running` whose prompts are not computed yet
        self._of_request: dict[str, list[Sequence]] = {}  # that are not finished
        self._num_logprobs = 0  # of `running`, those that want them
        self._num_planned = self._num_committed = 0  # steps; those between are in flight
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._order = itertools.count()
        self._group = group
        self._num_unseeded = group << 48  # no two requests without a seed have the same

    # -- admission and endings ------------------------------------------------------------

    def validate(self, request: Request) -> int:
        """The longest this request may become, in tokens. Refuses what could never run alone."""
        prompt_len = len(request.prompt_token_ids)
        limit = self.config.max_model_len
        wanted = request.params.max_tokens
        if prompt_len == 0:
            raise ContextOverflow("prompt", "must not be empty")
        if prompt_len > limit or (prompt_len == limit and wanted != 0):
            raise ContextOverflow(
                "prompt", f"has {prompt_len} tokens; the context of {limit} tokens must hold it and the output"
            )
        if wanted is not None and prompt_len + wanted > limit:
            raise ContextOverflow(
                "max_tokens", f"{prompt_len} prompt tokens and {wanted} output tokens exceed the context of {limit}"
            )
        total = limit if wanted is None else prompt_len + wanted
        capacity = (self.config.num_pages - 1) * self.config.page_size
        if wanted is None and prompt_len < capacity:
            total = min(total, capacity)
        if total > capacity or (wanted is None and prompt_len == capacity):
            raise ContextOverflow("prompt", f"needs {total} tokens of KV cache; there are {capacity} in all")
        return total

    def add(self, request: Request) -> None:
        """Queue all choices of a request. Raises ContextOverflow, and then holds none."""
        total = self.validate(request)
        base = request.params.seed
        if base is None:
            self._num_unseeded += 1
            base = _mix(self.config.seed ^ _mix(self._num_unseeded))
        leader = None
        for index in range(request.params.n):
            seed = (base if index == 0 else _mix(base + index)) & MASK64
            seq = Sequence(
                request, index, next(self._order), seed, total, leader, list(request.prompt_token_ids), self._group
            )
            leader = leader or seq
            self.waiting[seq] = None
            self._of_request.setdefault(request.request_id, []).append(seq)
        self.counters.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End every choice of the request. Unknown and finished ids are fine."""
        mine = list(self._of_request.get(request_id, ()))
        for seq in mine:
            self.finish(seq)
        return [TokenEvent(request_id=request_id, index=seq.index, finish_reason=FinishReason.ABORT) for seq in mine]

    def end(self, request_id: str, index: int) -> None:
        """End one choice without an event. Unknown and finished ones are fine."""
        for seq in self._of_request.get(request_id, ()):
            if seq.index == index:
                self.finish(seq)
                return

    def sequences(self) -> Iterator[Sequence]:
        """Every unfinished sequence."""
        return itertools.chain(self.running, self.waiting)

    def finish(self, seq: Sequence) -> None:
        """Give back what the sequence holds. Steps in flight that still carry it are ignored later."""
        if seq.state is State.FINISHED:
            return
        if seq.state is State.RUNNING:
            self._vacate(seq)
        else:
            del self.waiting[seq]
        seq.state = State.FINISHED
        mine = self._of_request[seq.request.request_id]
        mine.remove(seq)
        if not mine:
            del self._of_request[seq.request.request_id]

    def in_flight(self, seq: Sequence) -> bool:
        """Whether a launched step that holds the sequence is not committed."""
        return seq.last_step > self._num_committed

    # -- planning ---------------------------------------------------------------------------

    @property
    def has_prompts(self) -> bool:
        """Whether the next step would compute some of a prompt."""
        return bool(self.prompts) or self._admissible() is not None

    @property
    def num_held_pages(self) -> int:
        return self.cache.pool.num_held

    def plan(self, together: Together | None = None) -> StepPlan | None:
        """The next step, or None when nothing can run until results are committed or requests come.

        together: what it is with other groups; None: alone.
        """
        self.cache.checkpoints.begin_step()
        # Decode rows take their pages first: they are older than whatever is admitted here.
        step = self._alone() if together is None else together
        number = self._num_planned + 1
        decode_rows = self._plan_decode(1 if step.mixed else self._call_tokens(step.drafts), number)
        # Preempting above may have made room, but multi-token rows cannot ride along.
        alone = together is None and not decode_rows
        budget = self.prompt_budget.tokens(len(decode_rows))
        prefill_rows, admitted = self._plan_prefill(budget) if step.mixed or alone else ([], [])
        if not prefill_rows and not decode_rows:
            return None
        self._num_planned = number
        for row in prefill_rows:
            row.seq.last_step = number
        return StepPlan(
            tuple(prefill_rows),
            decode_rows,
            tuple(admitted),
            0 if prefill_rows else step.drafts,
            self._num_logprobs > 0,
        )

    def _alone(self) -> Together:
        """What the next step is where there are no other groups."""
        mixed = self.has_prompts
        return Together(mixed, 0 if mixed else self.speculation.drafts(len(self.running)))

    def _call_tokens(self, drafts: int) -> int:
        """That each sequence may draw in a call without prompts."""
        if drafts:
            return self.config.most_steps(drafts)
        return self.call_length.tokens(len(self.running), others_wait=bool(self.waiting))

    def _plan_decode(self, num_steps: int, number: int) -> DecodeRows:
        """Rows of the step of that number."""
        rows = DecodeRows()
        seqs, starts, counts = rows.seqs, rows.starts, rows.counts
        for seq in list(self.running):
            start, count = seq.computed, num_steps
            if start + count > seq.smooth_computed:
                count = self._extend(seq, count, rows)
                if count == 0:
                    continue
            seqs.append(seq)
            starts.append(start)
            counts.append(count)
            seq.computed = start + count
            seq.last_step = number
        return rows

    def _extend(self, seq: Sequence, count: int, rows: DecodeRows) -> int:
        """How many of `count` tokens the sequence decodes, with pages for them; 0: none. It is the next of `rows`."""
        remaining = seq.max_total_len - seq.computed - 1
        if seq.state is not State.RUNNING or seq.prefilling or remaining <= 0:
            return 0
        count = self._grow(seq, min(count, remaining))
        if count == 0:
            return 0
        first = seq.num_sent_pages
        if first < len(seq.pages):
            rows.pages[len(rows)] = first, tuple(seq.pages[first:])
            seq.num_sent_pages = len(seq.pages)
        if self.config.checkpoint_rows is not None:
            state = self._decode_copy(seq, count)
            if state is not None:
                rows.states[len(rows)] = state
        else:
            seq.smooth_computed = min(len(seq.pages) * self.config.page_size, seq.max_total_len - 1)
        return count

    def _decode_copy(self, seq: Sequence, count: int) -> StateMove | None:
        """A copy is kept of the state at the last page border that the row reaches, if it reaches one."""
        border = (seq.computed + count) // self.config.page_size * self.config.page_size
        if border <= seq.computed or seq.node is None or not seq.node.alive:
            return None
        row = self.cache.checkpoints.promise()
        return None if row is None else StateMove(seq.slot, row, border - seq.computed)

    def _grow(self, seq: Sequence, count: int) -> int:
        """Pages for `count` more tokens, or for one, or (the newest making room) preempt: 0 if seq itself went."""
        while True:
            missing = -(-(seq.computed + count) // self.config.page_size) - len(seq.pages)
            if missing <= self.cache.pool.num_available:
                seq.pages += self.cache.pool.take(max(missing, 0))
                return count
            if count > 1:
                count = 1
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return 0

    def _plan_prefill(self, budget: int) -> tuple[list[PrefillRow], list[Sequence]]:
        """In order of arrival; but the first prompt that does not fit leaves up to half of its part to those behind it
        that have less than half as much to read. They would wait for all of it; it waits for as much again at most."""
        rows: list[PrefillRow] = []
        admitted: list[Sequence] = []
        long, kept, most = None, 0, self.config.max_model_len
        started = iter(self.prompts.copy())
        while budget > 0 and len(rows) + (long is not None) < self.config.max_prefill_rows:
            seq = self._next_prompt(started, most, admitted)
            if seq is None:
                break
            if long is None and seq.num_unread > budget:
                long, kept, most = seq, budget - budget // 2, seq.num_unread // 2
                budget //= 2
            else:
                rows.append(self._prefill_row(seq, budget))
                budget -= rows[-1].count
        if long is not None:
            rows.append(self._prefill_row(long, kept + budget))
        return rows, admitted

    def _next_prompt(self, started: Iterator[Sequence], most: int, admitted: list[Sequence]) -> Sequence | None:
        """The next that has at most so many tokens to read: of those that began, else the first in the queue, which is
        admitted then."""
        for seq in started:
            if seq.num_unread <= most:
                return seq
        match = self._admissible()
        if match is None or len(next(iter(self.waiting)).token_ids) - len(match.pages) * self.config.page_size > most:
            return None
        admitted.append(self._admit(match))
        return admitted[-1]

    def _prefill_row(self, seq: Sequence, budget: int) -> PrefillRow:
        start, count = seq.computed, min(budget, seq.num_unread)
        if start < seq.branch:
            count = min(count, seq.branch - start)
        seq.computed += count
        if not seq.prefilling:
            self.prompts.remove(seq)
        samples = not seq.prefilling and seq.max_total_len > seq.prompt_len
        self._register(seq, seq.computed)
        return PrefillRow(seq, start, count, samples, seq.wants_prompt_logprobs, self._state_move(seq, start))

    def _state_move(self, seq: Sequence, start: int) -> StateMove | None:
        """Where the chunk's state comes from; a copy is kept of what it is at the chunk's last page border.

        Of those before the last token, that is: an equal prompt computes at least that one.
        """
        if self.config.checkpoint_rows is None:
            return None
        source, seq.state_row = seq.state_row, seq.slot
        node, border = seq.node, seq.num_registered * self.config.page_size
        if node is not None and border == seq.prefill_len:
            node, border = node.parent, border - self.config.page_size
        row = self.cache.keep_state(node) if node is not None and border > start else None
        return StateMove(source) if row is None else StateMove(source, row, border - start)

    def _admissible(self) -> Match | None:
        """What the first in the queue can reuse, if it can be admitted now. Nobody overtakes it."""
        if not self.waiting or not self._free_slots:
            return None
        seq = next(iter(self.waiting))
        shared = seq.leader
        if self.in_flight(seq) or (shared is not None and shared.state is State.RUNNING and shared.prefilling):
            return None
        reusable = 0 if seq.wants_prompt_logprobs else len(seq.token_ids) - 1
        match = self.cache.match(seq.request.cache_salt, seq.token_ids, reusable, seq.path)
        if match.node.state is not None and not self.cache.checkpoints.is_written(match.node.state):
            return None  # the step being planned leaves the state that seq starts from
        missing = -(-len(seq.token_ids) // self.config.page_size) - match.num_pages
        room = self.cache.pool.num_available - len(self.running) - missing  # a page for each running one's next token
        return None if room < 0 or self.cache.pool.num_idle(match.pages) > room else match

    # -- acquire and release ------------------------------------------------------------------

    def _admit(self, match: Match) -> Sequence:
        """Move the first in the queue into a slot with pages for all its known tokens."""
        (seq, _), pool, pages = self.waiting.popitem(last=False), self.cache.pool, match.pages
        pool.acquire(pages)
        seq.pages = [*pages, *pool.take(-(-len(seq.token_ids) // self.config.page_size) - len(pages))]
        seq.num_sent_pages = len(seq.pages)
        seq.node, seq.num_registered = match.node, len(pages)
        seq.computed = len(pages) * self.config.page_size
        seq.state_row, seq.branch = -1, 0
        if match.node.state is not None:
            seq.state_row = match.node.state
            self.cache.checkpoints.use(seq.state_row)
        if self.config.state_checkpoints:
            seq.branch = match.num_known * self.config.page_size
        seq.prefill_len, seq.path = len(seq.token_ids), []
        seq.slot = self._free_slots.pop()
        seq.state = State.RUNNING
        self._num_logprobs += seq.wants_logprobs
        self.running.append(seq)
        self.prompts.append(seq)
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.computed
            self.counters.prefix_queries_tokens += len(seq.token_ids)
            self.counters.prefix_hits_tokens += seq.computed
        return seq

    def _vacate(self, seq: Sequence) -> None:
        """Give back slot and pages. The device may still write them: later steps come after it."""
        self._num_logprobs -= seq.wants_logprobs
        self.running.remove(seq)
        if seq.prefilling:
            self.prompts.remove(seq)
        self.cache.pool.release(seq.pages)
        self._free_slots.append(seq.slot)
        seq.pages, seq.slot, seq.node, seq.num_registered, seq.computed = [], -1, None, 0, 0
        seq.smooth_computed = seq.smooth_len = -1

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its tokens are computed again, tokens in flight still count."""
        self._vacate(seq)
        seq.state = State.WAITING
        seq.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting[seq] = None
        self.waiting.move_to_end(seq, last=False)  # the newest of those that ran, and so older than all that wait

    def _register(self, seq: Sequence, known: int) -> None:
        """Tell the prefix cache the pages whose tokens [0, known) are known and launched."""
        size, start = self.config.page_size, seq.num_registered * self.config.page_size
        while seq.node is not None and seq.node.alive and start + size <= known:
            tokens = tuple(seq.token_ids[start : start + size])
            seq.node = self.cache.insert(seq.node, tokens, seq.pages[seq.num_registered])
            seq.num_registered += 1
            start += size
        alive = seq.node is not None and seq.node.alive
        seq.full_page_len = start + size + 1 if alive else seq.max_total_len + 1  # of an evicted page nothing goes on

    # -- results --------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Append what a step drew, and end what is over. One event a row that has news."""
        self._num_committed += 1
        events = []
        for row, drawn, prompt in zip(plan.prefill_rows, result.prefill, result.prompt_logprobs, strict=True):
            if prompt is not None:
                collect_prompt_logprobs(row, prompt)
            events.append(self._commit_row(row.seq, drawn, int(row.samples)))
        events += self._commit_decode(plan.decode_rows, result.decode)
        for state in plan.decode_rows.states.values():
            self.cache.checkpoints.withdraw(state.copy_to)
        return [event for event in events if event is not None]

    def _commit_decode(self, rows: DecodeRows, result: DecodeResult) -> list[TokenEvent | None]:
        events: list[TokenEvent | None] = []
        drawn = zip(*result.tokens.T.tolist(), strict=True)  # each row's tokens
        columns = zip(rows.seqs, rows.counts, result.num_drawn.tolist(), drawn, strict=True)
        is_faulty = bool(result.faulty.any())
        num_smooth = 0
        for i, (seq, launched, count, tokens) in enumerate(columns):
            if count < len(tokens):
                tokens = tokens[:count]
            known = seq.token_ids
            length = len(known) + count
            if count < launched or length >= seq.smooth_len or is_faulty or not seq.stop_ids.isdisjoint(tokens):
                events.append(self._commit_row(seq, result[i], launched, rows[i]))
                continue
            known += tokens
            num_smooth += count
            if length >= seq.full_page_len:
                self._register(seq, length - 1)
            news = (seq.request.request_id, seq.index, tokens, seq.num_cached_tokens, None, None, None, None, None)
            events.append(made(TokenEvent, news))
        self.counters.generation_tokens += num_smooth
        return events

    def _commit_row(
        self, seq: Sequence, drawn: RowResult, launched: int, decoded: DecodeRow | None = None
    ) -> TokenEvent | None:
        if seq.state is State.FINISHED:  # ended while this step was in flight
            return None
        if drawn.faulty:
            self.cache.forget(seq.pages, seq.node)
            self.finish(seq)
            return TokenEvent(
                request_id=seq.request.request_id,
                index=seq.index,
                finish_reason=FinishReason.ERROR,
                error="the model produced numbers that are not finite",
            )
        if seq.state is State.RUNNING and not seq.prefilling:
            seq.computed -= launched - len(drawn.token_ids)  # proposed tokens that were refused
        outcome = seq.absorb(drawn.token_ids.tolist())
        self.counters.generation_tokens += outcome.num_accepted
        if seq.state is State.RUNNING and not seq.prefilling:
            self._register(seq, len(seq.token_ids) - 1)
            if decoded is not None and decoded.state is not None:
                self._keep_decoded(decoded, decoded.state, len(drawn.token_ids))
            rough = seq.wants_logprobs or self.config.checkpoint_rows is not None
            seq.smooth_len = -1 if rough else seq.max_total_len
        if seq.max_total_len == seq.prompt_len and not seq.prefilling and not self.in_flight(seq):
            outcome = Outcome(0, FinishReason.LENGTH, None)
        if outcome.finish_reason is not None:
            self.finish(seq)
        if outcome.num_accepted == 0 and outcome.finish_reason is None:
            return None
        return row_event(seq, drawn, outcome)

    def _keep_decoded(self, row: DecodeRow, state: StateMove, num_drawn: int) -> None:
        """The copy that a decode row left belongs to its page, and the one that the sequence left before goes."""
        seq, border = row.seq, row.start + state.copy_at
        end = len(seq.token_ids) - 1  # of the tokens in the state; it may be less than planned: some were refused
        if not end - num_drawn < border <= end:
            return
        if seq.node is None or seq.num_registered * self.config.page_size != border:
            return
        if self.cache.keep_promised(seq.node, state.copy_to):
            if seq.left is not None:
                self.cache.drop_state(*seq.left)
            seq.left = seq.node, state.copy_to

    def fail_all(self, message: str) -> list[TokenEvent]:
        """A device step failed: end every sequence, forget every page's content."""
        mine = list(self.sequences())
        for seq in mine:
            self.finish(seq)
        self.cache.clear()
        self._num_committed = self._num_planned  # what was in flight is lost
        return [
            TokenEvent(
                request_id=seq.request.request_id, index=seq.index, finish_reason=FinishReason.ERROR, error=message
            )
            for seq in mine
        ]

    def check_capacity(self, config: EngineConfig) -> None:
        """Raises CapacityError where the pages of `config` could not hold a sequence that was admitted."""
        capacity = (config.num_pages - 1) * config.page_size
        longest = max((seq.max_total_len for seq in self.sequences()), default=0)
        if longest > capacity:
            raise CapacityError(f"a request may become {longest} tokens long; there would be pages for {capacity}")

    def restart(self, config: EngineConfig) -> None:
        """Go on under `config`, whose pages hold nothing; with no step in flight. What ran is computed again."""
        for seq in reversed(list(self.running)):
            self._preempt(seq)
        self.config, self.cache = config, _empty_cache(config)

    def check(self) -> None:
        """Page conservation and the slots' books; raises RuntimeError with what is off."""
        held = [page for seq in self.running for page in seq.pages]
        self.cache.check(held)
        if self.prompts != [seq for seq in self.running if seq.prefilling]:
            raise RuntimeError("the prompts that are being computed differ from those of the running sequences")
        orders = [seq.order for seq in self.sequences()]
        if orders != sorted(orders):
            raise RuntimeError(f"sequences are out of order: {orders}")
        slots = sorted([*self._free_slots, *(seq.slot for seq in self.running)])
        if slots != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"slots are lost or doubled: {slots}")


def _empty_cache(config: EngineConfig) -> PrefixCache:
    kind = PrefixCache if config.enable_prefix_caching else NoPrefixCache
    return kind(config.num_pages, config.page_size, config.checkpoint_rows)


def _mix(value: int) -> int:
    """splitmix64 (Steele et al. 2014): spreads a counter over 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)
