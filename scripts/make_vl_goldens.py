"""Makes the golden file of the tiny Qwen2.5-VL (tests/tiny_vl.py) with torch and transformers.

    python -m scripts.make_vl_goldens

For each of its cases, and for a chat about tests/goldens/picture.png through transformers' own image
processor: vision features, merged embeddings, rope positions, logits, and 32 greedy tokens. As in
scripts/make_goldens.py, features and logits are those of float64, stored as float32; greedy ids are those of
float32, margins those of float64. Logits are stored at the last positions only, which see all that is before.
The picture is made here too. Needs torch, transformers and Pillow; run it with Python 3.11 or later.
"""
# torch and transformers' model classes are not in the project's own environment.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from scripts.make_goldens import NUM_THREADS, describe_environment, in_float64
from tests import tiny_vl
from tests.goldens import read

NUM_GREEDY = 32
NUM_LOGIT_ROWS = 6
CHAT_TEXT = "What is in this picture?"
# xLLM's page asks this, in this order, for so many tokens (tests/e2e/test_seeds_images.py).
PAGE_TEXT = "介绍下这张图片"
PAGE_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=read.GOLDENS_DIR, help="folder to write (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    torch.set_grad_enabled(False)
    draw_picture(args.out / "picture.png")
    with tempfile.TemporaryDirectory() as directory:
        tiny_vl.write_tiny_vl_checkpoint(directory)
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        inputs = {case.name: make_inputs(case.token_ids, case.grids, case.pixels()) for case in tiny_vl.CASES}
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    image, text = {"type": "image"}, {"type": "text"}
    make = partial(make_chat_inputs, tokenizer, processor, args.out / "picture.png")
    inputs["chat"], chat = make([image, text | {"text": CHAT_TEXT}])
    page_inputs, page = make([text | {"text": PAGE_TEXT}, image])
    page_ids = model.generate(**page_inputs, max_new_tokens=PAGE_TOKENS, do_sample=False)[0].tolist()
    page_ids = page_ids[len(page["prompt_ids"]) :]
    arrays: dict[str, np.ndarray] = {}
    for name, values in inputs.items():
        arrays[f"{name}_greedy_ids"] = continue_greedily(model, values)
    with in_float64(model):
        for name, values in inputs.items():
            arrays |= {f"{name}_{key}": array for key, array in describe(model, name, values, arrays).items()}
    np.savez_compressed(args.out / "tiny_qwen2_5_vl.npz", allow_pickle=False, **arrays)
    chat_ids = arrays["chat_greedy_ids"].tolist()
    facts = {
        "fingerprint": tiny_vl.tiny_vl_fingerprint(),
        "smallest_margins": {name: round(float(arrays[f"{name}_margins"].min()), 6) for name in inputs},
        "chat": chat
        | {"greedy_ids": chat_ids, "greedy_text": tokenizer.decode(chat_ids, skip_special_tokens=True)},
        # Until the model ends it, as clients see it.
        "page": page
        | {"greedy_ids": page_ids, "greedy_text": tokenizer.decode(page_ids, skip_special_tokens=True)},
        "made_with": describe_environment(),
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())
    (args.out / "tiny_qwen2_5_vl.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make_inputs(token_ids: list[int], grids: list[tiny_vl.Grid], pixels: np.ndarray) -> dict[str, Any]:
    ids = torch.tensor([token_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": (ids == tiny_vl.IMAGE_TOKEN_ID).int()}
    if grids:
        inputs |= {"pixel_values": torch.from_numpy(pixels.copy()), "image_grid_thw": torch.tensor(grids)}
    return inputs


def make_chat_inputs(
    tokenizer: Any, processor: Any, picture: Path, parts: list[dict[str, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is given for a question about the picture, and the facts that tests compare with."""
    with Image.open(picture) as image:
        patches = processor(images=[image], return_tensors="np")
    grid: tiny_vl.Grid = tuple(map(int, patches["image_grid_thw"][0]))  # type: ignore[assignment]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    num_tokens = grid[1] * grid[2] // processor.merge_size**2
    expanded = rendered.replace("<|image_pad|>", "<|image_pad|>" * num_tokens)
    token_ids = tokenizer(expanded, add_special_tokens=False)["input_ids"]
    text = next(part["text"] for part in parts if "text" in part)
    facts = {"text": text, "rendered": rendered, "grid": grid, "prompt_ids": token_ids}
    return make_inputs(token_ids, [grid], np.asarray(patches["pixel_values"], np.float32)), facts


def continue_greedily(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    """The best tokens after the prompt, whatever token ends a reply."""
    model.generation_config.eos_token_id = None
    out = model.generate(**inputs, max_new_tokens=NUM_GREEDY, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].numpy().astype(np.int32)


def describe(
    model: Any, name: str, inputs: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What float64 says: of the prompt, and of the greedy continuation fed back in one pass."""
    ids = inputs["input_ids"]
    greedy_ids = torch.from_numpy(arrays[f"{name}_greedy_ids"]).long()
    found: dict[str, np.ndarray] = {"prompt_ids": ids[0].numpy().astype(np.int32)}
    embedded = model.get_input_embeddings()(ids)[0]
    if "pixel_values" in inputs:
        features = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        feature_rows = torch.cat(features.pooler_output)
        embedded[ids[0] == tiny_vl.IMAGE_TOKEN_ID] = feature_rows
        positions, deltas = model.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        found |= {
            "grids": inputs["image_grid_thw"].numpy().astype(np.int32),
            "features": feature_rows.numpy().astype(np.float32),
            "positions": positions[:, 0].numpy().astype(np.int32),
            "delta": deltas[0].numpy().astype(np.int32),
        }
    found["embedded"] = embedded.numpy().astype(np.float32)
    fed = torch.cat([ids[0], greedy_ids[:-1]])[None]
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(greedy_ids) - 1))
    model.model.rope_deltas = None
    logits = (
        model(**inputs | {"input_ids": fed, "mm_token_type_ids": types}, use_cache=False).logits[0].numpy()
    )
    steps = logits[ids.shape[1] - 1 :]
    rows = np.arange(len(steps))
    others = steps.copy()
    others[rows, greedy_ids] = -np.inf
    found["margins"] = (steps[rows, greedy_ids] - others.max(axis=1)).astype(np.float32)
    found["logits"] = logits[ids.shape[1] - NUM_LOGIT_ROWS : ids.shape[1]].astype(np.float32)
    return found


def draw_picture(path: Path) -> None:
    """A house under the sun, 148 x 105 pixels: neither side is a multiple of what patches ask for."""
    image = Image.new("RGB", (148, 105), (120, 180, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 76, 148, 105), fill=(70, 140, 60))
    draw.ellipse((104, 8, 134, 38), fill=(250, 215, 70))
    draw.rectangle((30, 48, 84, 88), fill=(200, 90, 70))
    draw.polygon([(22, 48), (57, 20), (92, 48)], fill=(110, 60, 50))
    draw.rectangle((50, 64, 64, 88), fill=(80, 50, 30))
    image.save(path, optimize=True)


if __name__ == "__main__":
    main()
