"""From a row's raw result to the event that its client sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.request import FinishReason, Logprob, TokenEvent, TokenLogprobs

if TYPE_CHECKING:
    from engine.plan import PrefillRow, PromptLogprobs, RowResult
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many of the drawn tokens count, and the ending if the last of them is one."""

    num_accepted: int
    finish_reason: FinishReason | None
    stop_token_id: int | None


def row_event(seq: Sequence, drawn: RowResult, outcome: Outcome) -> TokenEvent:
    count = outcome.num_accepted
    num_top = seq.request.params.logprobs
    logprobs = None
    if num_top is not None:
        logprobs = tuple(
            TokenLogprobs(
                int(drawn.token_ids[i]),
                float(drawn.logprobs[i]),
                _top(drawn.top_ids[i], drawn.top_logprobs[i], num_top),
            )
            for i in range(count)
        )
    prompt = None
    if seq.prompt_logprobs is not None and not seq.prompt_logprobs_sent:
        prompt, seq.prompt_logprobs_sent = tuple(seq.prompt_logprobs), True
        seq.prompt_logprobs = None
    return TokenEvent(
        request_id=seq.request.request_id,
        index=seq.index,
        token_ids=tuple(drawn.token_ids[:count].tolist()),
        logprobs=logprobs,
        prompt_logprobs=prompt,
        finish_reason=outcome.finish_reason,
        stop_token_id=outcome.stop_token_id,
        num_cached_tokens=seq.num_cached_tokens,
    )


def collect_prompt_logprobs(row: PrefillRow, found: PromptLogprobs) -> None:
    """Keep the logprobs of prompt positions start + 1 ... start + count; position 0 has none."""
    seq = row.seq
    num_top = seq.request.params.prompt_logprobs or 0
    if row.start == 0:  # also after a preemption: collected anew
        seq.prompt_logprobs = [None]
    if seq.prompt_logprobs is None:
        raise RuntimeError(f"prompt logprobs of {seq.request.request_id} start at {row.start}, not at 0")
    for i in range(min(row.count, seq.prompt_len - 1 - row.start)):
        token = seq.token_ids[row.start + i + 1]
        top = _top(found.top_ids[i], found.top_logprobs[i], num_top)
        seq.prompt_logprobs.append(TokenLogprobs(token, float(found.logprobs[i]), top))


def _top(ids: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[Logprob, ...]:
    return tuple(Logprob(int(t), float(p)) for t, p in zip(ids[:count], logprobs[:count], strict=True))
