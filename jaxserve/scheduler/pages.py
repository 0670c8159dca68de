"""PagePool: which pages of the KV pool are free, and how many owners each of the others has.

Used by prefix_cache.py, which is the only one to take pages out or give them back. Knows page numbers
only: nothing of tokens, sequences or devices.

Page 0 is the trash page: padded rows write there, so it is never handed out. A page may have several
owners (sequences that share a prefix, the prefix cache); it is free again when the last one lets go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRASH_PAGE_ID = 0


@dataclass(slots=True)
class PagePool:
    """A pool of `num_pages` pages, the trash page included, so that num_pages - 1 can be used."""

    num_pages: int
    refcounts: list[int] = field(init=False)  # by page id
    free_ids: list[int] = field(init=False)  # a stack: the last one is handed out next

    def __post_init__(self) -> None:
        assert self.num_pages >= 2, f"a pool needs the trash page and one more, got {self.num_pages} pages"
        self.refcounts = [0] * self.num_pages
        self.free_ids = list(range(self.num_pages - 1, TRASH_PAGE_ID, -1))

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self.free_ids)

    def allocate(self) -> int:
        """Hand out a free page with one owner. The caller has checked that there is one."""
        page_id = self.free_ids.pop()
        self.refcounts[page_id] = 1
        return page_id

    def retain(self, page_id: int) -> None:
        """Add an owner to a page that has one already."""
        assert self.refcounts[page_id] > 0, f"page {page_id} is free and cannot be shared"
        self.refcounts[page_id] += 1

    def release(self, page_id: int) -> None:
        """Take one owner away; without owners the page is free."""
        assert self.refcounts[page_id] > 0, f"page {page_id} was released more often than it was owned"
        self.refcounts[page_id] -= 1
        if self.refcounts[page_id] == 0:
            self.free_ids.append(page_id)

    def check_integrity(self, num_owners: list[int]) -> None:
        """Compare with `num_owners` by page id, as counted by the caller. Raises AssertionError."""
        assert len(self.refcounts) == self.num_pages == len(num_owners), "a page table has the wrong length"
        for page_id, (counted, held) in enumerate(zip(num_owners, self.refcounts, strict=True)):
            assert counted == held, f"page {page_id} has {counted} owners but a reference count of {held}"
        assert self.refcounts[TRASH_PAGE_ID] == 0, "the trash page was handed out"
        unowned = [page_id for page_id in range(1, self.num_pages) if self.refcounts[page_id] == 0]
        assert sorted(self.free_ids) == unowned, (
            f"the free list {sorted(self.free_ids)} is not the list of unowned pages {unowned}"
        )
