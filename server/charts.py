"""Charts as inline SVG and the page around them: nothing is fetched from anywhere, so the file can be sent as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]  # of a value on the drawing

COLOURS = ("#3366cc", "#dc6912", "#109618", "#990099", "#0099c6", "#b82e2e", "#66aa00", "#dd4477")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 70, 46, 14, 14
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: 3px 10px; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
.no { color: #b00 } svg { margin: 0 1em 1em 0 } text { font-size: 11px; fill: #444 } pre { overflow-x: auto }
i { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 14px }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</html>\n"


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def legend(labels: Sequence[str]) -> str:
    marks = (f'<i style="background:{colour(i)}"></i>{escape(label)}' for i, label in enumerate(labels))
    return f"<p>{''.join(marks)}</p>"


def curves(lines: Sequence[Points], title: str, over: str, *, log: bool = True) -> str:
    """A line for each of `lines` over a logarithmic (or even) x, of which `over` says what it is; y starts at 0."""
    points = [point for line in lines for point in line]
    if not points:
        return f"<p>{escape(title)}: no values.</p>"
    low, high = (_along(pick(x for x, _ in points), log) for pick in (min, max))
    top = _round_up(max(y for _, y in points))
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (_along(x, log) - low) / (high - low or 1) * wide, TOP + (1 - y / top) * tall

    drawn = [_axis(at, sorted({x for x, _ in points}), top, f"{title}, over the {over}")]
    for i, line in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour(i)}" stroke-width="2"/>')
        for point in line:
            x, y = at(*point)
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour(i)}"><title>{escape(over)} '
                         f"{point[0]:,.4g}: {point[1]:,.2f}</title></circle>")  # fmt: skip
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _along(x: float, log: bool) -> float:
    return math.log2(x) if log else x


def _axis(at: Place, values: Sequence[float], top: float, title: str) -> str:
    marks = [f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(title)}</text>']
    for value in values:
        x, y = at(value, 0)
        marks.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:,.4g}</text>')
    for value in (top * step / 4 for step in range(5)):
        y = at(values[0], value)[1]
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    return "".join(marks)


def _round_up(value: float) -> float:
    """To one of 1, 2, 4, 5, 8, 10 times a power of ten."""
    scale = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return next(step * scale for step in (1, 2, 4, 5, 8, 10) if step * scale >= value)
