"""Images in the plan: encoded once and before their tokens, cached by what they show."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.images import ImagePatches, PlacedImage
from jaxserve.scheduler.features import BLOCK_ROWS, FeatureCache
from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import NO_ROW, StepResult
from jaxserve.scheduler.schedule import abort, add, apply, flush, retract_all, schedule
from jaxserve.scheduler.state import has_work, new_state
from jaxserve.types import TokenParams
from tests.scheduler.steps import LIMITS, PAGE, STOP, run_step, run_to_end, submit

NUM_STAGES = 4  # of the encoder
PAD = 500  # the one token id that stands for any part of any image
IMAGE_LIMITS = replace(LIMITS, max_image_patches=1000)


def make_image(name: int, num_tokens: int) -> ImagePatches:
    return ImagePatches(f"{name:x}" * 32, (1, 2, 2 * num_tokens), num_tokens, bytes([name]))


def place(*parts: int | ImagePatches) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """A prompt of token ids and images."""
    prompt_ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            prompt_ids.append(part)
        else:
            images.append(PlacedImage(len(prompt_ids), part))
            prompt_ids += [PAD] * part.num_tokens
    return prompt_ids, tuple(images)


def ask(state, rid, *parts, **params):
    prompt_ids, images = place(*parts)
    params = TokenParams(**{"max_new_tokens": 4, "stop_ids": (STOP,), **params})
    add(state, rid=rid, prompt_ids=prompt_ids, params=params, images=images)


def new_image_state(num_pages=60, num_feature_rows=4 * BLOCK_ROWS, **settings):
    return new_state(num_pages, PAGE, 8, features=FeatureCache(num_feature_rows), **settings)


def stages_of(plan):
    encode = plan.encode
    return encode and (encode.content_id, encode.first_stage, encode.end_stage, encode.is_last)


A, B = make_image(1, 6), make_image(2, 6)


def test_an_image_is_encoded_in_the_step_that_needs_it_and_never_again():
    state = new_image_state()
    ask(state, "a", 1, 2, A)
    plan, _ = run_step(state, IMAGE_LIMITS)
    assert plan.encode is not None
    assert (plan.encode.content_id, plan.encode.grid, plan.encode.patches) == (
        A.content_id,
        A.grid,
        A.patches,
    )
    (chunk,) = plan.chunks
    assert chunk.feature_rows == [NO_ROW, NO_ROW, *plan.encode.rows]
    assert plan.inits[0].grids == (A.grid,)
    rows = plan.encode.rows
    ask(state, "b", 9, A, 9)
    plan, _ = run_step(state, IMAGE_LIMITS)
    assert plan.encode is None
    assert plan.chunks[0].feature_rows == [NO_ROW, *rows, NO_ROW]
    assert state.num_encoded_images == 1


def test_decoding_sequences_wait_for_an_image_or_for_a_chunk_and_not_for_both():
    state = new_image_state()
    submit(state, "text", range(10, 18), max_new_tokens=20)
    run_step(state, IMAGE_LIMITS)
    ask(state, "a", 1, 2, A, 3, B, 4)
    kinds = []
    while state.num_encoded_images < 2 or any(seq.is_prefilling for seq in state.running.values()):
        plan, _ = run_step(state, IMAGE_LIMITS)
        assert len(plan.decode) >= 1
        kinds.append(("image" if plan.encode else "") + ("text" if plan.chunks else ""))
    assert kinds == ["text", "image", "text", "image", "text"]


STAGED_LIMITS = replace(IMAGE_LIMITS, num_image_stages=NUM_STAGES, stages_a_step=((8, 5), (20, 3), (200, 1)))


def test_a_large_image_is_encoded_in_stages_between_which_others_decode():
    state = new_image_state()
    submit(state, "text", range(10, 18), max_new_tokens=20)
    run_step(state, STAGED_LIMITS)
    ask(state, "a", 1, A, 2, make_image(3, 4), make_image(4, 1))  # 24, 16 and 4 patches
    stages = []
    while state.num_encoded_images < 3:
        plan, _ = run_step(state, STAGED_LIMITS)
        assert len(plan.decode) >= 1
        if (encode := plan.encode) is not None:
            assert not plan.chunks
            assert (encode.patches == b"") == (encode.first_stage > 0)
            stages.append(stages_of(plan))
    second, third = "3" * 32, "4" * 32
    assert stages == [
        *((A.content_id, stage, stage + 1, stage == 3) for stage in range(4)),
        (second, 0, 3, False),
        (second, 3, 4, True),
        (third, 0, 4, True),
    ]


def test_an_image_whose_request_left_is_encoded_to_the_end_and_one_that_waits_alone_at_once():
    state = new_image_state()
    submit(state, "text", range(10, 18), max_new_tokens=3)
    run_step(state, STAGED_LIMITS)
    ask(state, "left", A, 2)
    plan, _ = run_step(state, STAGED_LIMITS)
    assert stages_of(plan) == (A.content_id, 0, 1, False)
    abort(state, "left")
    ask(state, "stays", B, 2)
    plan, _ = run_step(state, STAGED_LIMITS)  # the last one of "text"
    assert stages_of(plan) == (A.content_id, 1, 2, False)
    plan, _ = run_step(state, STAGED_LIMITS)
    assert stages_of(plan) == (A.content_id, 2, NUM_STAGES, True)
    plan, _ = run_step(state, STAGED_LIMITS)
    assert stages_of(plan) == (B.content_id, 0, NUM_STAGES, True)
    assert len(plan.chunks[0].feature_rows) == 7


def test_a_stream_of_text_does_not_keep_an_image_waiting():
    """It has nothing to compute before the image, so it is not admitted before that is encoded."""
    state = new_image_state(num_pages=400)
    submit(state, "decodes", range(10, 18), max_new_tokens=200)
    run_step(state, IMAGE_LIMITS)
    submit(state, "prefills", range(100, 180), max_new_tokens=1)
    run_step(state, replace(IMAGE_LIMITS, max_mixed_tokens=8))
    ask(state, "image", A, 3)
    num_steps = 0
    while "image" in state.by_rid:
        num_steps += 1
        submit(state, f"text {num_steps}", range(num_steps * 1000, num_steps * 1000 + 32), max_new_tokens=1)
        plan, _ = run_step(state, replace(IMAGE_LIMITS, max_mixed_tokens=16))
        assert not (plan.encode and plan.chunks)
        assert num_steps < 20, "it would wait for ever"


def test_a_chunk_may_end_inside_an_image():
    state = new_image_state()
    ask(state, "a", 1, make_image(3, 50), 2)
    rows = []
    while len(rows) < 52:
        plan, _ = run_step(state, IMAGE_LIMITS)
        rows += plan.chunks[0].feature_rows
    assert [len(rows), state.num_encoded_images, rows[0], rows[-1]] == [52, 1, NO_ROW, NO_ROW]
    assert len(set(rows[1:51])) == 50


def test_the_prefix_cache_knows_images_by_what_they_show():
    state = new_image_state()
    cached = []
    for rid, image in (("a", A), ("b", A), ("c", B)):
        ask(state, rid, 1, 2, image, *range(20, 28))
        deltas = run_to_end(state, IMAGE_LIMITS)
        cached.append(deltas[-1].num_cached_tokens)
    assert cached == [0, 12, 0]  # of 16 tokens; the last page is computed again
    assert state.num_encoded_images == 2


def test_requests_that_wait_for_a_common_prefix_wait_only_while_the_images_are_equal():
    state = new_image_state()
    for rid, image in (("a", A), ("b", A), ("c", B)):
        ask(state, rid, *range(20, 24), image, 1, 2, 3)
    first = schedule(state, IMAGE_LIMITS)
    assert [state.running[chunk.seq_id].rid for chunk in first.chunks] == ["a"]
    apply(state, first, StepResult([7]))
    assert {delta.rid for delta in run_to_end(state, IMAGE_LIMITS)} == {"a", "b", "c"}
    assert state.num_encoded_images == 2


def test_flushing_forgets_features_too():
    state = new_image_state()
    for rid in ("a", "b"):
        ask(state, rid, 1, A, 2)
        run_to_end(state, IMAGE_LIMITS)
        assert flush(state)
    assert state.num_encoded_images == 2


def test_what_can_never_be_encoded_is_refused():
    text_only = new_state(60, PAGE, 8)
    with pytest.raises(InvalidRequestError, match="does not accept images"):
        ask(text_only, "a", A)
    with pytest.raises(InvalidRequestError, match="An image has 65 tokens, and this server takes 64"):
        ask(new_image_state(num_feature_rows=BLOCK_ROWS), "a", make_image(3, 65))


def test_guesses_never_reach_into_an_image():
    state = new_image_state(max_drafts=8)
    ask(state, "a", *range(10, 18), A, *range(10, 16), max_new_tokens=30)
    limits = replace(IMAGE_LIMITS, row_buckets=(1, 16), row_costs=(1.0, 1.0))
    token_ids = iter([16, 17, *range(30, 60)])  # the prompt's beginning again, and its image comes next
    guessed = []
    while has_work(state):
        plan = schedule(state, limits)
        guessed += [row.token_id for row in plan.decode[1:]]
        apply(state, plan, StepResult([next(token_ids, STOP) for _ in (*plan.decode, *plan.chunks)]))
    assert PAD not in guessed
    assert all(token_id >= 0 for token_id in guessed)


def test_rows_are_given_in_blocks_and_the_least_recently_used_go():
    cache = FeatureCache(3 * BLOCK_ROWS + 5)
    assert cache.capacity == 3 * BLOCK_ROWS
    assert cache.allot("a", BLOCK_ROWS + 1)
    assert cache.allot("b", 1)
    assert not cache.allot("c", 1)  # this plan uses all of it
    cache.begin_plan()
    assert cache.use("a")
    assert cache.allot("c", BLOCK_ROWS)
    assert [cache.use(name) for name in "abc"] == [True, False, True]
    rows = [
        row for name, num in (("a", BLOCK_ROWS + 1), ("c", BLOCK_ROWS)) for row in cache.rows(name, 0, num)
    ]
    assert len(set(rows)) == 2 * BLOCK_ROWS + 1
    cache.check_integrity()


class FeatureArray:
    """What the device holds by row: of which image, and which of its tokens."""

    def __init__(self):
        self.rows: dict[int, tuple[str, int]] = {}
        self.begun: tuple[str, int] | None = None  # an image and the stages it went through

    def launch(self, plan, prompts):
        if (encode := plan.encode) is not None:
            assert (self.begun or (encode.content_id, 0)) == (encode.content_id, encode.first_stage)
            assert encode.first_stage < encode.end_stage <= NUM_STAGES
            assert encode.is_last == (encode.end_stage == NUM_STAGES)
            self.begun = None if encode.is_last else (encode.content_id, encode.end_stage)
            for place, row in enumerate(encode.rows if encode.is_last else ()):
                self.rows[row] = (encode.content_id, place)
            assert not (plan.decode and plan.chunks)
        for chunk in plan.chunks:
            _, images = prompts[chunk.seq_id]
            held = [self.rows[row] if row != NO_ROW else None for row in chunk.feature_rows]
            wanted = []
            for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
                here = [placed for placed in images if placed.offset <= position < placed.end]
                wanted += [(one.image.content_id, position - one.offset) for one in here] or [None]
            assert (held or [None] * len(wanted)) == wanted


@pytest.mark.parametrize("seed", range(12))
def test_random_workloads_read_the_features_of_their_own_images(seed):
    """Few pages and few rows, two steps in flight, with aborts and retractions: every request ends."""
    source = random.Random(seed)
    state = new_image_state(num_pages=source.choice([30, 50, 90]), num_feature_rows=2 * BLOCK_ROWS)
    images = [make_image(name, source.randrange(1, 50)) for name in range(1, 7)]
    prompts = {}
    device = FeatureArray()
    in_flight = []
    num_left, num_steps = 40, 0
    while num_left or has_work(state):
        num_steps += 1
        assert num_steps < 3000, "the requests do not end"
        if num_left and source.random() < 0.4:
            num_left -= 1
            parts = [source.choice([1, 2, source.choice(images)]) for _ in range(source.randrange(1, 7))]
            prompt = place(*parts)
            if len(prompt[0]) + 8 < 29 * PAGE:
                prompts[state.next_seq_id] = prompt
                ask(state, f"r{num_left}", *parts, max_new_tokens=source.randrange(0, 8))
        if source.random() < 0.03 and state.by_rid:
            abort(state, source.choice(list(state.by_rid)))
        if source.random() < 0.02:
            retract_all(state)
        plan = schedule(state, STAGED_LIMITS)
        check_integrity(state)
        if not plan.is_empty:
            device.launch(plan, prompts)
            in_flight.append(plan)
        if in_flight and (plan.is_empty or len(in_flight) > 1):
            oldest = in_flight.pop(0)
            apply(state, oldest, StepResult([77] * (len(oldest.decode) + len(oldest.chunks))))
            check_integrity(state)
    assert flush(state)
