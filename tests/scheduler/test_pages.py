"""PagePool: pages are handed out once, shared by count, and free when the last owner lets go."""

import pytest

from jaxserve.scheduler.pages import PagePool


def test_every_page_but_the_trash_page_is_handed_out_once():
    pool = PagePool(num_pages=5)
    assert sorted(pool.allocate() for _ in range(pool.num_usable)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_a_shared_page_is_free_when_its_last_owner_lets_go():
    pool = PagePool(num_pages=3)
    page_id = pool.allocate()
    pool.retain(page_id)
    pool.release(page_id)
    assert pool.num_free == 1
    pool.release(page_id)
    assert pool.num_free == 2
    assert pool.allocate() == page_id  # the warmest page is reused first


def test_mistakes_are_noticed_where_they_are_made():
    pool = PagePool(num_pages=3)
    page_id = pool.allocate()
    pool.release(page_id)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(page_id)
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        pool.retain(page_id)


def test_integrity_check_names_the_page_with_a_wrong_count():
    pool = PagePool(num_pages=4)
    page_id = pool.allocate()
    pool.check_integrity([0, 1, 0, 0])
    with pytest.raises(AssertionError, match=f"page {page_id} has 0 owners but a reference count of 1"):
        pool.check_integrity([0, 0, 0, 0])
    pool.free_ids.append(page_id)
    with pytest.raises(AssertionError, match="free list"):
        pool.check_integrity([0, 1, 0, 0])
