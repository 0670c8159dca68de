"""Images on the device: the vision tower's programs, the array of its features, and positions by slot.

Held by programs.py and runner.py for families that take images; other models have none of it, and the same
programs as without. The tower runs between steps, an image at a time, as a program for its number of patches,
padded up to a bucket; what it gives lies in the rows that the scheduler chose until they are given to another
image. Knows grids, rows and patches: nothing of image files or requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.interface import PatchBatch
from jaxserve.models.qwen2_5_vl_vision import normalize_patches
from jaxserve.scheduler.plan import ImageEncode, SlotInit
from jaxserve.vision.limits import ImageForm
from jaxserve.vision.rope_positions import RopePositions, find_rope_positions
from jaxserve.vision.windows import PATCH_BUCKETS, lay_out_patches
from jaxserve.weights.placement import ALONE, Placement, make_spec

logger = logging.getLogger("jaxserve.runner")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSizes:
    """What the device holds for images, and how they are given."""

    form: ImageForm
    width: int  # of a feature
    max_patches: int  # of the largest image
    num_rows: int  # of features, one an image token
    window_patches: int
    image_token_id: int

    @property
    def num_bytes(self) -> int:
        return 4 * self.width * self.num_rows

    @property
    def max_tokens(self) -> int:
        """Of the largest image."""
        return self.max_patches // self.form.merge_size**2

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of patches that the programs take, ascending."""
        below = [bucket for bucket in PATCH_BUCKETS if bucket < self.max_patches]
        return tuple(PATCH_BUCKETS[: len(below) + 1])


