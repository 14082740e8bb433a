"""What every benchmark ends with: a table for people, one line of JSON, and a result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine in words that outlive it: no host name, no paths."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wide)})"


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; the first is left-aligned, numbers right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for first, *numbers in cells:
        lines.append(
            "  ".join([first.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))])
        )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def folder(name: str | None) -> Path | None:
    """Of an option that may be absent."""
    return None if name is None else Path(name)


def rounded(value: Any) -> Any:
    """Floats anywhere in it to four digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def finish(name: str, backend: str, result: dict[str, Any], to: Path | None = RESULTS) -> None:
    """Writes <date>-<backend>-<name>.json to the folder, when there is one, and prints the same as the last line."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    whole = {"benchmark": name, "date": today, "backend": backend, "machine": machine()} | result
    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        (to / f"{today}-{backend}-{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole))
