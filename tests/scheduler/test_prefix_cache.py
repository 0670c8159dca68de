"""PrefixCache: whole pages shared by prefix and salt, the least recently used leaf evicted first."""

from jaxserve.scheduler.pages import PagePool
from jaxserve.scheduler.prefix_cache import PrefixCache

PAGE = 4


def make_cache(num_usable_pages=8, is_enabled=True):
    return PrefixCache(pool=PagePool(num_usable_pages + 1), page_size=PAGE, is_enabled=is_enabled)


def compute_and_release(cache, token_ids, salt=""):
    """One sequence's life: match, take pages for the rest, give everything back. Returns its pages."""
    node = cache.match(token_ids, salt)
    page_ids = cache.lock(node)
    page_ids += [cache.allocate() for _ in range(-(-len(token_ids) // PAGE) - len(page_ids))]
    cache.release(node, token_ids, page_ids, len(token_ids), salt)
    cache.check_integrity()
    return page_ids


def count_matched(cache, token_ids, salt=""):
    return cache.match(token_ids, salt).depth * PAGE


def test_only_whole_pages_are_kept_and_one_token_is_always_left_to_compute():
    cache = make_cache()
    compute_and_release(cache, list(range(10)))
    assert cache.num_cached == 2  # 8 of the 10 tokens; the page that was not full is free again
    assert cache.num_available == 8
    assert count_matched(cache, list(range(10))) == 8
    assert count_matched(cache, list(range(9))) == 8
    assert count_matched(cache, list(range(8))) == 4  # all 8 are cached, but the last must be computed
    assert count_matched(cache, list(range(4))) == 0
    assert count_matched(cache, [0, 1, 2, 3, 9, 9, 9, 9, 8]) == 4


def test_the_same_tokens_after_another_prefix_are_another_page():
    cache = make_cache()
    compute_and_release(cache, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    assert count_matched(cache, [2, 2, 2, 2, 5, 5, 5, 5, 0]) == 0
    assert count_matched(cache, [5, 5, 5, 5, 0]) == 0


def test_salts_do_not_share():
    cache = make_cache()
    ours = compute_and_release(cache, list(range(9)), salt="ours")
    assert count_matched(cache, list(range(9)), salt="theirs") == 0
    theirs = compute_and_release(cache, list(range(9)), salt="theirs")
    assert not set(ours[:2]) & set(theirs[:2])
    assert count_matched(cache, list(range(9)), salt="ours") == 8


def test_least_recently_used_goes_first_and_leaves_go_before_their_parents():
    cache = make_cache(num_usable_pages=4)
    old = compute_and_release(cache, [1] * 8)
    new = compute_and_release(cache, [2] * 8)
    used = cache.lock(cache.match([1] * 9, ""))  # using the old one again makes it the younger
    assert used == old
    cache.release(cache.match([1] * 9, ""), [1] * 8, old, 8, "")
    evicted = [cache.allocate() for _ in range(4)]
    assert evicted == [new[1], new[0], old[1], old[0]]
    assert cache.num_cached == 0


def test_pages_in_use_are_not_evicted():
    cache = make_cache(num_usable_pages=3)
    compute_and_release(cache, [1] * 9)
    node = cache.match([1] * 9, "")
    assert cache.count_unused(node) == 2
    held = cache.lock(node)
    assert cache.count_unused(node) == 0
    assert cache.num_available == 1
    cache.clear()
    assert cache.num_cached == 2
    cache.release(node, [1] * 9, held, 8, "")
    assert cache.num_available == 3
    cache.clear()
    assert cache.num_cached == 0
    assert cache.pool.num_free == 3


def test_a_running_sequence_shares_its_pages_before_it_ends():
    cache = make_cache()
    token_ids = list(range(8))
    page_ids = [cache.allocate(), cache.allocate()]
    tail = cache.extend(cache.root, token_ids, page_ids, 6, "")  # six tokens computed: one full page
    assert count_matched(cache, [*token_ids, 8]) == 4
    tail = cache.extend(tail, token_ids, page_ids, 8, "")
    assert cache.lock(cache.match([*token_ids, 8], "")) == page_ids
    cache.release(tail, token_ids, page_ids, 8, "")
    assert cache.num_evictable == 0  # the other user is still there
    cache.check_integrity()


def test_two_copies_of_one_prefix_never_block_eviction():
    """Two sequences computed the same page at once. Only one copy is cached, and what the other sequence
    computes after it is cached when it ends: until then it would pin a page that it does not use."""
    cache = make_cache(num_usable_pages=4)
    first, second = [cache.allocate()], [cache.allocate(), cache.allocate()]
    token_ids = [7] * 8
    first_tail = cache.extend(cache.root, token_ids, first, 4, "")
    second_tail = cache.extend(cache.root, token_ids, second, 8, "")
    assert second_tail is cache.root
    cache.release(first_tail, token_ids, first, 4, "")
    assert cache.num_available == 2  # the free page, and the first copy, though the second is in use
    cache.check_integrity()
    cache.release(second_tail, token_ids, second, 8, "")
    assert cache.lock(cache.match([7] * 9, "")) == [first[0], second[1]]
    cache.check_integrity()


def test_switched_off_it_only_hands_pages_out():
    cache = make_cache(is_enabled=False)
    compute_and_release(cache, list(range(10)))
    assert cache.num_cached == 0
    assert cache.pool.num_free == 8
    assert count_matched(cache, list(range(10))) == 0
