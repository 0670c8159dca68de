"""PrefixCache: keeps the KV pages of token prefixes that were computed before, and hands pages out.

Used by the scheduler's phases (admit.py, schedule.py); every page is taken and given back here, so that
one place knows which pages are free, which are merely cached, and which are in use. Knows token ids and
pages: nothing of sequences, steps or devices.

The cache is a tree. A node is one whole page; the path from the root spells the tokens before and in it.

    root -- (salt, t0..t15) page 7 -- (t16..t31) page 3 -- (t32..t47) page 9
                                   \\- (t16..t31) page 4

Rule 1. Whoever uses a node uses its whole path. `match`/`lock` take a path from the root, and `extend`
        stops at a page that is cached under another number (the sequence keeps its own copy and hangs
        nothing below the other one). So below an unused node everything is unused.
Rule 2. `release` puts the unused nodes of a path at the young end of the LRU list, deepest first. So a
        node always stands before its parent, and the oldest entry is always a leaf.

With both, a page can be evicted exactly when it is in the list, the list's length is the number of
pages that can be had, and evicting one takes O(1) whatever the size of the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from jaxserve.scheduler.pages import TRASH_PAGE_ID, PagePool


@dataclass(slots=True, eq=False)
class Node:
    """One cached page. `depth` counts the pages from the root to here, this one included.

    Once evicted it is no longer `is_cached`, but still knows its parent: whoever remembered it as a match
    finds from there what is left of it.
    """

    key: tuple[int | str, ...]
    page_id: int
    parent: Node | None
    depth: int
    is_cached: bool = True
    children: dict[tuple[int | str, ...], Node] = field(default_factory=dict)


@dataclass(slots=True)
class PrefixCache:
    """The tree over `pool`. When not enabled it never matches and keeps nothing."""

    pool: PagePool
    page_size: int
    is_enabled: bool = True
    num_cached: int = 0  # pages in the tree, in use or not
    num_attached: int = 0  # pages that came into the tree since the start
    num_evicted: int = 0  # pages that gave way to others since the start
    root: Node = field(init=False)
    _unused: OrderedDict[int, Node] = field(init=False)  # by page id, least recently used first

    def __post_init__(self) -> None:
        self.root = Node(key=(), page_id=TRASH_PAGE_ID, parent=None, depth=0)
        self._unused = OrderedDict()

    @property
    def num_evictable(self) -> int:
        return len(self._unused)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can still hand out: free, or cached and unused."""
        return self.pool.num_free + len(self._unused)

    def allocate(self) -> int:
        """Hand out a page, evicting the least recently used one when none is free."""
        if not self.pool.free_ids:
            self._evict()
            self.num_evicted += 1
        return self.pool.allocate()

    def match(
        self,
        token_ids: list[int],
        salt: str,
        num_tokens: int | None = None,
        *,
        known: Node | None = None,
        max_lookups: int | None = None,
    ) -> Node:
        """Find the longest cached run of whole pages that leaves at least one token to compute.

        `num_tokens`, less than the length, is the most that the run may hold. `known` is an earlier match of
        the same tokens and salt, from which the search goes on. With `max_lookups` it may stop short.
        """
        node = known or self.root
        if not self.is_enabled:
            return self.root
        limit = len(token_ids) - 1 if num_tokens is None else num_tokens
        num_pages = limit // self.page_size
        while not node.is_cached or node.depth > num_pages:
            assert node.parent is not None
            node = node.parent
        if max_lookups is not None:
            num_pages = min(num_pages, node.depth + max_lookups)
        for index in range(node.depth, num_pages):
            child = node.children.get(self._page_key(token_ids, index, salt)) if node.children else None
            if child is None:
                break
            node = child
        return node

    def count_unused(self, node: Node, most: int | None = None) -> int:
        """Count the pages on the path to `node` that `lock` would take out of the evictable ones.

        Whoever only asks whether they are more than `most` need not wait for the rest: the count ends there.
        """
        count = 0
        # Use grows towards the root (rule 1), so the unused nodes are the end of the path.
        while node.parent is not None and node.page_id in self._unused and (most is None or count <= most):
            count += 1
            node = node.parent
        return count

    def lock(self, node: Node) -> list[int]:
        """Become an owner of every page on the path to `node`; returns them in token order."""
        page_ids = []
        while node.parent is not None:
            self.pool.retain(node.page_id)
            self._unused.pop(node.page_id, None)
            page_ids.append(node.page_id)
            node = node.parent
        page_ids.reverse()
        return page_ids

    def extend(
        self, tail: Node, token_ids: list[int], page_ids: list[int], num_tokens: int, salt: str
    ) -> Node:
        """Cache a running sequence's pages beyond `tail`, as far as `num_tokens` fill them.

        `tail` is the node that `match` or the last `extend` returned for this sequence; the new tail is
        returned. The sequence stays an owner of its pages.
        """
        if not self.is_enabled:
            return tail
        for index in range(tail.depth, num_tokens // self.page_size):
            key = self._page_key(token_ids, index, salt)
            if key in tail.children:
                break  # the same tokens are cached in another page: rule 1
            self.pool.retain(page_ids[index])
            tail = self._attach(tail, key, page_ids[index])
        return tail

    def release(
        self, tail: Node, token_ids: list[int], page_ids: list[int], num_tokens: int, salt: str
    ) -> None:
        """Give back all pages of a sequence, keeping those that `num_tokens` fill as cached and unused."""
        num_kept = max(tail.depth, num_tokens // self.page_size if self.is_enabled else 0)
        node = tail
        for index in range(tail.depth, num_kept):
            key = self._page_key(token_ids, index, salt)
            child = node.children.get(key)
            if child is None:
                child = self._attach(node, key, page_ids[index])  # our ownership becomes the cache's
            else:
                self.pool.release(page_ids[index])
            node = child
        for index in range(num_kept, len(page_ids)):
            self.pool.release(page_ids[index])
        while node.parent is not None:
            if node.depth <= tail.depth:
                self.pool.release(node.page_id)
            if self.pool.refcounts[node.page_id] == 1:
                self._unused[node.page_id] = node
                self._unused.move_to_end(node.page_id)
            node = node.parent

    def share(self, page_ids: list[int]) -> None:
        """Add an owner to pages that are not cached: the beams of a search share theirs."""
        for page_id in page_ids:
            self.pool.retain(page_id)

    def drop(self, page_ids: list[int]) -> None:
        """Take an owner from pages that are not cached."""
        for page_id in page_ids:
            self.pool.release(page_id)

    def clear(self) -> None:
        """Evict every unused page."""
        while self._unused:
            self._evict()

    def list_nodes(self) -> list[Node]:
        """All nodes, parents before children."""
        nodes = [self.root]
        for node in nodes:  # grows while it is walked
            nodes.extend(node.children.values())
        return nodes[1:]

    def check_integrity(self) -> None:
        """Check both rules of the module's docstring. Raises AssertionError."""
        nodes = self.list_nodes()
        assert len(nodes) == self.num_cached, f"{len(nodes)} pages in the tree, but {self.num_cached} counted"
        order = {page_id: rank for rank, page_id in enumerate(self._unused)}
        for node in nodes:
            assert node.parent is not None
            page_id, parent_id = node.page_id, node.parent.page_id
            assert node.depth == node.parent.depth + 1, f"page {page_id} is cached at the wrong depth"
            num_tokens = len(node.key) - (node.depth == 1)  # the first page's key holds the salt as well
            assert num_tokens == self.page_size, f"page {page_id} is cached for {num_tokens} tokens"
            is_unused = self.pool.refcounts[page_id] == 1
            assert is_unused == (page_id in order), (
                f"page {page_id} is unused and not evictable, or the reverse"
            )
            if parent_id in order:
                assert is_unused, f"page {page_id} is in use below page {parent_id}, which may be evicted"
                assert order[page_id] < order[parent_id], (
                    f"page {parent_id} would go before its child {page_id}"
                )
        assert len(order) <= len(nodes), "the LRU list holds pages that are not in the tree"

    def _page_key(self, token_ids: list[int], index: int, salt: str) -> tuple[int | str, ...]:
        start = index * self.page_size
        tokens = tuple(token_ids[start : start + self.page_size])
        return (salt, *tokens) if index == 0 else tokens

    def _attach(self, parent: Node, key: tuple[int | str, ...], page_id: int) -> Node:
        node = Node(key=key, page_id=page_id, parent=parent, depth=parent.depth + 1)
        parent.children[key] = node
        self.num_cached += 1
        self.num_attached += 1
        return node

    def _evict(self) -> None:
        page_id, node = self._unused.popitem(last=False)
        assert node.parent is not None, f"page {page_id} is not in the tree"
        assert not node.children, f"page {page_id} was to be evicted before its children"
        del node.parent.children[node.key]
        node.is_cached = False
        self.num_cached -= 1
        self.pool.release(page_id)
