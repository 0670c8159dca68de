"""Qwen2.5-VL against transformers on a tiny random model: every stage from patches to greedy tokens.

tests/goldens/tiny_qwen2_5_vl.npz was made by scripts/make_vl_goldens.py. Its cases are one image, several, an
image of an odd size, text alone, and a chat about a picture (whose patches the image processor makes; here
its features are taken as given).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxserve.models.interface import ImageTokens, KVLayer, PatchPlaces, StepBatch
from jaxserve.models.quant import embed
from jaxserve.models.qwen2_5_vl import merge_features
from jaxserve.models.qwen2_5_vl_vision import normalize_patches
from jaxserve.vision.limits import read_image_form
from jaxserve.vision.patches import make_patches
from jaxserve.vision.rope_positions import find_rope_positions
from jaxserve.vision.windows import lay_out_patches
from tests.engine.running_engine import start_engine, token_ids
from tests.goldens.read import GOLDENS_DIR, read_manifest, read_vl_facts, relative_error
from tests.models.forward import PAGE_SIZE, load_model, make_batch
from tests.tiny_vl import (
    CASES,
    IMAGE_TOKEN_ID,
    VISION_CONFIG,
    Grid,
    tiny_vl_fingerprint,
    write_tiny_vl_checkpoint,
)

TOLERANCE = read_manifest()["tolerances"]["float32_relative_error"]
IMAGE_CASES = [case for case in CASES if case.grids]
NAMES = [*(case.name for case in CASES), "chat"]
NUM_PAGES = 14  # of the longest prompt and its reply
MERGE_SIZE = 2


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDENS_DIR / "tiny_qwen2_5_vl.npz", allow_pickle=False) as stored:
        return dict(stored)


class LoadedModel:
    """A model and its two programs, each compiled once for all tests that feed the same shapes."""

    def __init__(self, folder: Path, dtype: str = "float32", quantization: str = "none"):
        self.module = load_model(folder, dtype, quantization)
        self.cfg = self.module.cfg
        graphdef, self.params = nnx.split(self.module)

        def step(params: Any, batch: StepBatch, kv: list[KVLayer]) -> tuple[jax.Array, list[KVLayer]]:
            module = nnx.merge(graphdef, params)
            x_TD, kv = module(batch, kv)
            return module.compute_logits(x_TD), kv

        self.step = jax.jit(step)
        self.encode_images = jax.jit(
            lambda params, *inputs: nnx.merge(graphdef, params).encode_images(*inputs)
        )

    def encode(self, grids: list[Grid], pixels: np.ndarray, num_padded: int = 256) -> np.ndarray:
        """Features of all image tokens, from patches in the processor's order, padded to `num_padded`."""
        sizes = {"merge_size": MERGE_SIZE, "window_patches": self.cfg.vision.window_patches}
        layout = lay_out_patches(grids, num_padded, **sizes)
        arrays = (layout.place, layout.window, layout.image, layout.order)
        places = PatchPlaces(*map(jnp.asarray, arrays))
        features = self.encode_images(self.params, jnp.asarray(layout.arrange(pixels)), places)
        return np.asarray(features)[: len(pixels) // MERGE_SIZE**2]


class Sequence:
    """One sequence in a pool of its own, which is fed from its images' features."""

    def __init__(self, model: LoadedModel, goldens: dict[str, np.ndarray], name: str):
        cfg = model.cfg
        self.model = model
        self.prompt_ids = goldens[f"{name}_prompt_ids"].tolist()
        grids = [tuple(grid) for grid in goldens.get(f"{name}_grids", ())]
        self.features = goldens.get(f"{name}_features", np.zeros((1, cfg.language.width), np.float32))
        self.rope = find_rope_positions(
            self.prompt_ids, grids, image_token_id=IMAGE_TOKEN_ID, merge_size=MERGE_SIZE
        )
        is_image = np.asarray(self.prompt_ids) == IMAGE_TOKEN_ID
        self.feature_rows = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
        self.table = np.arange(NUM_PAGES, 0, -1, dtype=np.int32)
        shape_PSKH = (NUM_PAGES + 1, PAGE_SIZE, cfg.num_kv_heads, cfg.head_dim)
        self.kv = [KVLayer(jnp.zeros(shape_PSKH), jnp.zeros(shape_PSKH)) for _ in range(cfg.num_layers)]

    def run(self, batch: StepBatch) -> np.ndarray:
        """Logits of all tokens."""
        logits_TV, self.kv = self.model.step(self.model.params, batch, self.kv)
        return np.asarray(logits_TV)

    def prefill(self, start: int, stop: int) -> np.ndarray:
        """Logits of the prompt's tokens from `start` on."""
        images = ImageTokens(
            positions_3T=jnp.asarray(self.rope.at(start, stop)),
            feature_row_T=jnp.asarray(self.feature_rows[start:stop]),
            feature_MD=jnp.asarray(self.features),
        )
        batch = make_batch(self.prompt_ids[start:stop], start, self.table)
        return self.run(batch._replace(images=images))

    def decode(self, token_id: int, index: int) -> np.ndarray:
        """Logits behind one more token: a program without images, at the index moved by delta."""
        batch = make_batch([token_id], index, self.table)
        return self.run(batch._replace(positions_T=batch.positions_T + self.rope.delta))[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    return LoadedModel(write_tiny_vl_checkpoint(tmp_path_factory.mktemp("vl")))


def test_the_goldens_are_of_the_model_as_it_is_written_now():
    assert read_vl_facts()["fingerprint"] == tiny_vl_fingerprint()


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case.name)
def test_vision_features_agree(model, goldens, case):
    features = model.encode(case.grids, case.pixels())
    assert relative_error(features, goldens[f"{case.name}_features"]) <= TOLERANCE


def test_a_picture_gives_the_features_that_it_gives_in_transformers(model, goldens, tmp_path):
    form = read_image_form(write_tiny_vl_checkpoint(tmp_path), VISION_CONFIG)
    with Image.open(GOLDENS_DIR / "picture.png") as picture:
        image = make_patches(np.asarray(picture.convert("RGB")), form, form.min_pixels, form.max_pixels)
    assert image.grid == tuple(goldens["chat_grids"][0])
    patches = np.frombuffer(image.patches, np.uint8).reshape(image.num_patches, form.patch_bytes)
    pixels = np.asarray(normalize_patches(jnp.asarray(patches), form.mean, form.deviation, 2))
    features = model.encode([image.grid], pixels)
    assert relative_error(features, goldens["chat_features"]) <= TOLERANCE


def test_features_depend_neither_on_padding_nor_on_the_images_beside(model, goldens):
    case = IMAGE_CASES[1]
    together, pixels = goldens[f"{case.name}_features"], case.pixels()
    for grid in case.grids:
        count = grid[1] * grid[2]
        alone = model.encode([grid], pixels[:count], 64)
        assert relative_error(alone, together[: count // 4]) <= TOLERANCE
        together, pixels = together[count // 4 :], pixels[count:]


@pytest.mark.parametrize("name", [case.name for case in IMAGE_CASES] + ["chat"])
def test_positions_are_those_of_transformers(goldens, name):
    grids = [tuple(grid) for grid in goldens[f"{name}_grids"]]
    ids = goldens[f"{name}_prompt_ids"].tolist()
    rope = find_rope_positions(ids, grids, image_token_id=IMAGE_TOKEN_ID, merge_size=MERGE_SIZE)
    np.testing.assert_array_equal(rope.prompt, goldens[f"{name}_positions"])
    assert rope.delta == goldens[f"{name}_delta"][0]


@pytest.mark.parametrize("name", NAMES)
def test_merged_embeddings_agree(model, goldens, name):
    sequence = Sequence(model, goldens, name)
    x_TD = embed(jnp.asarray(sequence.prompt_ids), model.module.language.embed_VD.get_value())
    rows = sequence.rope.prompt, sequence.feature_rows, sequence.features
    merged = merge_features(x_TD, ImageTokens(*map(jnp.asarray, rows)))
    np.testing.assert_allclose(np.asarray(merged), goldens[f"{name}_embedded"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_agree(model, goldens, name):
    sequence = Sequence(model, goldens, name)
    num_prompt = len(sequence.prompt_ids)
    logits = sequence.prefill(0, num_prompt)
    want = goldens[f"{name}_logits"]
    assert relative_error(logits[-len(want) :], want) <= TOLERANCE
    greedy_ids = [int(np.argmax(logits[-1]))]
    while len(greedy_ids) < len(goldens[f"{name}_greedy_ids"]):
        greedy_ids.append(int(np.argmax(sequence.decode(greedy_ids[-1], num_prompt + len(greedy_ids) - 1))))
    assert greedy_ids == goldens[f"{name}_greedy_ids"].tolist()


def test_a_prompt_may_be_cut_within_an_image(model, goldens):
    sequence = Sequence(model, goldens, "odd")
    cut = 20
    assert sequence.prompt_ids[cut - 1 : cut + 1] == [IMAGE_TOKEN_ID] * 2
    sequence.prefill(0, cut)
    logits = sequence.prefill(cut, len(sequence.prompt_ids))
    assert relative_error(logits[-6:], goldens["odd_logits"]) <= TOLERANCE


def test_a_reply_that_is_prefilled_again_gets_the_same_logits(model, goldens):
    """After a retraction prompt and reply are prefilled together, in a program with images."""
    sequence, again = (Sequence(model, goldens, "one") for _ in range(2))
    num_prompt = len(sequence.prompt_ids)
    sequence.prefill(0, num_prompt)
    reply = goldens["one_greedy_ids"].tolist()[:5]
    logits = [sequence.decode(token_id, num_prompt + i) for i, token_id in enumerate(reply)]
    again.prompt_ids += reply
    again.feature_rows = np.append(again.feature_rows, np.full(len(reply), -1, np.int32))
    assert relative_error(again.prefill(0, num_prompt + 5)[-5:], np.stack(logits)) <= TOLERANCE


def test_text_needs_no_images(model, goldens):
    sequence = Sequence(model, goldens, "text")
    logits = sequence.run(make_batch(sequence.prompt_ids, 0, sequence.table))
    assert relative_error(logits[-6:], goldens["text_logits"]) <= TOLERANCE


def test_both_spellings_of_config_and_weights_are_one_model(model, tmp_path):
    other = load_model(write_tiny_vl_checkpoint(tmp_path, nested=True))
    assert other.cfg == model.cfg
    trees = (model.params, nnx.state(other))
    for ours, theirs in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("quantization", "limit"), [("none", 0.03), ("int8", 0.1)])
def test_served_types_stay_near_float32(tmp_path, goldens, quantization, limit):
    """The vision encoder is in bfloat16 either way."""
    model = LoadedModel(write_tiny_vl_checkpoint(tmp_path), "bfloat16", quantization)
    case = IMAGE_CASES[0]
    features = model.encode(case.grids, case.pixels(), 64)
    assert relative_error(features, goldens[f"{case.name}_features"]) <= 0.03
    sequence = Sequence(model, goldens, case.name)
    logits = sequence.prefill(0, len(sequence.prompt_ids))
    assert relative_error(logits[-6:], goldens[f"{case.name}_logits"]) <= limit


def test_the_engine_serves_text(goldens, tmp_path):
    """The step programs are those of any family: without images a token's position is its index."""
    write_tiny_vl_checkpoint(tmp_path)
    prompt_ids = goldens["text_prompt_ids"].tolist()

    async def scenario():
        flags = {"max_running_requests": 2, "context_length": 128, "compilation_cache_dir": str(tmp_path)}
        async with start_engine(str(tmp_path), **flags) as engine:
            return await engine.generate("text", prompt_ids, max_new_tokens=32)

    deltas = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert token_ids(deltas) == goldens["text_greedy_ids"].tolist()
