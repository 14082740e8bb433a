"""A pytest plugin: what each ahead-of-time test compiled, a JSON line a test.

    python -m pytest -p tests.pallas_kernels.aot_rows -m aot --aot-rows rows.jsonl

Lines are appended as tests end, so that a run that is cut short has told what it did;
`benchmarks/aot_table.py` makes docs/aot.md of them. It imports no JAX before tests/conftest.py has set it up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--aot-rows", type=Path, help="append what each test compiled to this file, as JSON lines")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if call.when == "setup":
        notes().clear()
    file: Path | None = item.config.getoption("--aot-rows")
    if file is not None and call.when == "call" and tells(item):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(row(item, report)) + "\n")
    return report


def tells(item: pytest.Item) -> bool:
    """Whether the test compiles a case for a chip."""
    return isinstance(item, pytest.Function) and "chip" in getattr(getattr(item, "callspec", None), "params", {})


def notes() -> list[Any]:
    """What `aot.compile_op` noted, if a test has imported it."""
    return getattr(sys.modules.get("tests.pallas_kernels.aot"), "NOTES", [])


def row(item: Any, report: pytest.TestReport) -> dict[str, Any]:
    """op, chip, case, outcome, and the last compilation's figures if there was one."""
    params = item.callspec.params
    place = str(params.get("chip"))
    case = params.get("name") or getattr(params.get("case"), "name", None)
    note = notes()[-1] if notes() else None
    return {
        "op": op_of(item),
        "chip": place.partition(":")[0],  # of "v6e:2x2", as whole programs have it
        "case": case or item.callspec.id.replace(place, "").strip("-"),
        "outcome": report.outcome,
        "why": message(report),
        "seconds": round(report.duration, 1),
        "compiled": asdict(note) if note is not None else None,
    }


def op_of(item: pytest.Item) -> str:
    """A folder of pallas_kernels, or "steps" for whole programs."""
    if item.path.parent.name != "pallas_kernels":
        return "steps"
    if "kv_write" in item.name:
        return "kv_write"
    stem = item.path.stem.removeprefix("test_aot").lstrip("_")
    return stem.removesuffix("_gpu").removesuffix("_tpu")


def message(report: pytest.TestReport) -> str | None:
    """In one line: what was skipped or went wrong."""
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr)).splitlines()[0][:200]
