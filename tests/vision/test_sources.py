"""Where images stand in a request, in the forms that clients send."""

from __future__ import annotations

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.vision.limits import ImageForm, ImageLimits
from jaxserve.vision.sources import find_images, read_image_data

FORM, LIMITS = ImageForm(), ImageLimits(max_per_message=2, max_per_request=3)


def message(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def test_images_are_found_in_order_in_each_form():
    messages = [
        {"role": "system", "content": "no image here"},
        message(
            {"type": "image_url", "image_url": {"url": "a", "detail": "high"}}, {"type": "text", "text": "x"}
        ),
        message(
            {"type": "input_image", "image_url": "b"}, {"type": "image", "image": "c", "max_pixels": 4000}
        ),
    ]
    found = find_images(messages, FORM, LIMITS, {"min_pixels": 1000})
    assert [source.url for source in found] == ["a", "b", "c"]
    assert found[0].place == "messages[1].content[0]"
    assert [(source.min_pixels, source.max_pixels) for source in found] == [
        (1000, FORM.max_pixels),
        (1000, FORM.max_pixels),
        (1000, 4000),
    ]
    assert [source.url for source in read_image_data(["a", {"url": "b"}], FORM, LIMITS)] == ["a", "b"]


PART = {"type": "image_url", "image_url": {"url": "a"}}


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([message(PART, PART, PART)], "at most 2 images on this server, messages\\[0\\] holds 3"),
        ([message(PART, PART), message(PART, PART)], "at most 3 images on this server, got 4"),
        ([message({"type": "image_url"})], r"messages\[0\].content\[0\] must name an image"),
        ([message({"type": "image_url", "image_url": {"url": 3}})], "must name an image"),
        ([message({**PART, "max_pixels": "many"})], "max_pixels of .* must be an integer, got 'many'"),
        ([message({**PART, "min_pixels": 1})], "min_pixels of .* must be between 784 and"),
    ],
)
def test_what_is_refused(messages, sentence):
    with pytest.raises(InvalidRequestError, match=sentence):
        find_images(messages, FORM, LIMITS)
