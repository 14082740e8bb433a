"""Page ids of the KV cache: who holds which, which are free, which may be evicted.

Knows ids and reference counts only: nothing of tokens, sequences or devices.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

TRASH_PAGE = 0  # idle rows write here; nobody reads it


class OutOfPages(Exception):
    """Asked for more pages than are free or evictable."""


class PagePool:
    """Every page but the trash page is exactly one of: free, held (count >= 1), idle.

    An idle page has no holder but is kept because the prefix cache knows its content.
    Idle pages are evicted, least recently released first, when free pages run out;
    `on_evict(page)` tells the cache before the page is handed out again.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages {num_pages} must be at least 2: page 0 is the trash page")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))  # a stack: low ids first
        self._holders = [0] * num_pages
        self._cached = [False] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: free and idle."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - 1 - self.num_available

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages have no holder."""
        return sum(self._holders[page] == 0 for page in pages)

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each, contents undefined. Takes all or raises OutOfPages."""
        if count > self.num_available:
            raise OutOfPages(f"{count} pages wanted, {self.num_available} available of {self.num_pages - 1}")
        while len(self._free) < count:
            self._on_evict(next(iter(self._idle)))  # calls `uncache`, which frees the page
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """One more holder for pages that are held or idle."""
        for page in pages:
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. Tails go first, so that they are evicted before what they extend."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._cached[page]:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def cache(self, page: int) -> None:
        """The prefix cache now knows this held page's content."""
        if self._holders[page] < 1:
            raise ValueError(f"page {page} is cached but nobody holds it")
        self._cached[page] = True

    def uncache(self, page: int) -> None:
        """The prefix cache forgot the page; without a holder it becomes free."""
        self._cached[page] = False
        if self._holders[page] == 0:
            del self._idle[page]
            self._free.append(page)

    def check(self, held: Iterable[int], cached: Iterable[int]) -> None:
        """Conservation: free + held + idle = all, and the counts equal the owners' own lists."""
        counts = Counter(held)
        if self._holders != [counts[page] for page in range(self.num_pages)]:
            raise RuntimeError("page holder counts differ from the sequences' pages")
        known = set(cached)
        if known != {page for page in range(self.num_pages) if self._cached[page]}:
            raise RuntimeError("cached pages differ from the prefix cache's pages")
        if set(self._idle) != {page for page in known if self._holders[page] == 0}:
            raise RuntimeError("idle pages differ from cached pages without holder")
        free = set(self._free)
        unheld = {page for page in range(1, self.num_pages) if self._holders[page] == 0}
        if len(free) != len(self._free) or free != unheld - known:
            raise RuntimeError("free pages differ from pages that nobody holds or caches")
