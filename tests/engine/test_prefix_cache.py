"""The prefix cache against a model that remembers what every page really holds.

All tokens hash alike, so that only their equality can tell contents apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.checkpoints import Checkpoints
from engine.prefix_cache import Node, NoPrefixCache, PrefixCache

SIZE = 2
NUM_PAGES = 12


class Token(int):
    """A token id whose hash says nothing."""

    def __hash__(self) -> int:
        return 0


def tokens_of(text: str) -> list[int]:
    return [Token(ord(c)) for c in text]


def fill(cache: PrefixCache, text: str, salt: str = "") -> list[int]:
    """A sequence runs and ends: its full pages become known, and idle."""
    tokens = tokens_of(text)
    match = cache.match(salt, tokens, len(tokens))
    cache.pool.acquire(match.pages)
    pages = [*match.pages, *cache.pool.take(len(tokens) // SIZE - len(match.pages))]
    node = match.node
    for i in range(len(match.pages), len(pages)):
        node = cache.insert(node, tuple(tokens[i * SIZE : (i + 1) * SIZE]), pages[i])
    cache.pool.release(pages)
    return pages


def found(cache: PrefixCache, text: str, salt: str = "") -> tuple[int, ...]:
    return cache.match(salt, tokens_of(text), len(text)).pages


def test_equal_hashes_are_not_equal_contents() -> None:
    assert hash(tuple(tokens_of("ab"))) == hash(tuple(tokens_of("xy")))
    cache = PrefixCache(NUM_PAGES, SIZE)
    ab, xy = fill(cache, "ab"), fill(cache, "xy")
    assert found(cache, "ab") == tuple(ab) and found(cache, "xy") == tuple(xy) and found(cache, "ba") == ()


def test_longest_prefix_in_whole_pages_within_the_limit() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    pages = fill(cache, "abcdef")
    assert found(cache, "abcdXX") == tuple(pages[:2])
    assert found(cache, "Xbcdef") == ()
    tokens = tokens_of("abcdef")
    assert [len(cache.match("", tokens, limit).pages) for limit in range(7)] == [0, 0, 1, 1, 2, 2, 3]


def test_salts_are_separate_worlds() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    mine = fill(cache, "abcd", "me")
    assert found(cache, "abcd", "you") == () and found(cache, "abcd") == ()
    yours = fill(cache, "abcd", "you")
    assert not set(mine) & set(yours) and found(cache, "abcd", "me") == tuple(mine)


def test_many_salts_do_not_pile_up() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    kept = fill(cache, "ab", "kept")
    for i in range(1000):
        cache.match(f"salt {i}", tokens_of("ab"), 2)
    assert len(cache._roots) <= 2 * NUM_PAGES + 1 and found(cache, "ab", "kept") == tuple(kept)


def test_a_known_content_keeps_its_first_page() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    root = cache.match("", [], 0).node
    first, second = cache.pool.take(2)
    tokens = tuple(tokens_of("ab"))
    assert cache.insert(root, tokens, first) is cache.insert(root, tokens, second)
    cache.pool.release([first, second])
    assert found(cache, "ab") == (first,)
    cache.check([])


def test_evicting_a_parent_forgets_what_hangs_below() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    root = cache.match("", [], 0).node
    first, copy, child = cache.pool.take(3)
    node = cache.insert(root, tuple(tokens_of("ab")), first)
    node = cache.insert(node, tuple(tokens_of("cd")), child)  # of one that holds `copy`
    cache.pool.release([first])
    others = cache.pool.take(NUM_PAGES - 1 - 2)  # everything, `first` included
    assert first in others and found(cache, "abcd") == () and not node.alive
    cache.check([*others, copy, child])
    late = cache.insert(node, tuple(tokens_of("ef")), child)  # its owner goes on
    assert not late.alive
    cache.pool.release([copy, child])
    assert cache.pool.num_available == 2, "pages of the forgotten subtree are free, not idle"


def test_forgotten_pages_are_not_found_and_stay_with_their_holders() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    pages = fill(cache, "abcd")
    other = fill(cache, "wxyz")
    cache.pool.acquire(pages)
    cache.forget(pages)
    assert found(cache, "abcd") == () and found(cache, "wxyz") == tuple(other)
    cache.check(pages)
    cache.forget(pages)  # nothing is left to forget
    cache.pool.release(pages)
    cache.check([])


def test_clear_forgets_everything() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE)
    fill(cache, "abcd", "me")
    cache.clear()
    assert found(cache, "abcd", "me") == () and cache.pool.num_available == NUM_PAGES - 1
    cache.check([])


def test_with_states_a_match_ends_where_one_is_kept() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE, state_rows=(7, 8))
    pages = fill(cache, "abcdef")
    root = cache.match("", [], 0).node
    inner = root.children[tuple(tokens_of("ab"))].children[tuple(tokens_of("cd"))]
    assert found(cache, "abcdef") == () and cache.match("", tokens_of("abcdef"), 6).num_known == 3
    assert cache.keep_state(inner) == 7 and cache.keep_state(inner) is None and cache.keep_state(root) is None
    assert found(cache, "abcdef") == tuple(pages[:2]) and cache.match("", tokens_of("abcdef"), 6).num_known == 3
    cache.forget(pages[:1])
    assert found(cache, "abcdef") == () and cache.keep_state(inner) is None, "a dead node keeps none"
    cache.check([])


def test_one_step_writes_a_row_once() -> None:
    cache = PrefixCache(NUM_PAGES, SIZE, state_rows=(7,))
    fill(cache, "ab")
    fill(cache, "cd")
    nodes = list(cache.match("", [], 0).node.children.values())
    assert [cache.keep_state(node) for node in nodes] == [7, None] and not cache.checkpoints.is_written(7)
    cache.checkpoints.begin_step()
    assert cache.checkpoints.is_written(7) and cache.keep_state(nodes[1]) == 7
    assert nodes[0].state is None and nodes[1].state == 7
    cache.check([])


def test_no_prefix_cache_finds_nothing() -> None:
    cache = NoPrefixCache(NUM_PAGES, SIZE)
    fill(cache, "abcd")
    assert found(cache, "abcd") == ()
    assert len(cache.pool._free) == NUM_PAGES - 1, "nothing is kept either"
    cache.check([])


@dataclass(eq=False)
class Owner:
    """A running sequence: its tokens in whole pages."""

    salt: str
    tokens: list[int]
    pages: list[int]
    node: Node
    num_registered: int
    dead: bool = field(default=False)


class Machine(RuleBasedStateMachine):
    """Sequences come, share, register, grow and go; `content` is what was last written to each page."""

    state_rows: tuple[int, ...] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_PAGES, SIZE, self.state_rows)
        self.owners: list[Owner] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.waiting: list[tuple[str, list[int], list[Node]]] = []  # they look again and again, where they ended

    def take(self, owner: Owner) -> None:
        """Pages for all tokens, written with what they mean: the whole prefix up to their end."""
        for page in self.cache.pool.take(len(owner.tokens) // SIZE - len(owner.pages)):
            owner.pages.append(page)
            self.content[page] = (owner.salt, tuple(owner.tokens[: len(owner.pages) * SIZE]))

    @rule(salt=st.sampled_from(["", "tenant"]), text=st.text("ab", min_size=2, max_size=9), spare=st.integers(0, 1))
    def start(self, salt: str, text: str, spare: int) -> None:
        tokens = tokens_of(text[: len(text) // SIZE * SIZE])
        match = self.cache.match(salt, tokens, len(tokens) - spare)
        for i, page in enumerate(match.pages):
            assert self.content[page] == (salt, tuple(tokens[: (i + 1) * SIZE])), "a page of other tokens"
        needed = len(tokens) // SIZE - len(match.pages) + self.cache.pool.num_idle(match.pages)
        if needed <= self.cache.pool.num_available:
            self.cache.pool.acquire(match.pages)
            owner = Owner(salt, tokens, list(match.pages), match.node, len(match.pages))
            self.take(owner)
            self.owners.append(owner)

    @rule(salt=st.sampled_from(["", "tenant"]), text=st.text("ab", min_size=2, max_size=9))
    def wait(self, salt: str, text: str) -> None:
        self.waiting.append((salt, tokens_of(text), []))

    @precondition(lambda self: self.waiting)
    @rule(text=st.text("ab", max_size=3))
    def wait_with_more_tokens(self, text: str) -> None:
        self.waiting[-1][1].extend(tokens_of(text))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        while owner.num_registered < len(owner.pages):
            start = owner.num_registered * SIZE
            owner.node = self.cache.insert(
                owner.node, tuple(owner.tokens[start : start + SIZE]), owner.pages[owner.num_registered]
            )
            owner.num_registered += 1
        if owner.node.alive and not owner.dead:
            assert self.cache.match(owner.salt, owner.tokens, len(owner.tokens)).num_known == len(owner.pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), text=st.text("ab", min_size=SIZE, max_size=SIZE))
    def grow(self, data: st.DataObject, text: str) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        if self.cache.pool.num_available:
            owner.tokens += tokens_of(text)
            self.take(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        self.cache.pool.release(owner.pages)

    @rule(count=st.integers(1, NUM_PAGES))
    def evict(self, count: int) -> None:
        pages = self.cache.pool.take(min(count, self.cache.pool.num_available))
        for page in pages:
            self.content[page] = ("", ())
        self.cache.pool.release(pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.cache.forget(data.draw(st.sampled_from(self.owners)).pages)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        for owner in self.owners:
            owner.dead = True  # may hang on a root that is gone: may register, and is not found

    @invariant()
    def who_looks_again_finds_what_there_is(self) -> None:
        for salt, tokens, path in self.waiting:
            again, fresh = (
                self.cache.match(salt, tokens, len(tokens), path),
                self.cache.match(salt, tokens, len(tokens)),
            )
            assert (again.pages, again.node, again.num_known) == (fresh.pages, fresh.node, fresh.num_known)

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check([page for owner in self.owners for page in owner.pages])


class StatesMachine(Machine):
    """And some leave a state behind their last known page; `states` is whose, as it was last written."""

    state_rows = (20, 21, 22)

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[int, tuple[int, ...]]] = {}  # row -> page and what it holds

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), same_step=st.booleans())
    def keep(self, data: st.DataObject, same_step: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        if not same_step:
            self.cache.checkpoints.begin_step()
        if owner.num_registered:
            row = self.cache.keep_state(owner.node)
            if row is not None:
                self.states[row] = owner.node.page, tuple(owner.tokens[: owner.num_registered * SIZE])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.cache.forget(owner.pages, owner.node)
        assert not self.cache.match(owner.salt, owner.tokens, len(owner.tokens)).pages

    @rule(salt=st.sampled_from(["", "tenant"]), text=st.text("ab", min_size=2, max_size=9))
    def continues(self, salt: str, text: str) -> None:
        tokens = tokens_of(text)
        match = self.cache.match(salt, tokens, len(tokens))
        assert len(match.pages) <= match.num_known
        if match.pages:
            assert match.node.state is not None
            assert self.states[match.node.state] == (match.pages[-1], tuple(tokens[: len(match.pages) * SIZE]))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStatesMachine = StatesMachine.TestCase
TestStatesMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_decoded_states_leave_half_of_the_rows_to_prompts() -> None:
    """A promised row is nobody's until it is kept; of taken ones, decoding replaces its own when it has its half."""
    evicted: list[int] = []
    kept = Checkpoints(range(4), on_evict=evicted.append)
    prompts = [row for row in (kept.take() for _ in range(4)) if row is not None]
    kept.begin_step()
    first, second = kept.promise(), kept.promise()
    assert evicted == [first, second] == prompts[:2] and first is not None and second is not None
    kept.check(prompts[2:])
    assert kept.keep(first) and not kept.keep(first)
    kept.withdraw(second)
    kept.begin_step()
    assert kept.promise() == second
    kept.begin_step()
    assert kept.promise() == first and evicted[-1] == first
    kept.begin_step()
    assert kept.promise() is None  # both are promised
    kept.check(prompts[2:])
