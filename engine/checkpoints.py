"""States kept for prefix reuse: which rows of the state pool hold a copy, and which copy goes when one is wanted.

Knows rows only: nothing of tokens, pages or devices. A copy needs no holder: who starts from one reads it in
the step being planned, and the device takes steps in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class Checkpoints:
    """Every row is free, taken or promised. A taken row is given up, least recently used first, when none is free.

    A promised row is written by a step whose tokens are not known yet; it is taken, or free again, when they are.
    Such rows hold more than half of all only while there are free ones: decoding must not drive out every prompt.
    """

    def __init__(self, rows: Sequence[int], on_evict: Callable[[int], None] = lambda row: None) -> None:
        self.rows = tuple(rows)
        self._on_evict = on_evict
        self._free = list(self.rows)
        self._taken: OrderedDict[int, None] = OrderedDict()
        self._promised: set[int] = set()
        self._decoded: set[int] = set()  # taken rows that were promised
        self._unwritten: set[int] = set()  # which the step that is being planned writes

    def begin_step(self) -> None:
        """What the last step's plan took is written before this step reads."""
        self._unwritten.clear()

    def take(self) -> int | None:
        """A row to be written by the step being planned, or None if that step writes every row already."""
        row = self._take_from(self._taken)
        if row is not None:
            self._taken[row] = None
        return row

    def _take_from(self, given_up: Iterable[int]) -> int | None:
        """A free row, or the first of those that may be given up; it is neither free nor taken any more."""
        row = next((row for row in self._free if row not in self._unwritten), None)
        if row is None:
            row = next((row for row in given_up if row not in self._unwritten), None)
            if row is None:
                return None
            self._on_evict(row)
            self.release(row)
        self._free.remove(row)
        self._unwritten.add(row)
        return row

    def promise(self) -> int | None:
        """Like `take`, for a state whose page nobody can name before the step's tokens are read."""
        many = 2 * (len(self._decoded) + len(self._promised)) >= len(self.rows)
        row = self._take_from([row for row in self._taken if row in self._decoded] if many else self._taken)
        if row is not None:
            self._promised.add(row)
        return row

    def keep(self, row: int) -> bool:
        """A promised row holds what was promised, and is taken. False: it is promised no more."""
        if row not in self._promised:
            return False
        self._promised.remove(row)
        self._taken[row] = None
        self._decoded.add(row)
        return True

    def withdraw(self, row: int) -> None:
        """A promised row is free again, unless it was kept."""
        if row in self._promised:
            self._promised.remove(row)
            self._free.append(row)

    def withdraw_all(self) -> None:
        for row in list(self._promised):
            self.withdraw(row)

    def release(self, row: int) -> None:
        """Its content is not wanted any more."""
        del self._taken[row]
        self._decoded.discard(row)
        self._free.append(row)

    def use(self, row: int) -> None:
        """Somebody starts from it: it goes last."""
        self._taken.move_to_end(row)

    def is_written(self, row: int) -> bool:
        """Whether the step being planned may read it."""
        return row not in self._unwritten

    def check(self, known: Iterable[int]) -> None:
        """Conservation: every row is in one state, and the taken ones are those that somebody knows."""
        if sorted([*self._free, *self._taken, *self._promised]) != sorted(self.rows):
            raise RuntimeError(f"checkpoint rows are lost or doubled: {self._free} free, {list(self._taken)} taken, "
                               f"{self._promised} promised")  # fmt: skip
        if sorted(known) != sorted(self._taken):
            raise RuntimeError(f"checkpoint rows {sorted(self._taken)} are taken, {sorted(known)} are known")
