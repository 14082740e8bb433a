"""Options dataclasses as command-line flags and as a YAML file: one list of fields, two spellings.

Knows nothing about any one option; what exists and what it means stands on the dataclass fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.errors import InvalidParam, OctavoError

Kind = Literal["text", "integer", "number", "switch", "choice", "texts", "integers", "mapping"]
# Other engines' names for the same thing, and short forms.
ALIASES = {
    "page_size": ("--block-size",),
    "input": ("-i", "--input-file"),
    "output": ("-o", "--output-file"),
    "out": ("-o",),
    "url": ("--base-url",),
    "slo": ("--goodput",),
    "max_concurrency": ("--concurrency",),
    "request_rate": ("--rate",),
    "input_len": ("--input-tokens",),
    "output_len": ("--output-tokens",),
}


class UsageError(OctavoError):
    """The command line or the options file is wrong; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of an options dataclass, as a user meets it."""

    name: str  # as in YAML and Python: max_model_len
    kind: Kind
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is a legal value
    required: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """The option's spellings on the command line, the main one first."""
        return ("--" + self.name.replace("_", "-"), *ALIASES.get(self.name, ()))


def options_of(cls: type, help_of: Mapping[str, str]) -> list[Option]:
    """The fields of `cls`. Help comes from the field's metadata, else from `help_of`, which then
    also chooses: a field with neither is not for the command line."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        text = field.metadata.get("help") or help_of.get(field.name)
        if text is None:
            continue
        kind, choices, optional = _kind(field.name, hints[field.name])
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if field.default is dataclasses.MISSING else field.default
        found.append(
            Option(
                name=field.name, kind=kind, help=text, default=default,
                choices=choices, optional=optional, required=required,
            )
        )  # fmt: skip
    return found


def _kind(name: str, hint: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """(kind, choices, optional) of a type annotation."""
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in parts if part is not type(None)]
        if len(inner) == 1:
            kind, choices, _ = _kind(name, inner[0])
            return kind, choices, True
    if typing.get_origin(hint) is Literal:
        return "choice", tuple(str(part) for part in parts), False
    if typing.get_origin(hint) is tuple and parts in ((str, ...), (int, ...)):
        return ("texts" if parts[0] is str else "integers"), (), False
    if typing.get_origin(hint) is Mapping:
        return "mapping", (), False
    plain: dict[Any, Kind] = {str: "text", int: "integer", float: "number", bool: "switch", Path: "text"}
    if hint in plain:
        return plain[hint], (), False
    raise TypeError(f"option {name} has type {hint}, which no flag can carry")


def add_flags(parser: argparse._ActionsContainer, options: Iterable[Option], defaults: Mapping[str, Any]) -> None:
    """One flag an option. What is not given is absent from the namespace, so a file can supply it."""
    for option in options:
        value = defaults.get(option.name, option.default)
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        shown = "" if value in (None, (), "") or "(default" in option.help else f" (default: {word})"
        words: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
        words["help"] = (option.help + shown).replace("%", "%%")
        if option.kind == "switch":
            words["action"] = argparse.BooleanOptionalAction
        elif option.kind == "texts":
            words |= {"action": "append", "type": str}
            words["help"] += "; may be given several times"
        elif option.kind == "integers":
            words |= {"action": "extend", "type": integers}
        else:
            words["type"] = {"integer": int, "number": float, "mapping": json_object}.get(option.kind, str)
        if option.choices:
            words["choices"] = option.choices
        elif option.kind != "switch":
            words["metavar"] = {"integer": "N", "integers": "N", "number": "X", "mapping": "JSON"}.get(
                option.kind, "TEXT"
            )
        parser.add_argument(*option.flags, **words)


def integers(text: str) -> list[int]:
    """A flag's value written as 1,4,16."""
    return [int(part) for part in text.split(",")]


def json_object(text: str) -> dict[Any, Any]:
    """A flag's value written as JSON. Keys that are whole numbers become integers (token ids)."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return _whole_number_keys(value)


def _whole_number_keys(value: Mapping[Any, Any]) -> dict[Any, Any]:
    return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()}


def read_file(path: Path, mine: Iterable[Option], others: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """(values for these options, notes) from a YAML file.

    One file may serve several commands: `others` maps the options of other commands to the
    command's name, and such a line is passed over with a note. A name that no command knows,
    or a value of the wrong type, raises UsageError.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise UsageError(f"--config {path}: must hold 'name: value' lines")
    known = {option.name: option for option in mine}
    values: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in (data or {}).items():
        name = str(key).replace("-", "_")
        if name in values:
            raise UsageError(f"--config {path}: {name} is given twice")
        if name in known:
            values[name] = _checked(path, known[name], value)
        elif name in others:
            notes.append(f"{path}: {name} is for octavo {others[name]}; not used here")
        else:
            raise UsageError(f"--config {path}: unknown option {key}{nearest(name, [*known, *others])}")
    return values, notes


def _checked(path: Path, option: Option, value: Any) -> Any:
    """`value` as the option's type, or UsageError. YAML has types, so nothing is converted from text."""
    if value is None and option.optional:
        return None
    kinds: dict[Kind, type | tuple[type, ...]] = {
        "text": str, "choice": str, "integer": int, "number": (int, float), "switch": bool,
        "texts": list, "integers": list, "mapping": dict,
    }  # fmt: skip
    wants = {"text": "text", "switch": "true or false", "texts": "a list of texts", "integers": "a list of integers",
             "integer": "an integer", "mapping": "names with values"}  # fmt: skip
    want = f"one of {', '.join(option.choices)}" if option.choices else wants.get(option.kind, f"a {option.kind}")
    ok = isinstance(value, kinds[option.kind]) and (option.kind == "switch" or not isinstance(value, bool))
    ok = ok and (not option.choices or value in option.choices)
    if ok and isinstance(value, list):
        item = str if option.kind == "texts" else int
        ok = all(isinstance(part, item) and not isinstance(part, bool) for part in value)
    if not ok:
        raise UsageError(f"--config {path}: {option.name} must be {want}, got {value!r}")
    return _whole_number_keys(value) if isinstance(value, dict) else value


def build(cls: type, options: Iterable[Option], values: Mapping[str, Any]) -> Any:
    """`cls` from what was given. A value that the dataclass refuses is a UsageError naming the flag."""
    given = {}
    for option in options:
        if option.name in values:
            value = values[option.name]
            given[option.name] = tuple(value) if isinstance(value, list) else value
        elif option.required:
            raise UsageError(f"{option.flags[0]} is required")
    try:
        return cls(**given)
    except InvalidParam as error:
        raise UsageError(f"--{error.param.replace('_', '-')}: {error.message}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' when something is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
