"""Resizing an image and cutting it into the patches that a vision tower reads, as Qwen2-VL's processor does.

Runs in the worker processes. What leaves is uint8: the tower's program normalises on the device, so that an
image travels as an eighth of its float form. Reference: transformers, Qwen2VLImageProcessor.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image

from jaxserve.images import ImagePatches
from jaxserve.vision.limits import ImageForm
from jaxserve.vision.sources import ImageFaultError

MAX_ASPECT = 200


def choose_size(height: int, width: int, tile: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that are multiples of `tile`, hold between min_pixels and max_pixels as near as that
    allows, and keep the aspect. Raises ImageFaultError for an aspect above MAX_ASPECT."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageFaultError(f"is {width} x {height} pixels, more than {MAX_ASPECT} times as long as wide")
    new_height, new_width = round(height / tile) * tile, round(width / tile) * tile
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(tile, math.floor(height / scale / tile) * tile)
        new_width = max(tile, math.floor(width / scale / tile) * tile)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / tile) * tile
        new_width = math.ceil(width * scale / tile) * tile
    return new_height, new_width


def make_patches(pixels: np.ndarray, form: ImageForm, min_pixels: int, max_pixels: int) -> ImagePatches:
    """The patches of an image given as uint8 [height, width, 3]. Raises ImageFaultError.

    A patch is a row of bytes, channel by channel; the merge_size by merge_size patches of one token follow
    each other, and the tokens go from left to right and down.
    """
    patch, merge = form.patch_size, form.merge_size
    height, width = pixels.shape[:2]
    new_height, new_width = choose_size(height, width, form.tile_size, min_pixels, max_pixels)
    if (new_height, new_width) != (height, width):
        resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized)
    rows, cols = new_height // patch, new_width // patch
    split = pixels.reshape(rows // merge, merge, patch, cols // merge, merge, patch, 3)
    data = split.transpose(0, 3, 1, 4, 6, 2, 5).tobytes()
    grid = (1, rows, cols)
    digest = hashlib.sha256(repr(grid).encode())
    digest.update(data)
    return ImagePatches(digest.hexdigest()[:32], grid, rows * cols // merge**2, data)
