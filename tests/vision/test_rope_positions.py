"""Positions of a prompt with images (tests/models/test_qwen2_5_vl.py compares them with transformers)."""

from __future__ import annotations

import pytest

from jaxserve.vision.rope_positions import count_image_tokens, find_image_spans, find_rope_positions

IMAGE = 9


def test_the_picture_of_the_docstring():
    ids = [1, 2, 3, *[IMAGE] * 6, 4, 5]
    rope = find_rope_positions(ids, [(1, 4, 6)], image_token_id=IMAGE, merge_size=2)
    assert rope.prompt.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert rope.delta == -3


def test_a_chunk_may_begin_in_the_prompt_and_end_behind_it():
    ids = [1, *[IMAGE] * 4, 2]
    rope = find_rope_positions(ids, [(1, 4, 4)], image_token_id=IMAGE, merge_size=2)
    assert rope.at(3, 8).tolist() == [[1, 1, 3, 4, 5], [2, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert rope.at(6, 8).tolist() == [[4, 5]] * 3
    assert rope.at(0, 2).shape == (3, 2)


def test_text_alone_counts_its_tokens():
    rope = find_rope_positions([5, 6, 7], [], image_token_id=IMAGE, merge_size=2)
    assert (rope.prompt.tolist(), rope.delta) == ([[0, 1, 2]] * 3, 0)


def test_images_next_to_each_other_are_two():
    ids = [*[IMAGE] * 2, *[IMAGE] * 3]
    grids = [(1, 2, 4), (1, 6, 2)]
    assert find_image_spans(ids, grids, image_token_id=IMAGE, merge_size=2) == [(0, 2), (2, 5)]
    rope = find_rope_positions(ids, grids, image_token_id=IMAGE, merge_size=2)
    assert rope.prompt.tolist() == [[0, 0, 2, 2, 2], [0, 0, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert count_image_tokens((1, 6, 2), 2) == 3


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([1, IMAGE, 2], "the prompt has 1 image tokens, its 1 images take 2"),
        ([IMAGE, 1, IMAGE], "the 2 tokens of image 1 are not next to each other"),
    ],
)
def test_image_tokens_must_be_those_of_the_images(ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_rope_positions(ids, [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
