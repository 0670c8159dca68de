"""The order of patches for the vision encoder: windows together, every patch once, tokens found again."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.vision.windows import NO_PATCH, lay_out_patches


def test_the_picture_of_the_docstring():
    layout = lay_out_patches([(1, 6, 6)], 36, merge_size=2, window_patches=4)
    squares = layout.source.reshape(-1, 4)[:, 0] // 4
    assert squares.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert layout.window.reshape(-1, 4)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3]
    assert squares[layout.order].tolist() == list(range(9))


def test_places_are_rows_and_columns_of_the_image():
    """The processor lists four patches of a square, then the next square."""
    layout = lay_out_patches([(1, 2, 4)], 8, merge_size=2, window_patches=8)
    assert layout.source.tolist() == list(range(8))
    assert layout.place.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3]]


def test_several_images_share_neither_windows_nor_attention_and_padding_is_of_none():
    grids = [(1, 4, 10), (1, 2, 2), (1, 6, 4)]
    layout = lay_out_patches(grids, 96, merge_size=2, window_patches=4)
    num_real = 40 + 4 + 24
    assert sorted(layout.source[:num_real].tolist()) == list(range(num_real))
    assert layout.image[:num_real].tolist() == [0] * 40 + [1] * 4 + [2] * 24
    assert all(len(np.unique(layout.image[layout.window == window])) == 1 for window in range(5))
    for padded in (layout.source, layout.window, layout.image):
        assert (padded[num_real:] == NO_PATCH).all()
    # A window is a run of the order, no longer than a whole one: what the encoder's attention relies on.
    assert (np.diff(layout.window[:num_real]) >= 0).all()
    assert np.bincount(layout.window[:num_real]).max() == 16
    assert sorted(layout.order.tolist()) == list(range(24))


def test_patches_are_put_in_order_and_padding_is_zeros():
    layout = lay_out_patches([(1, 2, 6)], 16, merge_size=2, window_patches=4)
    patches = np.arange(12, dtype=np.float32)[:, None] + 1
    assert layout.arrange(patches)[:, 0].tolist() == [*range(1, 13), 0, 0, 0, 0]


def test_images_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="24 patches do not fit in 16"):
        lay_out_patches([(1, 4, 6)], 16, merge_size=2, window_patches=8)
