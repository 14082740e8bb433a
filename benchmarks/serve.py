"""`octavo bench serve`: load on one server or several side by side, see docs/bench.md.

All servers get the same prompts and, setting by setting, take turns. Every answer's tokens are counted by the
server's `usage` and compared with what was asked; some requests are sent again alone and must say the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks import engines, report
from benchmarks.client import Endpoint, LoadError, endpoint
from benchmarks.figures import Slo, figures, parse_slo
from benchmarks.load import Ask, Asker, Load, Target, arrival_times, closed_loop, open_loop
from benchmarks.serve_page import page
from benchmarks.sweep import best, sweep
from engine.config import EngineOptions, cache_root
from engine.errors import InvalidParam
from engine.registry import resolve_model
from engine.text import Tokenizer, load_tokenizer
from server.commands.bench import BenchServeOptions

LEVELS = (1, 4, 16)
BUSY_CLIENT = 0.8  # of a core; above it the client may be what is measured
MIN_AGREEMENT = 0.1  # below this a repeated request's text has nothing to do with the first one
Rows = dict[str, list[dict[str, Any]]]  # name of the server -> its settings


@dataclass(frozen=True)
class Setting:
    """One load: so many requests at once, or so many arriving in a second."""

    concurrency: int | None = None
    rate: float | None = None

    def num_prompts(self, options: BenchServeOptions) -> int:
        if options.num_prompts is not None:
            return options.num_prompts
        return max(8, 4 * self.concurrency) if self.concurrency else max(20, round(20 * (self.rate or 0)))


@contextmanager
def targets(engine_options: EngineOptions, options: BenchServeOptions) -> Iterator[dict[str, Target]]:
    """The servers by name; ours, where no URL is given, is started for the run."""
    with ExitStack() as stack:
        urls = {"server": options.url}
        if options.url is not None:
            refuse_engine_options(engine_options)
        else:
            engine = stack.enter_context(engines.octavo(engine_options))
            urls = {"octavo": engine.target.endpoint.base_url}
        for text in options.peer:
            name, _, url = text.partition("=")
            if name in urls:
                raise InvalidParam("peer", f"{name!r} names two servers")
            urls[name] = url
        yield {name: target_of(str(url), options) for name, url in urls.items()}


def refuse_engine_options(given: EngineOptions) -> None:
    """A server that runs already has its own. Raises InvalidParam; what cuts the prompts stays."""
    for field in fields(given):
        asked = field.name not in ("model", "tokenizer", "revision", "cache_dir", "seed")
        if asked and getattr(given, field.name) != field.default:
            raise InvalidParam(field.name, "is for a server that is started for the run; with --url it means nothing")


def target_of(url: str, options: BenchServeOptions) -> Target:
    """With the name of the model that the server has. Raises LoadError when it does not answer."""
    headers = [(name, value) for name, _, value in (text.partition("=") for text in options.header)]
    to = endpoint(url, options.endpoint, headers)
    status, body = engines.get_json(f"{to.base_url}/v1/models", dict(headers))
    if status != 200 or not body or not body.get("data"):
        raise LoadError(f"{to.base_url}/v1/models answers {status or 'nothing'}")
    return Target(to, {"model": body["data"][0]["id"]} | ({"ignore_eos": True} if options.ignore_eos else {}))


def version_of(to: Endpoint) -> str | None:
    """What a server of vLLM's kind says of itself."""
    status, body = engines.get_json(f"{to.base_url}/version", dict(to.headers))
    return body.get("version") if status == 200 and isinstance(body, dict) else None


def measure(
    target: Target, setting: Setting, ask: Asker, options: BenchServeOptions, slo: Slo | None
) -> dict[str, Any]:
    """Warms up, loads and checks one server at one setting."""
    warmups = options.num_warmups if options.num_warmups is not None else setting.concurrency or 4
    if warmups:
        closed_loop(target, ask(warmups), warmups, options.request_timeout_s)
    asks = ask(setting.num_prompts(options))
    if setting.concurrency:
        beside = ask.long(options.long_prompt_len) if options.long_prompt_len else []
        load = closed_loop(target, asks, setting.concurrency, options.request_timeout_s, beside)
        row: dict[str, Any] = {"concurrency": setting.concurrency}
        if beside:
            row["long_prompts"] = len(load.beside)
    else:
        rate = setting.rate or 0.0
        arrivals_s = arrival_times(rate, options.burstiness, len(asks), options.seed)
        load = open_loop(target, asks, arrivals_s, options.request_timeout_s)
        row = {"rate": rate, "send_lag_ms": 1e3 * load.send_lag_s}
    row["client_cpu_share"] = load.client_cpu_share
    return row | figures(load.samples, slo) | {"repeated": repeated(target, asks, load, options)}


