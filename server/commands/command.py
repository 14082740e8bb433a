"""One row of the table of commands. A name of two words is a command of a group: `bench serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """`run` is "module:function", imported when the command is called; it takes one instance of
    each class in `options`, in order, and returns the exit code."""

    name: str
    help: str
    run: str
    options: tuple[type, ...] = ()
    positional: tuple[str, ...] = ()  # fields that may also be given by place
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where the field's own does not suit
    more_help: Mapping[str, str] = field(default_factory=dict)  # for classes without help on their fields
