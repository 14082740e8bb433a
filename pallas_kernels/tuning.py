"""Measured block sizes, as data: `<op>/tuned.json`, {chip: {key: {parameter: value}}}.

Written by `benchmarks/tune.py`. A shape that nobody measured gets the op's computed choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Trial:
    """Stands in for an op's table while its block sizes are searched."""

    op: str
    parameters: dict[str, int] | None
    keys: set[str] = field(default_factory=set)  # that were looked up


_TRIAL: ContextVar[Trial | None] = ContextVar("trial", default=None)


@cache
def _table(op: str) -> dict[str, dict[str, dict[str, int]]]:
    file = resources.files("pallas_kernels") / op / "tuned.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def lookup(op: str, chip: str, key: str) -> dict[str, int] | None:
    """The tuned parameters of `op` (its folder's name) for a shape's key on a chip, if any."""
    trial = _TRIAL.get()
    if trial is not None and trial.op == op:
        trial.keys.add(key)
        return trial.parameters
    return _table(op).get(chip, {}).get(key)


@contextmanager
def trying(op: str, parameters: dict[str, int] | None) -> Iterator[Trial]:
    """What is traced inside, in this thread, takes `parameters` for whatever key of `op`; None: the computed choice."""
    trial = Trial(op, parameters)
    token = _TRIAL.set(trial)
    try:
        yield trial
    finally:
        _TRIAL.reset(token)
