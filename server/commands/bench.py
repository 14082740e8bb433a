"""`octavo bench ...`: the group's rows of the table of commands, and their options.

Imported to print help, so it stays light: what measures is in the modules that `run` names.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import EngineOptions, option
from engine.errors import InvalidParam
from server.commands.command import Command

HELP = "measure: start-up"


def at_least(options: object, **bounds: float) -> None:
    """Raises InvalidParam for the first of these fields that is set and below its bound."""
    for name, low in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise InvalidParam(name, f"must be at least {low}, got {value}")


@dataclass(frozen=True, kw_only=True)
class BenchStartupOptions:
    repeats: int = option(3, "cold and warm starts; the median is reported")
    backend: str = option("cpu", "what the server runs on; names the result")
    result_dir: str | None = option(None, "folder to write the result to, as <date>-<backend>-startup.json")

    def __post_init__(self) -> None:
        at_least(self, repeats=1)


COMMANDS = (
    Command(
        name="bench startup",
        help="seconds from process start to ready, cold and warm, by phase, and memory",
        run="server.commands.bench_startup:run",
        options=(EngineOptions, BenchStartupOptions),
        positional=("model",),
    ),
)
