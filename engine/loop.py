"""The generating engine: inbox -> plan -> launch -> commit -> sinks. The one place that drives a step of it.

`run_once` and `run_once_overlapped` do the same; the plain one is the debug mode and the
oracle. Knows nothing about HTTP. Sinks are called from this thread and must not block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import EngineStopped, InvalidParam, OctavoError, QueueFull
from engine.groups import scheduler_of
from engine.outbox import INTERNAL_ERROR, Outbox, Sink, error_delta
from engine.plan import Layout, PendingStep, StepPlan, StepResult, StepRunner
from engine.request import MAX_STOP_IDS, Request
from engine.sequence import stop_token_ids
from engine.stats import Counters, EngineStats
from engine.text import Tokenizer
from engine.thread import EngineThread


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on the device, and when it was sent there."""

    step: PendingStep
    at_s: float


class Engine(EngineThread):
    """Thread-safe front of one model: `submit`, `abort`, `stats`, `drain`, `stop`."""

    task = "generate"

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        model_name: str = "",
        end_token_ids: tuple[int, ...] = (),
        counters: Counters | None = None,
        layouts: Callable[[str], Layout] | None = None,
    ) -> None:
        super().__init__(config.overlap)
        self.config = config
        self.runner = runner
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.end_token_ids = end_token_ids
        self.counters = counters or Counters()
        self.scheduler = scheduler_of(config, self.counters)
        self.outbox = Outbox(self.scheduler.end)
        self._layouts = layouts
        self._resharding = threading.Lock()
        self._pending: Launched | None = None
        self._came_late = False  # the last step was done before the loop looked

    # -- called from any thread ---------------------------------------------------------------

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request. Raises InvalidParam, ContextOverflow, QueueFull or EngineStopped, and then keeps nothing."""
        self._check(request)
        choices = request.params.n
        with self._lock:  # what is put before the engine closes is read after it: nobody waits in vain
            self._check_open()
            queued = len(self.scheduler.waiting) + self._num_submitted
            if queued + choices > self.config.max_queued_requests:
                raise QueueFull(f"{queued} sequences are waiting", retry_after_s=1.0)
            self._num_submitted += choices
            self._inbox.put(lambda: self._add(request, sink))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is. Unknown and finished ids are fine."""
        self._inbox.put(lambda: self.outbox.deliver(self.scheduler.abort(request_id)))

    def reshard(self, sharding: str) -> None:
        """Go on under another sharding file, or name of one; what runs is computed again, nobody is refused.

        Compiles while the old layout serves, then stops between two steps for as long as the weights move.
        Raises InvalidParam and CapacityError, and then nothing has changed.
        """
        if self._layouts is None:
            raise InvalidParam("sharding", "this engine cannot be cut anew")
        with self._resharding:
            layout = self._layouts(sharding)
            self.call(lambda: self._adopt(layout))

    def _adopt(self, layout: Layout) -> None:
        self.scheduler.check_capacity(layout.config)
        config = self.config
        try:
            layout.adopt()
            config = layout.config
        finally:  # the cache's content is gone either way
            self.scheduler.restart(config)
            self.config = config

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        running = len(scheduler.running)
        idle = running == 0 and not scheduler.waiting
        return EngineStats(
            num_running=running,
            num_waiting=len(scheduler.waiting) + self._num_submitted,
            kv_usage=scheduler.num_held_pages / (self.config.num_groups * (self.config.num_pages - 1)),
            last_step_age_s=0.0 if idle else time.monotonic() - self._last_step_s,
            **self.counters.snapshot(),
        )

    # -- the loop -----------------------------------------------------------------------------

    def run_once(self) -> bool:
        plan = self._plan()
        if plan is None:
            return False
        self._commit(self._launch(plan))
        return True

    def run_once_overlapped(self) -> bool:
        plan = self._plan()
        launched = self._launch(plan) if plan is not None else None
        previous, self._pending = self._pending, launched
        if previous is not None:
            self._commit(previous)
        return launched is not None or previous is not None

    def _plan(self) -> StepPlan | None:
        self.counters.phases.begin()
        plan = self.scheduler.plan()
        self.counters.phases.lap("plan")
        return plan

    def _launch(self, plan: StepPlan) -> Launched:
        launched_s = time.monotonic()
        return Launched(self.runner.launch(plan), launched_s)

    def _commit(self, launched: Launched) -> None:
        phases, plan = self.counters.phases, launched.step.plan
        comes_late = launched.step.is_done()
        result = launched.step.result()
        phases.lap("wait")
        self._clock(launched, result, comes_late)
        self.counters.chose(result.expert_tokens)
        events = self.scheduler.commit(plan, result)
        phases.lap("commit")
        told = self.outbox.translate(events)
        phases.lap("detokenize")
        self.outbox.send(told)
        phases.lap("emit")

    def _clock(self, launched: Launched, result: StepResult, comes_late: bool) -> None:
        """How long the step took, from when the device could start it.

        A host that came late to the step before does not know when that was: the sums still add up, but what is
        learnt from is then the time since the launch. One too long is corrected by the next, one too short is a trap.
        """
        began_s, now_s = max(launched.at_s, self._last_step_s), time.monotonic()
        key, plan = launched.step.key, launched.step.plan
        name = key.name
        self.counters.step_s[name] = self.counters.step_s.get(name, 0.0) + now_s - began_s
        seconds = now_s - (launched.at_s if self._came_late else began_s)
        self._last_step_s, self._came_late = now_s, comes_late
        if plan.prefill_rows and plan.decode_rows and self.config.tpot_slo_s is not None:
            self.scheduler.prompt_budget.observe(key.tokens, seconds)
        if plan.prefill_rows:
            return
        if self.config.draft_tokens:
            self._measure(plan, result, seconds)
        if self.config.decode_call_s is not None and not plan.drafts:
            self.scheduler.call_length.observe(key.rows, int(result.decode.num_drawn.max()), seconds)

    def _measure(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """What a decode step brought, with or without proposed tokens."""
        drawn = int(result.decode.num_drawn.sum())
        self.scheduler.speculation.observe(len(plan.decode_rows), plan.drafts, drawn, seconds)
        if plan.drafts:
            self.counters.draft_tokens += result.num_proposed
            self.counters.accepted_draft_tokens += drawn - int((result.decode.num_drawn > 0).sum())

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(pending)

    def has_work(self) -> bool:
        return bool(self.outbox)

    def _recover(self) -> None:
        self._pending = None
        self.runner.reset()
        self.outbox.deliver(self.scheduler.fail_all(INTERNAL_ERROR))

    def _abort_all(self) -> None:
        for request_id in self.outbox.ids():
            self.outbox.deliver(self.scheduler.abort(request_id))

    def _fail_all(self) -> None:
        self.outbox.fail_all(INTERNAL_ERROR)

    # -- requests in, deltas out ----------------------------------------------------------------

    def _check(self, request: Request) -> None:
        self.scheduler.validate(request)
        params, last = request.params, self.vocab_size - 1
        named = {
            "prompt": request.prompt_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": tuple(params.logit_bias),
            "allowed_token_ids": params.allowed_token_ids or (),
            "bad_words": request.banned_token_ids,
        }
        for name, ids in named.items():
            if ids and not (min(ids) >= 0 and max(ids) <= last):
                raise InvalidParam(name, f"token ids must be between 0 and {last}")
        if len(stop_token_ids(request)) > MAX_STOP_IDS:
            raise InvalidParam("stop_token_ids", f"at most {MAX_STOP_IDS} with the model's own end tokens")
        forbidden = {*request.banned_token_ids, *(stop_token_ids(request) if params.min_tokens else ())}
        if params.allowed_token_ids and forbidden.issuperset(params.allowed_token_ids):
            raise InvalidParam("allowed_token_ids", "leave no token that may be drawn")
        if params.stop and (self.tokenizer is None or not params.detokenize):
            raise InvalidParam("stop", "stop strings need a tokenizer and detokenize")

    def _add(self, request: Request, sink: Sink) -> None:
        try:
            if self.failure is not None:
                raise EngineStopped(self.failure)
            if request.request_id in self.outbox:
                raise InvalidParam("request_id", f"{request.request_id} is in use")
            self.scheduler.add(request)
            self.outbox.open(request, sink, self.tokenizer)
        except OctavoError as error:
            sink([error_delta(request.request_id, i, str(error)) for i in range(request.params.n)])
        finally:
            with self._lock:
                self._num_submitted -= request.params.n
