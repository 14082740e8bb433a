"""The `octavo` command: one table of commands, their options, and where they live.

Imports nothing heavy: help, `models` and a misspelt option answer without loading JAX.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.config import EngineOptions
from engine.errors import OctavoError
from engine.request import SamplingParams
from server.commands import bench
from server.commands import options as command_options
from server.commands.command import Command
from server.config import ServerOptions
from server.options import Option, UsageError, add_flags, build, nearest, options_of, read_file

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


COMMANDS = (
    Command(
        name="serve",
        help="serve a model over HTTP, with OpenAI's API",
        run="server.run:serve",
        options=(EngineOptions, ServerOptions),
        positional=("model",),
    ),
    Command(
        name="generate",
        help="continue a text, streaming to the terminal",
        run="server.commands.generate:run",
        options=(EngineOptions, command_options.GenerateOptions, SamplingParams),
        positional=("prompt",),
        defaults={"max_tokens": 256},
        more_help=command_options.SAMPLING_HELP,
    ),
    Command(
        name="chat",
        help="talk to a model in the terminal",
        run="server.commands.chat:run",
        options=(EngineOptions, command_options.ChatOptions, SamplingParams),
        positional=("model",),
        defaults={"max_tokens": None},
        more_help={name: text for name, text in command_options.SAMPLING_HELP.items() if name != "n"},
    ),
    Command(
        name="batch",
        help="answer a file of requests in OpenAI's batch format; can be killed and resumed",
        run="server.commands.batch:run",
        options=(EngineOptions, command_options.BatchOptions),
    ),
    Command(
        name="models",
        help="list the models known by name",
        run="server.commands.models:run",
        options=(command_options.ModelsOptions,),
    ),
    Command(
        name="convert",
        help="write a model as an Orbax checkpoint, which loads fastest",
        run="server.commands.convert:run",
        options=(EngineOptions, command_options.ConvertOptions),
        positional=("model", "out"),
    ),
    Command(
        name="compile",
        help="compile what serving a model takes, for this kind of machine, into a folder that serve --programs loads",
        run="server.commands.compile:run",
        options=(EngineOptions, command_options.CompileOptions),
        positional=("model",),
    ),
    Command(
        name="sharding",
        help="explain how a model is cut over devices, which need not be there",
        run="server.commands.sharding:run",
        options=(EngineOptions, command_options.ShardingOptions),
        positional=("action", "model"),
        defaults={"sharding": "tp"},
    ),
    Command(
        name="plan",
        help="say what a model would hold, take and cost on chips that need not be there",
        run="server.commands.plan:run",
        options=(EngineOptions, command_options.PlanOptions),
        positional=("model",),
    ),
    *bench.COMMANDS,
    Command(name="version", help="print versions", run="server.commands.version:run"),
)
GROUPS = {"bench": bench.HELP}  # commands whose names are of two words


class Parser(argparse.ArgumentParser):
    """argparse with errors as exceptions, so that `main` alone prints and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def command_fields(command: Command) -> list[list[Option]]:
    """The options of each of the command's classes."""
    return [options_of(cls, command.more_help) for cls in command.options]


def make_parser() -> Parser:
    parser = Parser(prog="octavo", description="Serve language models on TPU, GPU and CPU.", allow_abbrev=False)
    parser.add_argument("--version", action="store_const", const="version", dest="command", help="print versions")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND")
    groups = {
        name: choices.add_parser(name, help=text, description=text, allow_abbrev=False).add_subparsers(
            metavar="COMMAND"
        )
        for name, text in GROUPS.items()
    }
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        add_command(groups.get(group, choices), name, command)
    return parser


def add_command(choices: argparse._SubParsersAction[Parser], name: str, command: Command) -> None:
    """The command's parser, with a flag for each of its options."""
    places = "".join(f" [{name.upper()}]" for name in command.positional)
    usage = f"octavo {command.name}{' [OPTIONS]' if command.options else ''}{places}"
    sub = choices.add_parser(name, usage=usage, help=command.help, description=command.help, allow_abbrev=False)
    sub.set_defaults(command=command.name)
    taken: set[str] = set()  # a name that two classes share (seed) is one flag and sets both
    for cls, fields in zip(command.options, command_fields(command), strict=True):
        group = sub.add_argument_group(f"{cls.__name__.removesuffix('Options').removesuffix('Params').lower()} options")
        add_flags(group, [option for option in fields if option.name not in taken], command.defaults)
        taken |= {option.name for option in fields}
    for name in command.positional:
        sub.add_argument(
            f"by_place_{name}", metavar=name.upper(), nargs="?", default=argparse.SUPPRESS, help=f"same as --{name}"
        )
    if command.options:
        sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of these options")


def parse(argv: Sequence[str]) -> tuple[Command, list[Any]]:
    """The command and its options objects: flag, else file, else default. Raises UsageError."""
    namespace, unknown = make_parser().parse_known_args(argv)
    command = next((c for c in COMMANDS if c.name == namespace.command), None)
    if command is None:
        group = f"{namespace.command} " if namespace.command in GROUPS else ""
        names = [c.name for c in COMMANDS if c.name.startswith(group)]
        raise UsageError(f"name a command: {', '.join(names)} (see octavo {group}--help)")
    fields = command_fields(command)
    if unknown:
        flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        if flag is None:
            raise UsageError(f"unexpected argument {unknown[0]!r} (see octavo {command.name} --help)")
        known = [name for group in fields for option in group for name in option.flags]
        raise UsageError(f"unknown option {flag}{nearest(flag, known)}")
    flags = flag_values(command, vars(namespace))
    values = dict(command.defaults)
    if getattr(namespace, "config", None):
        others = {o.name: c.name for c in reversed(COMMANDS) for group in command_fields(c) for o in group}
        in_file, notes = read_file(namespace.config, [o for group in fields for o in group], others)
        values |= in_file
        for note in notes:
            print(f"octavo: note: {note}", file=sys.stderr)
    values |= flags
    return command, [build(cls, group, values) for cls, group in zip(command.options, fields, strict=True)]


def flag_values(command: Command, given: dict[str, Any]) -> dict[str, Any]:
    """What the command line set, with arguments by place under their field's name."""
    flags = dict(given)
    for name in command.positional:
        value = flags.pop(f"by_place_{name}", None)
        if value is None:
            continue
        if flags.get(name, value) != value:
            raise UsageError(f"{name} is given twice: {value!r} and --{name} {flags[name]!r}")
        flags[name] = value
    return flags


def _imported(run: str) -> Callable[..., int]:
    """The function of "module:name". What modules make lives as long as the process: no collection walks it."""
    module, function = run.split(":")
    gc.disable()
    try:
        return getattr(importlib.import_module(module), function)
    finally:
        gc.enable()
        gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. A known error is one line on stderr; only a bug in Octavo shows a traceback."""
    try:
        command, options = parse(sys.argv[1:] if argv is None else argv)
        return _imported(command.run)(*options)
    except OctavoError as error:
        print(f"octavo: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except KeyboardInterrupt:
        print("octavo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
