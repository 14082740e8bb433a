"""The HTML page of `octavo plan`: charts as inline SVG, nothing fetched from anywhere.

Made of the facts that `octavo plan --json` prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from server.plan_text import size, table

Json = dict[str, Any]
Points = Sequence[tuple[float, float]]

COLOURS = ("#3366cc", "#dc6912", "#109618", "#990099", "#0099c6", "#b82e2e", "#66aa00", "#dd4477")
KINDS = (("weights", "weights"), ("slots", "slots"), ("states", "recurrent states"), ("temporary", "temporaries"),
         ("cache", "KV cache"))  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 70, 46, 14, 14
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: 3px 10px; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
.no { color: #b00 } svg { margin: 0 1em 1em 0 } text { font-size: 11px; fill: #444 } pre { overflow-x: auto }
i { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 14px }
"""


def page(model: str, layouts: Sequence[Json]) -> str:
    """A self-contained page of `facts` of layouts."""
    lines = [f"<h1>{escape(model)}</h1>", "<p>Sizes are of one device. Times are bounds: what published peak rates ",
             "allow for what a step computes, reads and sends.</p>", "<h2>Layouts side by side</h2>", _summary(layouts),
             "<h2>Memory of a device</h2>", _legend([label for _, label in KINDS]), _memory(layouts),
             "<h2>Time and throughput against batch</h2>", _legend([found["name"] for found in layouts])]  # fmt: skip
    for key, scale, title in (("tpot_s", 1e3, "TPOT, ms"), ("tokens_per_s", 1, "tokens a second")):
        curves = [[(row["batch"], row[key] * scale) for row in found["decode"] if row["has_room"]] for found in layouts]
        lines.append(_curves(curves, title))
    lines += ["<h2>All of it</h2>", f"<pre>{escape(table(model, layouts))}</pre>"]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>octavo plan: {escape(model)}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(lines)}</html>\n"


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


def _legend(labels: Sequence[str]) -> str:
    marks = (f'<i style="background:{_colour(i)}"></i>{escape(label)}' for i, label in enumerate(labels))
    return f"<p>{''.join(marks)}</p>"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


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
            bars.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="20" fill="{_colour(k)}">'
                        f"<title>{label} {size(memory[key])}</title></rect>")  # fmt: skip
            x += wide
        limit = 300 + memory["usable"] * scale
        bars.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{y}" y2="{y + 28}" stroke="#b00" stroke-width="2"/>')
    return f'<svg width="1130" height="{len(layouts) * row + 4}" role="img">{"".join(bars)}</svg>'


def _curves(curves: Sequence[Points], title: str) -> str:
    """A line a layout over a logarithmic batch; the other axis starts at 0."""
    points = [point for curve in curves for point in curve]
    if not points:
        return f"<p>{title}: nothing has room, or no peak rates are known.</p>"
    low, high = (math.log2(pick(x for x, _ in points)) for pick in (min, max))
    top = _round_up(max(y for _, y in points))
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP

    def at(x: float, y: float) -> str:
        along = (math.log2(x) - low) / (high - low or 1)
        return f"{LEFT + along * wide:.1f},{TOP + (1 - y / top) * tall:.1f}"

    drawn = [_axis(at, sorted({x for x, _ in points}), top, title)]
    for i, curve in enumerate(curves):
        path = " ".join(at(*point) for point in curve)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="2"/>')
        for point in curve:
            x, y = at(*point).split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{_colour(i)}"><title>batch of {point[0]:.0f}: '
                         f"{point[1]:,.2f}</title></circle>")  # fmt: skip
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _axis(at: Any, batches: Sequence[float], top: float, title: str) -> str:
    marks = [f'<text x="{LEFT}" y="{HEIGHT - 4}">{title}, over the batch</text>']
    for batch in batches:
        x, y = at(batch, 0).split(",")
        marks.append(f'<text x="{x}" y="{float(y) + 16:.1f}" text-anchor="middle">{batch:.0f}</text>')
    for value in (top * step / 4 for step in range(5)):
        y = at(batches[0], value).split(",")[1]
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    return "".join(marks)


def _round_up(value: float) -> float:
    """To one of 1, 2, 4, 5, 8, 10 times a power of ten."""
    scale = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return next(step * scale for step in (1, 2, 4, 5, 8, 10) if step * scale >= value)
