"""Block tables that would read another row's keys are refused, with the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.paged_attention.checks import check_block_tables
from tests.pallas_kernels.attention_calls import fill

GOOD = [[3, 1, 0], [2, 5, 6], [0, 0, 0]]
LENGTHS = [20, 48, 0]


def check(tables: list[list[int]], lengths: list[int]) -> None:
    check_block_tables(np.asarray(tables, np.int32), np.asarray(lengths, np.int32), num_pages=7, page_size=16)


def test_tables_of_steps_pass() -> None:
    check(GOOD, LENGTHS)
    for name in ("decode_idle_rows", "prefill_ragged"):
        case = next(case for case in CASES if case.name == name)
        call = fill(case)
        check_block_tables(call.tables, np.asarray(case.lengths), call.pages.shape[0], case.page_size)


@pytest.mark.parametrize(
    ("row", "table", "length", "message"),
    [
        (0, [3, 7, 0], 20, "row 0, entry 1 is page 7; the pool has 7 pages"),
        (1, [2, 5, -1], 40, "row 1, entry 2 is page -1; the pool has 7 pages"),
        (2, [0, 0, 9], 0, "row 2, entry 2 is page 9; the pool has 7 pages"),
        (0, [3, 0, 0], 17, "row 0, entry 1 is the trash page; the row has 17 keys"),
        (1, [2, 5, 2], 33, "row 1 has page 2 at entries 0 and 2; the row has 33 keys"),
        (1, [2, 5, 6], 49, "row 1 has 49 keys; 3 pages of 16 hold 0 to 48"),
        (2, [0, 0, 0], -1, "row 2 has -1 keys; 3 pages of 16 hold 0 to 48"),
    ],
)
def test_others_are_refused_with_their_numbers(row: int, table: list[int], length: int, message: str) -> None:
    tables, lengths = [list(entries) for entries in GOOD], list(LENGTHS)
    tables[row], lengths[row] = table, length
    with pytest.raises(ValueError, match=message):
        check(tables, lengths)


def test_rows_without_a_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_tables has 3 rows, kv_lens \(2,\)"):
        check(GOOD, LENGTHS[:2])