def repeated(target: Target, asks: list[Ask], load: Load, options: BenchServeOptions) -> dict[str, Any]:
    """Some of the load's requests again, one at a time: how many texts are equal, and how far they agree.
    In bfloat16 the batch that a token is computed in may change its rounding, so not all need be equal."""
    done = [i for i, sample in enumerate(load.samples) if sample.error is None]
    chosen = done[:: max(1, len(done) // max(1, options.num_checks))][: options.num_checks]
    if not chosen:
        return {"requests": 0}
    again = closed_loop(target, [asks[i] for i in chosen], 1, options.request_timeout_s).samples
    pairs = [(load.samples[i].text, sample.text) for i, sample in zip(chosen, again, strict=True)]
    shares = [agreement(*pair) for pair in pairs]
    return {"requests": len(pairs), "equal": sum(a == b for a, b in pairs), "agreement": sum(shares) / len(shares)}


def agreement(text: str, other: str) -> float:
    """The share of a text that another one begins with too."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
    return sum(1 for _ in same) / max(1, len(text))


def settings(options: BenchServeOptions) -> list[Setting]:
    if options.request_rate is not None:
        return [Setting(rate=options.request_rate)]
    return [Setting(concurrency=level) for level in options.max_concurrency or LEVELS]


def measured(found: Mapping[str, Target], tokenizer: Tokenizer, options: BenchServeOptions) -> Rows:
    """Every server at every setting; in a sweep each finds its own rates."""
    slo = None if options.slo is None else parse_slo(options.slo)
    askers = {
        name: Asker(
            tokenizer, options.seed, options.input_len, options.output_len, options.mix, options.shared_prefix_len
        )
        for name in found
    }

    def one(name: str, setting: Setting) -> dict[str, Any]:
        row = measure(found[name], setting, askers[name], options, slo)
        tell(name, row)
        return row

    if not options.sweep:
        loads = settings(options)
        by_load = [{name: one(name, load) for name in found} for load in loads]
        return {name: [rows[name] for rows in by_load] for name in found}
    start = options.request_rate or 1.0
    return {
        name: sweep(lambda rate, name=name: one(name, Setting(rate=rate)), start, options.attainment) for name in found
    }


def tell(name: str, row: Mapping[str, Any]) -> None:
    """Progress, and what a reader must know before believing the figures."""
    at = f"{name}, {label(row)}"
    print(f"{at}: {row['output_tokens_per_s']:.1f} tok/s", file=sys.stderr)
    for kind, count in row["errors"].items():
        example = row["error_examples"].get(kind, "")
        print(f"{at}: {count} of {row['requests']} requests failed: {kind} {example}", file=sys.stderr)
    if row["client_cpu_share"] > BUSY_CLIENT:
        share = f"{row['client_cpu_share']:.0%}"
        print(f"{at}: the client took {share} of a core and may be the bottleneck", file=sys.stderr)


def label(row: Mapping[str, Any]) -> str:
    return f"{row['concurrency']} at once" if "concurrency" in row else f"{row['rate']:.3g} req/s"


HEADER = (
    "server",
    "load",
    "tok/s",
    "TTFT ms p50",
    "p99",
    "TPOT p50",
    "ITL p99",
    "E2EL p50",
    "good",
    "failed",
    "client",
)
COLUMNS = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "itl_ms_p99", "e2el_ms_p50")


def lines(rows: Rows) -> list[list[str]]:
    """The table's cells, in the order of HEADER."""
    return [
        [name, label(row), f"{row['output_tokens_per_s']:.1f}",
         *(f"{row[key]:.1f}" if key in row else "-" for key in COLUMNS),
         f"{row['good_share']:.0%}" if "good_share" in row else "-",
         str(sum(row["errors"].values())), f"{row['client_cpu_share']:.0%}"]
        for name, own in rows.items() for row in own
    ]  # fmt: skip


def outcome(rows: Rows, options: BenchServeOptions) -> dict[str, Any]:
    """What a sweep found, and whether texts are what they were when sent again."""
    shares = {
        name: [r["repeated"]["agreement"] for r in own if r["repeated"]["requests"]] for name, own in rows.items()
    }
    completed = all(any(row["completed"] for row in own) for own in rows.values())
    same = all(sum(own) / len(own) >= MIN_AGREEMENT for own in shares.values() if own)
    found: dict[str, Any] = {"ok": completed and same}
    if options.sweep:
        keys = ("rate", "goodput_requests_per_s", "goodput_tokens_per_s", "good_share")
        found["best"] = {name: {key: best(own)[key] for key in keys} for name, own in rows.items()}
    return found


def run(engine_options: EngineOptions, options: BenchServeOptions) -> int:
    """Measures, prints the table and the result; 1 when a server completed nothing or contradicts itself."""
    model = resolve_model(engine_options.model, cache_root(engine_options.cache_dir), engine_options.revision)
    tokenizer = load_tokenizer(Path(engine_options.tokenizer) if engine_options.tokenizer else model)
    with targets(engine_options, options) as found:
        versions = {name: version for name, to in found.items() if (version := version_of(to.endpoint))}
        rows = report.rounded(measured(found, tokenizer, options))
    print(report.table(HEADER, lines(rows)))
    lengths = (
        {"mix": options.mix} if options.mix else {"input_len": options.input_len, "output_len": options.output_len}
    )
    result = {
        "model": engine_options.model, "endpoint": options.endpoint, **lengths, "burstiness": options.burstiness,
        "shared_prefix_len": options.shared_prefix_len, "long_prompt_len": options.long_prompt_len,
        "slo": options.slo, "seed": options.seed, "versions": report.versions("octavo", "jax", "jaxlib"),
        "server_versions": versions, "servers": rows, **outcome(rows, options),
    }  # fmt: skip
    if options.html is not None:
        Path(options.html).write_text(page(result, HEADER, lines(rows)))
    report.finish("serve", options.backend, result, report.folder(options.result_dir))
    return 0 if result["ok"] else 1
