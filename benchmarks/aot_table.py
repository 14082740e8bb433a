"""docs/aot.md from what the ahead-of-time tests compiled: op by chip by case, compiled or why not.

    python -m benchmarks.aot_table ROWS.jsonl docs/aot.md        # `make aot-all` does both steps

Rows come from the pytest plugin `tests.pallas_kernels.aot_rows`; of several for a test the last
counts. Every case of the case tables is listed: one without a row was declined by the kernel,
which says why, or was not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import versions
from pallas_kernels.choice import KernelDeclined
from pallas_kernels.grouped_matmul import api as grouped_api
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.paged_attention import api as attention_api
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.quantized import quantized_shape
from pallas_kernels.quantized_matmul import api as quantized_api
from pallas_kernels.quantized_matmul import cases as quantized_cases
from pallas_kernels.target import CHIPS, Target

Row = dict[str, Any]
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
HEAD = """# What compiles ahead of time

Written by `make aot-all` (`benchmarks/aot_table.py`) on {date} with {versions}; no accelerator was at hand.

A cell is the fast memory that the compiled kernel takes: VMEM as libtpu accounts for it on a TPU, shared
memory of a block on a GPU. "yes": compiled, its size is not told. A number in brackets is a reason below:
the kernel declines and the plain JAX reference serves, or the compiler failed. "-": the kernel serves the
case and no row says that it was compiled.

{summary}
"""


@dataclass
class Table:
    """Cells of one op by (case, chip), and the reasons that its cells refer to."""

    cases: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def put(self, case: str, chip: str, text: str) -> None:
        self.cases.setdefault(case, {})[chip] = text

    def reason(self, text: str) -> str:
        if text not in self.reasons:
            self.reasons.append(text)
        return f"[{self.reasons.index(text) + 1}]"


def known() -> Iterable[tuple[str, str, Callable[[Target], Any]]]:
    """(op, case, choice on a target) of every case table."""
    for case in (*attention_cases.CASES, *attention_cases.REAL):
        yield "paged_attention", case.name, lambda t, c=case: attention_api.choice(c.spec(t.platform), t)
    for case in (*grouped_cases.SMALL, *grouped_cases.REAL):
        yield "grouped_matmul", case.name, lambda t, c=case: grouped_api.choice(c.spec(), t)
    for case in quantized_cases.CASES:
        yield "quantized_matmul", case.name, lambda t, c=case: quantized_api.choice(_matmul_spec(c), t)


def _matmul_spec(case: quantized_cases.Case) -> quantized_api.MatmulSpec:
    scales = case.scale_dtype
    packed = quantized_shape((case.k, case.n), case.format, case.group, case.symmetric, case.activations, scales)
    group = case.group or case.k
    return quantized_api.MatmulSpec(
        case.tokens,
        case.k,
        case.n,
        case.dtype,
        case.format,
        group,
        packed.offsets is not None,
        case.activations,
        scales,
    )


def tables(rows: Iterable[Row]) -> dict[str, Table]:
    """By op; the kernels' cases first, then what else has rows (kv_write, whole step programs)."""
    latest = {(row["op"], row["case"], row["chip"]): row for row in rows if row["chip"] in CHIPS}
    found: dict[str, Table] = {}
    for op, case, choice in known():
        table = found.setdefault(op, Table())
        for chip, facts in CHIPS.items():
            target = Target(facts.platform, chip)
            why = declined(choice, target)
            table.put(case, chip, cell(latest.pop((op, case, chip), None), table) if why is None else table.reason(why))
    listed = {(op, case) for op, table in found.items() for case in table.cases}
    for (op, case, chip), row in latest.items():
        if (op, case) not in listed:
            table = found.setdefault(op, Table())
            table.put(case, chip, cell(row, table))
    return found


def declined(choice: Callable[[Target], Any], target: Target) -> str | None:
    """Why the platform's kernel does not serve the case."""
    try:
        made = choice(target)
    except (KernelDeclined, RuntimeError) as reason:
        return str(reason)
    return None if made.implementation.name == target.platform else dict(made.declined).get(target.platform)


def cell(row: Row | None, table: Table) -> str:
    if row is None:
        return "-"
    if row["outcome"] == "failed":
        return f"**fails** {table.reason(row['why'] or 'no message')}"
    compiled = row["compiled"]
    if compiled is None and row["why"]:
        return table.reason(row["why"])
    scratch = compiled["scratch_bytes"] if compiled is not None else None
    return size(scratch) if scratch else "yes"


def size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 1 << 20 else f"{number / 2**10:.0f} KiB"


def counts(name: str, table: Table) -> list[str]:
    """A row of the summary: compiled, declined, failed, not run."""
    cells = [text for by in table.cases.values() for text in by.values()]
    failed = sum(text.startswith("**fails**") for text in cells)
    declined = sum(text.startswith("[") for text in cells)
    missing = cells.count("-")
    return [name, *map(str, (len(cells) - failed - declined - missing, declined, failed, missing))]


def render(found: dict[str, Table], today: str) -> str:
    used = ", ".join(f"{name} {number}" for name, number in versions(*COMPILERS).items())
    summary = markdown(
        ("op", "compiled", "declined", "failed", "not run"), [counts(op, table) for op, table in found.items()]
    )
    parts = [HEAD.format(date=today, versions=used, summary=summary)]
    for op, table in found.items():
        rows = [[case, *(by.get(chip, "") for chip in CHIPS)] for case, by in table.cases.items()]
        reasons = [f"{index}. {reason}" for index, reason in enumerate(table.reasons, 1)]
        parts += [f"## {op}\n", markdown(("case", *CHIPS), rows) + "\n", *(["\n".join(reasons) + "\n"] * bool(reasons))]
    return "\n".join(parts)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines that the tests left")
    parser.add_argument("page", type=Path, help="the page to write")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    found = tables(rows)
    args.page.write_text(render(found, datetime.datetime.now(datetime.UTC).date().isoformat()))
    for op, table in found.items():
        print(*counts(op, table))


if __name__ == "__main__":
    main()
