"""The collectives of a program, read from the text of its HLO: what kind, how many bytes, along which mesh axes.

A call counts as often as it runs in one turn of the step: the body of a loop once, a computation as often as it is
called. What stands in a branch of a condition runs only when it is taken, and is told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from engine.estimate.links import Collective, Kind, merged

_KINDS = "|".join(get_args(Kind))
_CALL = re.compile(rf" = (?P<shape>.+?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_NAMED = re.compile(r"replica_groups=mesh\[[^\]]*\] ?\{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}


@dataclass(frozen=True)
class Found:
    """The calls of one turn of a step: always run, and run in branches that are taken."""

    always: tuple[Collective, ...]
    branches: tuple[Collective, ...]

    def __mul__(self, times: float) -> Found:
        """Of so many turns."""
        return Found(*(tuple(replace(call, count=call.count * times) for call in calls)
                       for calls in (self.always, self.branches)))  # fmt: skip


def collectives_of(text: str, mesh: Sequence[tuple[str, int]]) -> Found:
    """Of a module's text; mesh: names and sizes of the axes, in order. Equal calls are one with their number."""
    entry, computations = _computations(text)
    calls = [(_collective(line, mesh), in_branch) for line, in_branch in _lines(computations, entry, False)]
    return Found(
        merged(call for call, in_branch in calls if call and not in_branch),
        merged(call for call, in_branch in calls if call and in_branch),
    )


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of each computation."""
    found: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%").split("(")[0]
            current = found.setdefault(name, [])
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith(" "):
            current.append(line)
    return entry, found


def _lines(computations: Mapping[str, list[str]], name: str, in_branch: bool) -> Iterator[tuple[str, bool]]:
    """Lines that matter, and whether they are in a branch; called computations in place of their calls."""
    for line in computations.get(name, ()):
        if _CALL.search(line):  # what it applies is the sum itself
            yield line, in_branch
            continue
        branches = _BRANCHES.search(line)
        if branches or "true_computation=" in line:
            named = branches[1].replace("%", "").split(", ") if branches else _CALLED.findall(line)
            for called in named:
                yield from _lines(computations, called, True)
            continue
        for called in _CALLED.findall(line):
            yield from _lines(computations, called, in_branch)


def _collective(line: str, mesh: Sequence[tuple[str, int]]) -> Collective | None:
    call = _CALL.search(line)
    if call is None:
        return None
    shapes = _ARRAY.findall(call["shape"])
    if call["start"] and call["kind"] in ("all-gather", "collective-permute"):
        shapes = shapes[1:2]  # (operand, result, ...)
    kind: Kind = next(kind for kind in get_args(Kind) if kind == call["kind"])
    axes = _axes(line, mesh)
    # The text has what a device is left with; `Collective` has what all of them had.
    parts = math.prod(dict(mesh)[axis] for axis in axes) if kind == "reduce-scatter" else 1
    return Collective(kind, axes, float(parts * sum(_bytes(*shape) for shape in shapes)))


def _bytes(dtype: str, sizes: str) -> float:
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits / 8


def _axes(line: str, mesh: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    named = _NAMED.search(line)
    if named:
        return tuple(name.strip("'\" ") for name in named[1].split(","))
    group = _group(line)
    sizes = [size for _, size in mesh]
    places = [_place(device, sizes) for device in group]
    return tuple(name for i, (name, _) in enumerate(mesh) if len({place[i] for place in places}) > 1)


def _group(line: str) -> list[int]:
    """Devices of the first group, numbered as they stand in the mesh."""
    listed, iota = _LISTED.search(line), _IOTA.search(line)
    if listed:
        return [int(device) for device in listed[1].split(",")]
    if iota is None:
        return []
    sizes = [int(size) for size in iota[3].split(",")]
    order = [int(i) for i in iota[4].split(",")] if iota[4] else list(range(len(sizes)))
    turned = [sizes[i] for i in order]
    strides = [math.prod(sizes[i + 1 :]) for i in order]
    return [sum(a * b for a, b in zip(_place(n, turned), strides, strict=True)) for n in range(int(iota[2]))]


def _place(number: int, sizes: Sequence[int]) -> list[int]:
    """Coordinates of the element in row-major order."""
    place = []
    for size in reversed(sizes):
        number, rest = divmod(number, size)
        place.append(rest)
    return place[::-1]
