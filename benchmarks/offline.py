"""Batches of greedy requests through an `LLM` in this process, timed; `octavo bench offline`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.client import LoadError
from benchmarks.load import Asker
from engine import LLM, SamplingParams
from engine.config import EngineOptions
from engine.errors import InvalidParam
from engine.text import Tokenizer
from server.commands.bench import BenchOfflineOptions


@dataclass(frozen=True)
class Batch:
    """From the first submit to the last token."""

    wall_s: float
    tokens_per_s: float  # of output
    cpu_ms_per_token: float
    outputs: list[tuple[int, ...]]


def run_batch(llm: LLM, prompts: list[list[int]], output_tokens: int | Sequence[int]) -> Batch:
    """All prompts at once, each continued greedily for so many tokens."""
    counts = [output_tokens] * len(prompts) if isinstance(output_tokens, int) else output_tokens
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = llm.generate(prompts, params)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    outputs = [tuple(one.outputs[0].token_ids) for one in found]
    if [len(ids) for ids in outputs] != list(counts):
        raise LoadError(f"outputs of {sorted({len(ids) for ids in outputs})} tokens, not of {sorted(set(counts))}")
    return Batch(wall_s, sum(counts) / wall_s, 1e3 * cpu_s / sum(counts), outputs)


def tokenizer_of(llm: LLM) -> Tokenizer:
    """RuntimeError without one."""
    if llm.engine.tokenizer is None:
        raise RuntimeError("the model has no tokenizer")
    return llm.engine.tokenizer


@dataclass(frozen=True)
class Work:
    """One batch: prompts, and the tokens wanted after each."""

    prompts: list[list[int]]
    output_tokens: list[int]


def made_up(tokenizer: Tokenizer, options: BenchOfflineOptions) -> list[Work]:
    """A batch to warm up and one for each round, of real text, no two prompts alike."""
    ask = Asker(tokenizer, options.seed, options.input_len, options.output_len, options.mix)
    found = [ask(options.num_prompts) for _ in range(options.rounds + 1)]
    return [Work([list(a.prompt.token_ids) for a in asks], [a.num_output_tokens for a in asks]) for asks in found]


def from_file(path: Path, tokenizer: Tokenizer, output_len: int) -> Work:
    """A JSONL file of {"prompt": text or token ids, "max_tokens": n}; without n, `output_len`. Raises InvalidParam."""
    prompts, counts = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            prompt, count = row["prompt"], row.get("max_tokens", output_len)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidParam("dataset_path", f"line {number} is not a JSON object with a prompt") from error
        prompts.append(list(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt)
        counts.append(count)
    if not prompts:
        raise InvalidParam("dataset_path", f"{path} has no lines")
    return Work(prompts, counts)


def rounds_of(llm: LLM, options: BenchOfflineOptions) -> list[tuple[Work, Batch]]:
    """The counted rounds. A file is run once: a second time its prompts would be in the prefix cache."""
    tokenizer = tokenizer_of(llm)
    if options.dataset_path is not None:
        work = from_file(Path(options.dataset_path), tokenizer, options.output_len)
        return [(work, run_batch(llm, work.prompts, work.output_tokens))]
    done = [(work, run_batch(llm, work.prompts, work.output_tokens)) for work in made_up(tokenizer, options)]
    return done[1:]


def figures(rounds: Sequence[tuple[Work, Batch]]) -> dict[str, Any]:
    """Medians of the rounds."""
    return {
        "requests": sum(len(work.prompts) for work, _ in rounds),
        "input_tokens": sum(len(prompt) for work, _ in rounds for prompt in work.prompts),
        "output_tokens": sum(sum(work.output_tokens) for work, _ in rounds),
        "duration_s": sum(batch.wall_s for _, batch in rounds),
        "requests_per_s": median(len(work.prompts) / batch.wall_s for work, batch in rounds),
        "input_tokens_per_s": median(sum(map(len, work.prompts)) / batch.wall_s for work, batch in rounds),
        "output_tokens_per_s": median(batch.tokens_per_s for _, batch in rounds),
        "cpu_ms_per_output_token": median(batch.cpu_ms_per_token for _, batch in rounds),
    }


def run(engine_options: EngineOptions, options: BenchOfflineOptions) -> int:
    """Measures, prints the table and the result."""
    start_s = time.perf_counter()
    with LLM(**asdict(engine_options)) as llm:
        load_s = time.perf_counter() - start_s
        found = {"load_s": load_s} | figures(rounds_of(llm, options))
    found = report.rounded(found)
    print(report.table(("figure", engine_options.model), list(found.items())))
    lengths = {name: getattr(options, name) for name in ("input_len", "output_len", "mix", "dataset_path", "seed")}
    shape = {"model": engine_options.model, "rounds": 1 if options.dataset_path else options.rounds, **lengths}
    versions = {"versions": report.versions("octavo", "jax", "jaxlib")}
    report.finish("offline", options.backend, shape | versions | found, report.folder(options.result_dir))
    return 0
