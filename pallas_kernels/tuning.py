"""Measured block sizes, as data: `<op>/tuned.json`, {chip: {key: {parameter: value}}}.

Written by `benchmarks/tune.py`. A shape that nobody measured gets the op's computed choice.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources


@cache
def _table(op: str) -> dict[str, dict[str, dict[str, int]]]:
    file = resources.files("pallas_kernels") / op / "tuned.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def lookup(op: str, chip: str, key: str) -> dict[str, int] | None:
    """The tuned parameters of `op` (its folder's name) for a shape's key on a chip, if any."""
    return _table(op).get(chip, {}).get(key)
