"""Reuse of KV pages by content: a trie whose edges are whole pages of tokens.

A child is found by (parent node, its tokens) in a dict, so equality of the tokens decides,
never a hash alone. Each salt has a root of its own: tenants cannot see each other's pages.
A model with recurrent layers continues only where their state was kept, at the end of a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.checkpoints import Checkpoints
from engine.pages import PagePool


@dataclass(slots=True, eq=False)
class Node:
    """The content of one page after everything above it. A root has no page."""

    parent: Node | None
    tokens: tuple[int, ...]
    page: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    alive: bool = True  # False once evicted: such a node takes no new children
    state: int | None = None  # row of the state pool that holds the state after the page


@dataclass(frozen=True, slots=True)
class Match:
    """Longest known prefix to continue: its pages, and the node that the next page extends."""

    path: list[Node]  # from the root through every page whose content is known; grows when it is looked up again
    num_pages: int  # of those, that can be continued: the others have no state behind them

    @property
    def node(self) -> Node:
        return self.path[self.num_pages]

    @property
    def num_known(self) -> int:
        return len(self.path) - 1

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(node.page for node in self.path[1 : self.num_pages + 1])


class PrefixCache:
    """Owns the pool's knowledge of page contents. Matching changes nothing."""

    def __init__(self, num_pages: int, page_size: int, state_rows: Sequence[int] | None = None) -> None:
        """state_rows: rows of the state pool that may keep copies; None: the model has no recurrent layers."""
        self.pool = PagePool(num_pages, on_evict=self._evict)
        self.page_size = page_size
        self.checkpoints = Checkpoints(state_rows or (), on_evict=self._lose_state)
        self._has_states = state_rows is not None
        self._roots: dict[str, Node] = {}
        self._nodes: dict[int, Node] = {}  # page -> node
        self._states: dict[int, Node] = {}  # row -> node

    def match(self, salt: str, tokens: Sequence[int], max_tokens: int, path: list[Node] | None = None) -> Match:
        """Pages that hold the first tokens, at most `max_tokens` of them. Acquires nothing.

        path: what an earlier match of these tokens found; looking goes on where it ended, or where it is gone since.
        """
        path, root = [] if path is None else path, self._roots.get(salt) or self._new_root(salt)
        if not path or path[0] is not root:
            path[:] = [root]
        del path[max_tokens // self.page_size + 1 :]
        while not path[-1].alive:
            path.pop()
        for start in range((len(path) - 1) * self.page_size, max_tokens - self.page_size + 1, self.page_size):
            child = path[-1].children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            path.append(child)
        end = len(path) - 1
        while self._has_states and end and path[end].state is None:
            end -= 1
        return Match(path, end)

    def insert(self, parent: Node, tokens: tuple[int, ...], page: int) -> Node:
        """Make a full, held page findable under `parent`; returns the node for its content.

        A content that is known already keeps its first page. Under an evicted parent the
        page stays unknown, and the returned node is dead like its parent.
        """
        if len(tokens) != self.page_size:
            raise ValueError(f"{len(tokens)} tokens inserted as a page of {self.page_size}")
        known = parent.children.get(tokens)
        if known is not None:
            return known
        node = Node(parent, tokens, page, alive=parent.alive)
        if parent.alive:
            parent.children[tokens] = node
            self._nodes[page] = node
            self.pool.cache(page)
        return node

    def keep_state(self, node: Node) -> int | None:
        """The row that shall hold the state after `node`; None where one does already, or none is to be had."""
        if not node.alive or node.parent is None:
            return None
        if node.state is not None:
            self.checkpoints.use(node.state)
            return None
        row = self.checkpoints.take()
        if row is not None:
            node.state, self._states[row] = row, node
        return row

    def keep_promised(self, node: Node, row: int) -> bool:
        """The promised `row` holds the state after `node`. False where that is not wanted: the row stays promised."""
        if not node.alive or node.parent is None or node.state is not None or not self.checkpoints.keep(row):
            return False
        node.state, self._states[row] = row, node
        return True

    def drop_state(self, node: Node, row: int) -> None:
        """The copy in `row` is not wanted any more, if it is still that of `node`."""
        if node.state == row:
            self._drop_state(node)

    def forget(self, pages: Iterable[int], node: Node | None = None) -> None:
        """Their content is not to be trusted: nobody finds these pages, or what extends them, again.

        Nor states that were kept on the way to `node`, whose pages may be another's.
        """
        while node is not None:
            self._drop_state(node)
            node = node.parent
        for page in pages:
            if page in self._nodes:
                self._evict(page)

    def clear(self) -> None:
        """Forget everything, as after a failed device step."""
        self.checkpoints.withdraw_all()
        for page, node in self._nodes.items():
            node.alive = False
            self._drop_state(node)
            self.pool.uncache(page)
        self._nodes.clear()
        self._roots.clear()

    def check(self, held: Sequence[int]) -> None:
        """The pool's conservation, and that every known page hangs on a live chain to a root."""
        self.pool.check(held, self._nodes)
        self.checkpoints.check(self._states)
        for row, node in self._states.items():
            if node.state != row or self._nodes.get(node.page) is not node:
                raise RuntimeError(f"state {row} is kept but cannot be found from its page {node.page}")
        for page, node in self._nodes.items():
            parent = node.parent
            if not node.alive or node.page != page or parent is None or parent.children.get(node.tokens) is not node:
                raise RuntimeError(f"page {page} is cached but cannot be found from its root")

    def _new_root(self, salt: str) -> Node:
        if len(self._roots) > 2 * self.pool.num_pages:  # salts come from clients: keep only live ones
            self._roots = {key: root for key, root in self._roots.items() if root.children}
        return self._roots.setdefault(salt, Node(None, (), -1))

    def _lose_state(self, row: int) -> None:
        self._states.pop(row).state = None

    def _drop_state(self, node: Node) -> None:
        if node.state is not None:
            row = node.state
            self._lose_state(row)
            self.checkpoints.release(row)

    def _evict(self, page: int) -> None:
        node = self._nodes[page]
        if node.parent is not None:
            del node.parent.children[node.tokens]
        self._forget(node)

    def _forget(self, top: Node) -> None:
        """Drop a detached subtree: what hangs below an evicted page can no longer be found."""
        for node in list(_walk(top)):
            node.alive = False
            node.children.clear()
            self._drop_state(node)
            if node.page >= 0:
                del self._nodes[node.page]
                self.pool.uncache(node.page)


class NoPrefixCache(PrefixCache):
    """Prefix caching off: nothing is ever found."""

    def match(self, salt: str, tokens: Sequence[int], max_tokens: int, path: list[Node] | None = None) -> Match:
        return Match([Node(None, (), -1, alive=False)], 0)


def _walk(top: Node) -> Iterator[Node]:
    """Every node of the subtree, once."""
    stack = [top]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
