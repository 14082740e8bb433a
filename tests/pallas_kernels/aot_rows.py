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
    if file is not None and call.when == "call" and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(row(item, report)) + "\n")
    return report


def notes() -> list[Any]:
    """What `aot.compile_op` noted, if a test has imported it."""
    return getattr(sys.modules.get("tests.pallas_kernels.aot"), "NOTES", [])


def row(item: pytest.Function, report: pytest.TestReport) -> dict[str, Any]:
    """op, chip, case, outcome, and the last compilation's figures if there was one."""
    params = item.callspec.params
    chip = params.get("chip")
    case = params.get("name") or getattr(params.get("case"), "name", None)
    note = notes()[-1] if notes() else None
    return {
        "op": op_of(item),
        "chip": chip,
        "case": case or item.callspec.id,
        "outcome": report.outcome,
        "why": message(report),
        "seconds": round(report.duration, 1),
        "compiled": asdict(note) if note is not None else None,
    }


def op_of(item: pytest.Function) -> str:
    """A folder of pallas_kernels, or "step" for whole programs."""
    if "kv_write" in item.name:
        return "kv_write"
    stem = item.path.stem.removeprefix("test_aot").lstrip("_")
    return stem.removesuffix("_gpu").removesuffix("_tpu") or "step"


def message(report: pytest.TestReport) -> str | None:
    """In one line: what was skipped or went wrong."""
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr)).splitlines()[0][:200]
