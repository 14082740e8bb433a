"""What shapes compiled programs, field by field: it names their folder, and says why others are refused."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxlib import version as jaxlib_version

_PACKAGES = ("engine", "pallas_kernels", "sharding")
_NAMED = re.compile(rb'"((?:engine|pallas_kernels|sharding)(?:\.\w+)+)"')  # a module that is imported by its name
_DATA = ("*.json", "*.cc", "*.h")  # beside the modules: tuned block sizes, the kernels that programs call
_CPU = "cpu features"
_HOST_ONLY = {"config.enable_prefix_caching", "config.overlap", "config.max_queued_requests", "config.seed",
              "config.tpot_slo_s", "config.fewest_decode_steps", "config.decode_call_s"}  # fmt: skip
_MAX_TOLD = 8


@dataclass(frozen=True)
class ProgramKey:
    """Everything that shapes the machine code of a closed set of programs, by name."""

    fields: Mapping[str, str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dict(self.fields), sort_keys=True).encode()).hexdigest()[:32]

    def refusals(self, here: ProgramKey) -> list[str]:
        """Why programs of this key are not those of `here`: a reason a field; empty where they are.

        A CPU may have more features than the programs were compiled for.
        """
        found = []
        for name in dict.fromkeys((*here.fields, *self.fields)):
            theirs, ours = self.fields.get(name, "nothing"), here.fields.get(name, "nothing")
            if theirs == ours:
                continue
            if name == _CPU:
                lacking = sorted(set(theirs.split()) - set(ours.split()))
                found += [f"{name}: {' '.join(lacking)} there, not here"] if lacking else []
            else:
                found.append(f"{name}: {_brief(theirs)} there, {_brief(ours)} here")
        left = len(found) - _MAX_TOLD
        return found if left <= 0 else [*found[:_MAX_TOLD], f"and {left} more"]


def program_key(module: str, **facts: Any) -> ProgramKey:
    """Of the programs that are made in `module`, whose source, and all that it imports, shapes them, from `facts`
    (dataclasses), on this process's devices."""
    device = jax.devices()[0]
    fields = {
        "made in": module,
        "jax": jax.__version__,
        "jaxlib": jaxlib_version.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "runtime": device.client.platform_version,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    if device.platform == "cpu":
        fields[_CPU] = _cpu_features()
    for name, value in facts.items():
        fields |= _flat(name, value)
    for name, source in sorted(sources_of(module).items()):
        fields[f"source of {name}"] = hashlib.sha256(source).hexdigest()[:16]
    return ProgramKey(fields)


def _flat(name: str, value: Any) -> dict[str, str]:
    if not dataclasses.is_dataclass(value):
        return {name: repr(value)}
    found = {f"{name}.{field.name}": repr(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {field: text for field, text in found.items() if field not in _HOST_ONLY}


def _brief(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:48]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def sources_of(module: str, root: Path = Path(__file__).parent.parent) -> dict[str, bytes]:
    """What can shape a module's programs: every module of ours that it imports, directly or not, and the data
    beside them."""
    found: dict[str, bytes] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or name.split(".")[0] not in _PACKAGES or not path.exists():
            continue
        found[name] = path.read_bytes()
        if path.name == "__init__.py":
            beside = sorted(file for pattern in _DATA for file in path.parent.glob(pattern))
            found |= {f"{name}/{file.name}": file.read_bytes() for file in beside}
        todo += _imported(found[name])
    return found


def _imported(source: bytes) -> Iterator[str]:
    """Names that a module imports at its top, but not for types, and those that it has in quotes."""
    yield from (name.decode() for name in _NAMED.findall(source))
    for node in ast.parse(_top(source)).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def _top(source: bytes) -> bytes:
    """What stands before the first function or class, where imports are: parsing all of it takes five times as long."""
    lines = source.splitlines(keepends=True)
    starts = (b"def ", b"class ", b"async def ", b"@")
    end = next((i for i, line in enumerate(lines) if line.startswith(starts)), len(lines))
    return b"".join(lines[:end])


def _cpu_features() -> str:
    """Machine code of one CPU may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return line.partition(":")[2].strip()
