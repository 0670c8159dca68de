"""Where requests go among several engines: pure numbers, no engine."""

from __future__ import annotations

from jaxserve.engine.routing import BLOCK_TOKENS, WORTH, Router, hash_blocks
from jaxserve.images import ImagePatches, PlacedImage

PROMPT = list(range(4 * BLOCK_TOKENS + 5))
BLOCKS = hash_blocks(PROMPT, "")
OTHER = hash_blocks([7, *PROMPT], "")


def make_router(capacity_tokens: int = 100 * BLOCK_TOKENS) -> Router:
    return Router(3, capacity_tokens)


def test_a_prompt_goes_where_its_beginning_went():
    router = make_router()
    router.note(2, BLOCKS, len(PROMPT))
    assert router.choose(BLOCKS, [0, 0, 0]) == 2
    assert router.choose(hash_blocks([*PROMPT, *range(900, 999)], ""), [0, 0, 0]) == 2
    assert router.choose(OTHER, [0, 0, 0]) != 2


def test_the_longest_beginning_wins_and_of_equals_the_least_busy():
    router = make_router()
    router.note(0, BLOCKS[:1], BLOCK_TOKENS)
    router.note(1, BLOCKS, len(PROMPT))
    assert router.choose(BLOCKS, [0, 0, 0]) == 1
    router.note(0, BLOCKS, len(PROMPT))
    assert router.choose(BLOCKS, [10, 9, 0]) == 1


def test_an_engine_that_is_much_busier_is_passed_over():
    router = make_router()
    router.note(2, BLOCKS, len(PROMPT))
    allowed = WORTH * len(BLOCKS) * BLOCK_TOKENS
    assert router.choose(BLOCKS, [1000, 1000, 1000 + allowed - 1]) == 2
    assert router.choose(BLOCKS, [1001, 1000, 1000 + allowed + 1]) == 1


def test_prompts_without_a_known_beginning_go_to_the_least_busy_and_then_to_whom_had_least():
    router = make_router()
    assert router.choose(OTHER, [3, 1, 2]) == 1
    short = hash_blocks([1, 2, 3], "")
    assert short == []
    for expected in (0, 1, 2, 0):
        assert router.choose(short, [0, 0, 0]) == expected
        router.note(expected, short, 3)


def test_memory_is_bounded_and_the_beginnings_stay_longest():
    router = make_router(capacity_tokens=4 * BLOCK_TOKENS)
    router.note(0, BLOCKS, len(PROMPT))
    router.note(0, OTHER[:2], 2 * BLOCK_TOKENS)
    assert router.count_known(0, BLOCKS) == 2
    router.forget(0)
    assert router.count_known(0, BLOCKS) == 0


def test_what_the_cache_tells_apart_the_router_does_too():
    def show(content_id: str) -> list[int]:
        image = ImagePatches(content_id, (1, 2, 2), 1, b"")
        return hash_blocks(PROMPT, "", [PlacedImage(BLOCK_TOKENS, image)])

    assert hash_blocks(PROMPT, "mine")[0] != BLOCKS[0]
    assert show("a") != show("b")
    assert show("a")[0] == show("b")[0] == BLOCKS[0]  # before the image all is the same
