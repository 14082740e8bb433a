"""The HTML page of `octavo plan`, made of the facts that `octavo plan --json` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from server.charts import colour, curves, document, legend
from server.plan_text import size, table

Json = dict[str, Any]

KINDS = (("weights", "weights"), ("slots", "slots"), ("states", "recurrent states"), ("temporary", "temporaries"),
         ("cache", "KV cache"))  # fmt: skip


def page(model: str, layouts: Sequence[Json]) -> str:
    """A self-contained page of `facts` of layouts."""
    lines = [f"<h1>{escape(model)}</h1>", "<p>Sizes are of one device. Times are bounds: what published peak rates ",
             "allow for what a step computes, reads and sends.</p>", "<h2>Layouts side by side</h2>", _summary(layouts),
             "<h2>Memory of a device</h2>", legend([label for _, label in KINDS]), _memory(layouts),
             "<h2>Time and throughput against batch</h2>", legend([found["name"] for found in layouts])]  # fmt: skip
    for key, scale, title in (("tpot_s", 1e3, "TPOT, ms"), ("tokens_per_s", 1, "tokens a second")):
        points = [[(row["batch"], row[key] * scale) for row in found["decode"] if row["has_room"]] for found in layouts]
        lines.append(curves(points, title, "batch"))
    lines += ["<h2>All of it</h2>", f"<pre>{escape(table(model, layouts))}</pre>"]
    return document(f"octavo plan: {model}", lines)


def _summary(layouts: Sequence[Json]) -> str:
    names = (
        "layout",
        "fits",
        "weights",
        "KV cache",
        "tokens of cache",
        "TPOT of 1",
        "most tok/s",
        "a chip",
        "cost of 1M",
    )
    rows = "".join(f"<tr>{''.join(_cells(found))}</tr>" for found in layouts)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


def _cells(found: Json) -> Iterator[str]:
    memory, roomy = found["memory"], [row for row in found["decode"] if row["has_room"]]
    yield f"<td>{escape(found['name'])}</td>"
    yield "<td>yes</td>" if found["fits"] else '<td class="no">no</td>'
    yield f"<td>{size(memory['weights'])}</td><td>{size(memory['cache'])}</td><td>{memory['cache_tokens']:,}</td>"
    if not roomy:
        yield "<td></td>" * 4
        return
    best = max(roomy, key=lambda row: row["tokens_per_s"])
    yield f"<td>{roomy[0]['tpot_s'] * 1e3:.2f} ms</td><td>{best['tokens_per_s']:,.0f} (batch of {best['batch']})</td>"
    yield f"<td>{best['tokens_per_s_chip']:,.0f}</td>"
    yield f"<td>{best['cost_per_million']:.2f}</td>" if best["cost_per_million"] else "<td></td>"


def _memory(layouts: Sequence[Json]) -> str:
    """A stacked bar a layout; the line is what may be used."""
    most = max(max(sum(found["memory"][key] for key, _ in KINDS), found["memory"]["usable"]) for found in layouts)
    scale, row = (1120 - 300) / most, 30
    bars = []
    for i, found in enumerate(layouts):
        memory, x, y = found["memory"], 300.0, i * row
        bars.append(f'<text x="292" y="{y + 17}" text-anchor="end">{escape(found["name"])}</text>')
        for k, (key, label) in enumerate(KINDS):
            wide = memory[key] * scale
            bars.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="20" fill="{colour(k)}">'
                        f"<title>{label} {size(memory[key])}</title></rect>")  # fmt: skip
            x += wide
        limit = 300 + memory["usable"] * scale
        bars.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{y}" y2="{y + 28}" stroke="#b00" stroke-width="2"/>')
    return f'<svg width="1130" height="{len(layouts) * row + 4}" role="img">{"".join(bars)}</svg>'
