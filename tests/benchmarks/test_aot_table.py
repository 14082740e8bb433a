"""docs/aot.md says of every case what the tests found, and why where they found nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.aot_table import counts, render, tables


def row(case: str, chip: str, op: str = "quantized_matmul", **changes: Any) -> dict[str, Any]:
    compiled = {"chip": chip, "scratch_bytes": 3 << 20, "temp_bytes": 0}
    plain = {"op": op, "chip": chip, "case": case, "outcome": "passed", "why": None, "seconds": 1.0}
    return plain | {"compiled": compiled} | changes


def test_cells_say_compiled_declined_failed_or_not_run() -> None:
    rows = [
        row("int8", "v6e", outcome="failed", why="an old run"),
        row("int8", "v6e"),
        row("int8", "h100", outcome="failed", why="ptxas: no registers", compiled=None),
        row("int8", "v5p", compiled={"chip": "v5p", "scratch_bytes": None, "temp_bytes": 0}),
        row("decode_int8", "v6e", op="kv_write"),
        row("decode_int8", "v5e", op="kv_write"),
    ]
    found = tables(rows)
    table = found["quantized_matmul"]
    cells = table.cases["int8"]
    assert cells["v6e"] == "3.0 MiB" and cells["v5p"] == "yes" and cells["v5e"] == "-"
    number = int(cells["h100"].removeprefix("**fails** [").removesuffix("]"))
    assert table.reasons[number - 1] == "ptxas: no registers"
    declined = table.cases["llama_8b_qkv_int8_4096"]["h200"]
    assert "4096 tokens are over 512" in table.reasons[int(declined.strip("[]")) - 1]
    assert found["kv_write"].cases == {"decode_int8": {"v6e": "3.0 MiB", "v5e": "3.0 MiB"}}
    assert counts("kv_write", found["kv_write"]) == ["kv_write", "2", "0", "0", "0"]
    page = render(found, "2026-11-21")
    assert (
        "| decode_int8 | 3.0 MiB |  | 3.0 MiB |" in page and "ptxas: no registers" in page and "on 2026-11-21" in page
    )
