"""The HTML page of `octavo bench serve`, made of its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from server.charts import curves, document, legend

CHARTS = (
    ("output_tokens_per_s", "output tokens a second"),
    ("goodput_requests_per_s", "good requests a second"),
    ("ttft_ms_p50", "TTFT p50, ms"),
    ("ttft_ms_p99", "TTFT p99, ms"),
    ("tpot_ms_p50", "TPOT p50, ms"),
    ("itl_ms_p99", "ITL p99, ms"),
)
DISTRIBUTIONS = (("ttft_ms", "TTFT, ms"), ("itl_ms", "ITL, ms"), ("e2el_ms", "end to end, ms"))


def page(result: Mapping[str, Any], header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A self-contained page: the table, figures against load, distributions at the last load, and the JSON."""
    servers: Mapping[str, list[dict[str, Any]]] = result["servers"]
    over = "concurrency" if all("concurrency" in row for own in servers.values() for row in own) else "rate"
    facts = {name: value for name, value in result.items() if name not in ("servers", "versions")}
    parts = [f"<h1>{escape(result['model'])} under load</h1>", f"<p>{escape(json.dumps(facts))}</p>",
             _table(header, lines), f"<h2>Against {over}</h2>", legend(list(servers))]  # fmt: skip
    for key, title in CHARTS:
        points = [sorted((row[over], row[key]) for row in own if key in row) for own in servers.values()]
        if any(points):
            parts.append(curves(points, title, over))
    parts += ["<h2>Distributions at the last load</h2>", legend(list(servers))]
    for key, title in DISTRIBUTIONS:
        points = [own[-1].get(f"{key}_quantiles", []) for own in servers.values()]
        parts.append(curves(points, title, "percentile", log=False))
    parts += ["<h2>All of it</h2>", f"<pre>{escape(json.dumps(result, indent=1))}</pre>"]
    return document(f"octavo bench serve: {result['model']}", parts)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{rows}</table>"
