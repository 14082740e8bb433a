"""Speculation against plain decoding, in turn in one process, on the default model.

    python -m benchmarks.speculation [--streams 1 4 16] [--rounds 5] [--draft-tokens 3] [--draft-model MODEL] [--always]

From the text itself, or by a draft model: the default model as its own (--draft-model smollm2-135m-instruct) is the
upper bound of what is accepted, and shows what drafting costs. --always speculates in every step without prompts, also
where it measures slower.

Two kinds of prompt, 96 tokens out, greedy, offline: `copied`, a passage and its first words again, which
the model goes on copying; `free`, a passage to continue. Outputs must be equal, or it says how many are.
Results go to benchmarks/results/ and to the last line as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.offline import Batch, run_batch, tokenizer_of
from benchmarks.prompts import make_prompts
from benchmarks.report import finish, table, versions
from engine import LLM
from engine.config import DEFAULT_MODEL
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from pallas_kernels.native import library

PASSAGE_TOKENS, AGAIN_TOKENS, OUTPUT_TOKENS = 160, 24, 96


@dataclass(frozen=True)
class Round:
    """A batch, and what was proposed in it."""

    batch: Batch
    proposed: int
    accepted: int
    steps: int  # that verified
    seconds: float  # of these


class Always(Speculation):
    """In every step."""

    def drafts(self, num_seqs: int) -> int:
        return self.draft_tokens if num_seqs else 0


def measure(llm: LLM, prompts: list[list[int]]) -> Round:
    before = llm.engine.stats()
    batch = run_batch(llm, prompts, OUTPUT_TOKENS)
    after = llm.engine.stats()
    return Round(
        batch,
        after.draft_tokens - before.draft_tokens,
        after.accepted_draft_tokens - before.accepted_draft_tokens,
        round(verifying(after.steps) - verifying(before.steps)),
        verifying(after.step_s) - verifying(before.step_s),
    )


def verifying(by_program: Mapping[str, float]) -> float:
    return sum(value for name, value in by_program.items() if name.startswith("verify_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--draft-model")
    parser.add_argument("--always", action="store_true")
    args = parser.parse_args()
    way = "ngram" if args.draft_model is None else "draft"
    sizes: dict[str, Any] = {"max_num_seqs": max(args.streams), "max_model_len": 512, "enable_prefix_caching": False}
    plain = LLM(DEFAULT_MODEL, **sizes)
    own = {"speculation": way, "draft_model": args.draft_model, "draft_tokens": args.draft_tokens}
    drafted = LLM(DEFAULT_MODEL, **own, **sizes)
    scheduler = drafted.engine.scheduler
    if args.always and isinstance(scheduler, Scheduler):
        scheduler.speculation = Always(drafted.engine.config.draft_tokens)
    tokenizer = tokenizer_of(plain)
    rows = []
    for kind, again in (("copied", AGAIN_TOKENS), ("free", 0)):
        for streams in args.streams:
            rounds: list[tuple[Round, Round]] = []
            for seed in range(args.rounds + 1):  # the first, in which both ways are tried, is not counted
                passages = [list(p.token_ids) for p in make_prompts(tokenizer, PASSAGE_TOKENS, streams, seed)]
                prompts = [[*passage, *passage[:again]] for passage in passages]
                rounds.append((measure(plain, prompts), measure(drafted, prompts)))
            counted = rounds[1:]
            equal = sum(
                a == b for one, other in counted for a, b in zip(one.batch.outputs, other.batch.outputs, strict=True)
            )
            rows.append(
                {
                    "prompts": kind,
                    "streams": streams,
                    "plain_tokens_per_s": median(one.batch.tokens_per_s for one, _ in counted),
                    "drafted_tokens_per_s": median(other.batch.tokens_per_s for _, other in counted),
                    "ratio": median(other.batch.tokens_per_s / one.batch.tokens_per_s for one, other in counted),
                    "proposed": sum(other.proposed for _, other in counted),
                    "accepted": sum(other.accepted for _, other in counted),
                    "verify_steps": sum(other.steps for _, other in counted),
                    "verify_s": sum(other.seconds for _, other in counted),
                    "equal_outputs": equal,
                    "outputs": streams * len(counted),
                }
            )
    shown = [
        [
            row["prompts"],
            row["streams"],
            *(f"{row[name]:.1f}" for name in ("plain_tokens_per_s", "drafted_tokens_per_s")),
            f"{row['ratio']:.2f}",
            f"{row['accepted']} of {row['proposed']}",
            f"{row['accepted'] / max(row['verify_steps'], 1):.2f}",
            f"{1e3 * row['verify_s'] / max(row['verify_steps'], 1):.1f}",
            f"{row['equal_outputs']} of {row['outputs']}",
        ]
        for row in rows
    ]
    names = ["prompts", "streams", "plain tok/s", f"{way} tok/s", "ratio", "accepted", "a step", "step ms", "equal"]
    print(table(names, shown))
    facts = {"instruction_set": library().isa, "rounds": args.rounds, "versions": versions("jax", "jaxlib")}
    finish(
        "speculation" if way == "ngram" else f"speculation-{way}",
        "cpu",
        facts
        | {
            "speculation": way,
            "draft_model": args.draft_model,
            "always": args.always,
            "draft_tokens": drafted.engine.config.draft_tokens,
            "output_tokens": OUTPUT_TOKENS,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
