"""Page ids: counts, eviction order, and that the book-keeping check notices a wrong book."""

from __future__ import annotations

import pytest

from engine.pages import TRASH_PAGE, OutOfPages, PagePool


def pool_with_eviction(num_pages: int) -> tuple[PagePool, list[int]]:
    evicted: list[int] = []

    def evict(page: int) -> None:
        evicted.append(page)
        pool.uncache(page)

    pool = PagePool(num_pages, on_evict=evict)
    return pool, evicted


def test_hands_out_every_page_but_the_trash_page_once() -> None:
    pool = PagePool(6)
    pages = pool.take(5)
    assert sorted(pages) == [1, 2, 3, 4, 5] and TRASH_PAGE not in pages
    assert (pool.num_available, pool.num_held) == (0, 5)
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 available of 5"):
        pool.take(1)


def test_a_take_that_fails_takes_nothing() -> None:
    pool = PagePool(4)
    held = pool.take(2)
    with pytest.raises(OutOfPages):
        pool.take(2)
    assert pool.num_available == 1
    pool.check(held, ())


@pytest.mark.parametrize("num_pages", [0, 1])
def test_needs_a_page_beside_the_trash_page(num_pages: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(num_pages)


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    pool.acquire(pages)
    pool.release(pages)
    assert pool.num_available == 0
    pool.release(pages)
    assert pool.num_available == 2
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release([pages[0]])


def test_evicts_least_recently_released_first_and_tails_before_heads() -> None:
    pool, evicted = pool_with_eviction(5)
    first, second = pool.take(2), pool.take(2)
    for page in (*first, *second):
        pool.cache(page)
    pool.release(second)
    pool.release(first)
    assert pool.num_idle((*first, *second)) == 4 and pool.num_held == 0
    pool.take(3)
    assert evicted == [second[1], second[0], first[1]]


def test_an_idle_page_that_is_acquired_is_not_evicted() -> None:
    pool, evicted = pool_with_eviction(3)
    a, b = pool.take(2)
    pool.cache(a)
    pool.cache(b)
    pool.release([a, b])
    pool.acquire([b])
    assert pool.take(1) == [a] and evicted == [a]


def test_only_held_pages_can_be_cached() -> None:
    pool = PagePool(3)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.cache(1)


def test_check_notices_each_kind_of_wrong_book() -> None:
    pool = PagePool(5)
    a, b = pool.take(2)
    pool.cache(a)
    pool.check([a, b], [a])
    with pytest.raises(RuntimeError, match="holder counts"):
        pool.check([a], [a])
    with pytest.raises(RuntimeError, match="cached pages"):
        pool.check([a, b], [])
    pool._free.append(b)
    with pytest.raises(RuntimeError, match="free pages"):
        pool.check([a, b], [a])
    pool._free.remove(b)
    pool._idle[b] = None
    with pytest.raises(RuntimeError, match="idle pages"):
        pool.check([a, b], [a])