class ImageEncoder:
    """The tower's programs of one model, by number of patches, and the features that they write."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        abstract_params: Any,
        sizes: ImageSizes,
        placement: Placement = ALONE,
        param_specs: Any = None,
    ):
        self.sizes = sizes
        self._placement, self._param_specs = placement, param_specs
        self._graphdef, self._abstract_params = graphdef, abstract_params
        self.ready: dict[int, Callable] = {}  # replaced, never changed
        self._has_run: set[int] = set()
        sharding = placement.make_sharding(())  # whole on every device
        self.abstract_features = jax.ShapeDtypeStruct(
            (sizes.num_rows, sizes.width), jnp.float32, sharding=sharding
        )
        self.allocate()

    @property
    def is_warm(self) -> bool:
        return len(self.ready) == len(self.sizes.buckets)

    @property
    def max_patches(self) -> int:
        """Of an image that can be encoded now: 0 until the first program is ready."""
        return min(max(self.ready, default=0), self.sizes.max_patches)

    def allocate(self) -> None:
        """An empty array of features: at the start, and after a sleep."""
        features = self.abstract_features
        self.feature_MD = jnp.zeros(features.shape, features.dtype, device=features.sharding)

    def list_programs(self) -> dict[str, Callable[[], None]]:
        """What is still to be compiled, smallest first."""
        todo = [bucket for bucket in self.sizes.buckets if bucket not in self.ready]
        return {f"an image of {bucket} patches": partial(self.compile_one, bucket) for bucket in todo}

    def compile_one(self, num_patches: int) -> None:
        """Compile the program for images of so many patches, or restore it from the persistent cache."""
        start_s = time.perf_counter()
        lowered = lower_encoder(
            self._graphdef,
            self.sizes,
            num_patches,
            self._placement,
            self._abstract_params,
            self._param_specs,
            self.abstract_features,
        )
        program = lowered.compile()
        self.ready = {**self.ready, num_patches: program}
        elapsed_s = time.perf_counter() - start_s
        logger.info("compiled the vision tower for %d patches in %.1f s", num_patches, elapsed_s)

    def encode(self, params: Any, image: ImageEncode) -> None:
        """Launch the tower on an image and return at once."""
        num_patches = image.grid[0] * image.grid[1] * image.grid[2]
        bucket = min(bucket for bucket in self.ready if bucket >= num_patches)
        inputs = lay_out_image(self.sizes, image.grid, bucket, image.patches, image.rows)
        self.feature_MD = self.ready[bucket](params, self.feature_MD, *inputs)
        self._has_run.add(bucket)

    def rehearse(self, params: Any) -> bool:
        """Run the smallest program on nothing if it never ran; returns whether it did. A large one would hold
        up the request that comes in the meantime for longer than its own first run takes."""
        todo = [bucket for bucket in self.sizes.buckets[:1] if bucket in self.ready.keys() - self._has_run]
        if not todo:
            return False
        inputs = lay_out_image(self.sizes, (1, 2, 2), todo[0], b"", [])
        self.feature_MD = jax.block_until_ready(self.ready[todo[0]](params, self.feature_MD, *inputs))
        self._has_run.add(todo[0])
        return True


def lay_out_image(
    sizes: ImageSizes, grid: tuple[int, int, int], num_padded: int, patches: bytes, rows: list[int]
) -> tuple[np.ndarray, ...]:
    """What a program takes beside parameters and features. Rows of padding lie outside the array."""
    form = sizes.form
    layout = lay_out_patches(
        [grid], num_padded, merge_size=form.merge_size, window_patches=sizes.window_patches
    )
    values = np.frombuffer(patches, np.uint8).reshape(-1, form.patch_bytes)
    if not patches:
        values = np.zeros((grid[1] * grid[2], form.patch_bytes), np.uint8)
    row_M = np.full(num_padded // form.merge_size**2, sizes.num_rows, np.int32)
    row_M[: len(rows)] = rows
    return layout.arrange(values), layout.place, layout.window, layout.image, layout.order, row_M


def lower_encoder(
    graphdef: nnx.GraphDef,
    sizes: ImageSizes,
    num_patches: int,
    placement: Placement,
    params: Any,
    param_specs: Any,
    features: Any,
) -> jax.stages.Lowered:
    """The tower for images of up to so many patches, ready to be compiled: arrays are described by shape,
    type and sharding only. Devices that share the model have it whole, and each encodes every image."""
    inputs = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=features.sharding)
        for array in lay_out_image(sizes, (1, 2, 2), num_patches, b"", [])
    ]
    everywhere = make_spec(())
    encode = placement.spread(
        partial(encode_image, graphdef, sizes.form),
        in_specs=(param_specs, *(everywhere for _ in (features, *inputs))),
        out_specs=everywhere,
    )
    return jax.jit(encode, donate_argnums=1).lower(params, features, *inputs)


def encode_image(
    graphdef: nnx.GraphDef,
    form: ImageForm,
    params: Any,
    feature_MD: jax.Array,
    patch_UB: jax.Array,
    place_2U: jax.Array,
    window_U: jax.Array,
    image_U: jax.Array,
    order_M: jax.Array,
    row_M: jax.Array,
) -> jax.Array:
    """The features with those of an image in their rows. Donates `feature_MD`."""
    patch_UC = normalize_patches(patch_UB, form.mean, form.deviation, form.temporal_patch_size)
    model = nnx.merge(graphdef, params)
    new_MD = model.encode_images(PatchBatch(patch_UC, place_2U, window_U, image_U, order_M))
    return feature_MD.at[row_M].set(new_MD.astype(feature_MD.dtype), mode="drop")


class SlotPositions:
    """Where the tokens of each slot's sequence stand for rotary embedding, if prompts may hold images."""

    def __init__(self, num_slots: int, sizes: ImageSizes):
        self._sizes = sizes
        self._prompts: dict[int, RopePositions] = {}  # of slots whose prompt holds images
        self.delta_X = np.zeros(num_slots, np.int32)  # what tokens behind the prompt are moved by

    def begin(self, init: SlotInit) -> None:
        """A slot has a new sequence."""
        self._prompts.pop(init.slot, None)
        self.delta_X[init.slot] = 0
        if init.grids:
            positions = find_rope_positions(
                init.prompt_ids,
                init.grids,
                image_token_id=self._sizes.image_token_id,
                merge_size=self._sizes.form.merge_size,
            )
            self._prompts[init.slot] = positions
            self.delta_X[init.slot] = positions.delta

    def at(self, slot: int, start: int, stop: int) -> np.ndarray:
        """int32 [3, stop - start]: time, row and column of the tokens from start to stop."""
        if slot in self._prompts:
            return self._prompts[slot].at(start, stop)
        return np.broadcast_to(np.arange(start, stop, dtype=np.int32), (3, stop - start))
