"""States kept for prefix reuse: which rows of the state pool hold a copy, and which copy goes when one is wanted.

Knows rows only: nothing of tokens, pages or devices. A copy needs no holder: who starts from one reads it in
the step being planned, and the device takes steps in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class Checkpoints:
    """Every row is free or taken. A taken row is given up, least recently used first, when no row is free."""

    def __init__(self, rows: Sequence[int], on_evict: Callable[[int], None] = lambda row: None) -> None:
        self.rows = tuple(rows)
        self._on_evict = on_evict
        self._free = list(self.rows)
        self._taken: OrderedDict[int, None] = OrderedDict()
        self._unwritten: set[int] = set()  # which the step that is being planned writes

    def begin_step(self) -> None:
        """What the last step's plan took is written before this step reads."""
        self._unwritten.clear()

    def take(self) -> int | None:
        """A row to be written by the step being planned, or None if that step writes every row already."""
        row = next((row for row in self._free if row not in self._unwritten), None)
        if row is None:
            row = next((row for row in self._taken if row not in self._unwritten), None)
            if row is None:
                return None
            self._on_evict(row)
            self.release(row)
        self._free.remove(row)
        self._taken[row] = None
        self._unwritten.add(row)
        return row

    def release(self, row: int) -> None:
        """Its content is not wanted any more."""
        del self._taken[row]
        self._free.append(row)

    def use(self, row: int) -> None:
        """Somebody starts from it: it goes last."""
        self._taken.move_to_end(row)

    def is_written(self, row: int) -> bool:
        """Whether the step being planned may read it."""
        return row not in self._unwritten

    def check(self, known: Iterable[int]) -> None:
        """Conservation: free and taken rows are all there are, and the taken ones are those that somebody knows."""
        if sorted([*self._free, *self._taken]) != sorted(self.rows):
            raise RuntimeError(f"checkpoint rows are lost or doubled: {self._free} free, {list(self._taken)} taken")
        if sorted(known) != sorted(self._taken):
            raise RuntimeError(f"checkpoint rows {sorted(self._taken)} are taken, {sorted(known)} are known")
