"""What a device cannot say of a block table: checks on host arrays, for tests and debug builds.

Indices out of range are clamped or wrapped on a device, and attention reads another row's keys.
"""

from __future__ import annotations

import numpy as np


def check_block_tables(block_tables: np.ndarray, kv_lens: np.ndarray, num_pages: int, page_size: int) -> None:
    """ValueError with the numbers unless each row's keys lie in pages of the pool.

    block_tables: int [rows, pages_per_seq], kv_lens: int [rows], keys that a row sees (0: idle).
    Every entry must be a page id, [0, num_pages); a row's used ones must not be the trash page (0),
    nor stand twice in it.
    """
    rows, pages_per_seq = block_tables.shape
    if kv_lens.shape != (rows,):
        raise ValueError(f"block_tables has {rows} rows, kv_lens {kv_lens.shape}")
    for row, length in enumerate(kv_lens.tolist()):
        if not 0 <= length <= pages_per_seq * page_size:
            raise ValueError(f"row {row} has {length} keys; {pages_per_seq} pages of {page_size} hold 0 to "
                             f"{pages_per_seq * page_size}")  # fmt: skip
    wrong = np.argwhere((block_tables < 0) | (block_tables >= num_pages))
    if wrong.size:
        row, entry = wrong[0].tolist()
        raise ValueError(f"row {row}, entry {entry} is page {block_tables[row, entry]}; the pool has {num_pages} pages")
    for row, length in enumerate(kv_lens.tolist()):
        used = block_tables[row, : -(-length // page_size)].tolist()
        if 0 in used:
            raise ValueError(f"row {row}, entry {used.index(0)} is the trash page; the row has {length} keys")
        if len(set(used)) < len(used):
            twice = next(page for page in used if used.count(page) > 1)
            raise ValueError(f"row {row} has page {twice} at entries {used.index(twice)} and "
                             f"{used.index(twice, used.index(twice) + 1)}; the row has {length} keys")  # fmt: skip
