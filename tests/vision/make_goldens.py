"""Make tests/vision/patches.npz: what transformers' Qwen2-VL processor makes of the pictures in pictures.py.

Run by hand in an environment with transformers 5, torch and Pillow; tests need neither of the first two:

    PYTHONPATH=. python tests/vision/make_goldens.py

The processor's floats are those of bytes that were normalised, twice over for two frames. The bytes are kept,
after it was checked that they give the floats to 1e-5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.vision.pictures import SHAPES, draw

PATH = Path(__file__).parent / "patches.npz"


def main() -> None:
    arrays = {}
    for order, (height, width, min_pixels, max_pixels) in enumerate(SHAPES):
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
        found = processor(images=draw(height, width, order), return_tensors="np")
        floats = np.asarray(found["pixel_values"]).reshape(-1, 3, 2, 14, 14)
        mean = np.asarray(processor.image_mean).reshape(3, 1, 1, 1)
        deviation = np.asarray(processor.image_std).reshape(3, 1, 1, 1)
        data = np.rint((floats * deviation + mean) * 255).astype(np.uint8)
        assert np.abs((data / 255 - mean) / deviation - floats).max() < 1e-5
        assert (data[:, :, 0] == data[:, :, 1]).all()
        arrays[f"patches_{order}"] = data[:, :, 0].reshape(len(data), -1)
        arrays[f"grid_{order}"] = np.asarray(found["image_grid_thw"])[0]
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
