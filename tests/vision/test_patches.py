"""Resizing and cutting up is transformers', byte for byte (make_goldens.py says what was compared)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.vision.limits import ImageForm, ImageLimits, choose_pixels, read_image_form
from jaxserve.vision.patches import choose_size, make_patches
from jaxserve.vision.sources import ImageFaultError
from tests.vision.pictures import SHAPES, draw

GOLDENS = np.load(Path(__file__).parent / "patches.npz")


@pytest.mark.parametrize("order", range(len(SHAPES)))
def test_patches_are_those_of_the_reference(order):
    height, width, min_pixels, max_pixels = SHAPES[order]
    image = make_patches(np.asarray(draw(height, width, order)), ImageForm(), min_pixels, max_pixels)
    expected = GOLDENS[f"patches_{order}"]
    assert list(image.grid) == GOLDENS[f"grid_{order}"].tolist()
    assert image.num_patches == len(expected) == image.num_tokens * 4
    np.testing.assert_array_equal(np.frombuffer(image.patches, np.uint8).reshape(expected.shape), expected)


def test_equal_pictures_have_equal_ids_and_others_do_not():
    def find_id(height: int, width: int, seed: int = 0) -> str:
        return make_patches(np.asarray(draw(height, width, seed)), ImageForm(), 784, 10**6).content_id

    ids = [find_id(56, 84), find_id(56, 84), find_id(84, 56), find_id(56, 84, seed=1)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_sizes_are_whole_tiles_within_the_bounds():
    assert choose_size(1000, 1000, 28, 3136, 10**7) == (1008, 1008)
    assert choose_size(1000, 1000, 28, 3136, 100_000) == (308, 308)
    assert choose_size(15, 1000, 28, 3136, 10**7) == (28, 1008)
    with pytest.raises(ImageFaultError, match="more than 200 times as long"):
        choose_size(1, 201, 28, 3136, 10**7)


def test_the_pixels_of_a_request_are_within_those_of_the_server():
    form = ImageForm(min_pixels=1000, max_pixels=9000)
    limits = ImageLimits(min_pixels=800, max_pixels=8000)
    assert choose_pixels(form, limits, None, None, "it") == (1000, 8000)
    assert choose_pixels(form, limits, None, 900, "it") == (900, 900)
    assert choose_pixels(form, limits, 800, 8000, "it") == (800, 8000)
    for asked in ((799, None), (None, 8001), (5000, 4000)):
        with pytest.raises(Exception, match="_pixels of it must be"):
            choose_pixels(form, limits, *asked, "it")


def test_the_form_is_read_from_the_models_folder(tmp_path):
    assert read_image_form(tmp_path, {}) == ImageForm()
    (tmp_path / "preprocessor_config.json").write_text(
        '{"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.5, 0.5, 0.5], "patch_size": 14}'
    )
    form = read_image_form(tmp_path, {"patch_size": 7, "spatial_merge_size": 3})
    assert (form.max_pixels, form.mean, form.tile_size) == (12845056, (0.5, 0.5, 0.5), 21)
