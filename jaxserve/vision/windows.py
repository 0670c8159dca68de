"""In which order the vision encoder takes patches, and which of them attend to each other. NumPy only.

A processor lists an image's patches square by square: merge_size x merge_size patches that become one token,
squares from left to right, row after row. Most blocks of the encoder attend within windows of
window_patches x window_patches patches, so the squares are put in the order of the windows that they lie in,
and what attends to each other lies together:

    squares of an image          windows of 2 x 2 squares     order
     0  1  2                     A A B                        0 1 3 4   2 5   6 7   8
     3  4  5                     A A B                        A A A A   B B   C C   D
     6  7  8                     C C D

Windows at the right and the bottom are smaller, never larger. Called by whoever feeds the encoder; knows
nothing of pixels or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.vision.rope_positions import Grid

PATCH_BUCKETS = tuple(1 << exponent for exponent in range(8, 17))  # 256 to 65,536
NO_PATCH = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchLayout:
    """U patches in the order of their windows, padding behind them; int32 arrays."""

    source: np.ndarray  # [U] row of the processor's patches; NO_PATCH for padding
    place: np.ndarray  # [2, U] row and column in the image
    window: np.ndarray  # [U] number of the window; NO_PATCH for padding
    image: np.ndarray  # [U] number of the image (of the frame, if there are several); NO_PATCH for padding
    order: np.ndarray  # [U / squares] which square of this order is the image's first, second, ... token

    def arrange(self, patches: np.ndarray) -> np.ndarray:
        """The processor's patches [patches, values] in this order, zeros for padding: [U, values]."""
        arranged = np.zeros((len(self.source), patches.shape[1]), patches.dtype)
        is_real = self.source != NO_PATCH
        arranged[is_real] = patches[self.source[is_real]]
        return arranged


def lay_out_patches(
    grids: Sequence[Grid], num_padded: int, *, merge_size: int, window_patches: int
) -> PatchLayout:
    """The layout of the images' patches, listed one image after the other, padded to `num_padded`.

    `window_patches` is the side of a window, a multiple of `merge_size`. Raises ValueError if the patches
    do not fit.
    """
    per_square = merge_size * merge_size
    num_patches = sum(frames * rows * columns for frames, rows, columns in grids)
    if num_patches > num_padded or num_padded % per_square:
        raise ValueError(f"{num_patches} patches do not fit in {num_padded}, a multiple of {per_square}")
    parts = [_lay_out_image(grid, merge_size, window_patches) for grid in grids]
    source, window, image = [], [], []
    num_squares = num_windows = num_frames = 0
    for square_order, square_window, square_frame, _ in parts:
        source.append(square_order + num_squares)
        window.append(square_window + num_windows)
        image.append(square_frame + num_frames)
        num_squares += len(square_order)
        num_windows = int(window[-1][-1]) + 1
        num_frames = int(image[-1][-1]) + 1
    squares = np.concatenate(source)
    source_patches = (squares[:, None] * per_square + np.arange(per_square)).reshape(-1)
    place = np.concatenate([part[3] for part in parts], axis=1)[:, source_patches]
    padding = num_padded - num_patches
    order = np.argsort(np.concatenate([squares, np.arange(num_squares, num_padded // per_square)]))

    def pad(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, padding), constant_values=NO_PATCH).astype(np.int32)

    return PatchLayout(
        source=pad(source_patches),
        place=np.pad(place, ((0, 0), (0, padding))).astype(np.int32),
        window=pad(np.repeat(np.concatenate(window), per_square)),
        image=pad(np.repeat(np.concatenate(image), per_square)),
        order=order.astype(np.int32),
    )


def _lay_out_image(
    grid: Grid, merge_size: int, window_patches: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of one image: its squares in the order of the windows, the window and the frame of each of these, and
    row and column of its patches [2, patches] in the processor's order."""
    frames, rows, columns = grid
    frame, row, column = np.indices((frames, rows // merge_size, columns // merge_size)).reshape(3, -1)
    side = window_patches // merge_size
    windows_a_row = -(-columns // window_patches)
    windows_a_frame = windows_a_row * -(-rows // window_patches)
    window = frame * windows_a_frame + row // side * windows_a_row + column // side
    square_order = np.argsort(window, kind="stable")
    inner_row, inner_column = np.indices((merge_size, merge_size)).reshape(2, 1, -1)
    place = np.stack(
        [
            (row[:, None] * merge_size + inner_row).reshape(-1),
            (column[:, None] * merge_size + inner_column).reshape(-1),
        ]
    )
    return square_order, window[square_order], frame[square_order], place
