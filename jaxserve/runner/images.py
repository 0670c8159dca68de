"""Images on the device: the vision encoder's programs, the array of its features, and positions by slot.

Held by programs.py and runner.py for families that take images; other models have none of it, and the same
programs as without. The encoder runs between steps, an image at a time, as programs for its number of
patches, padded up to a bucket: one in front, one for each block, most of which may wait for the next step,
and one behind them. What that gives lies in the rows that the scheduler chose until they are given to another
image. Knows grids, rows and patches: nothing of image files or requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.interface import PatchPlaces
from jaxserve.models.qwen2_5_vl_vision import normalize_patches
from jaxserve.runner.xla_flags import chosen_options
from jaxserve.scheduler.plan import ImageEncode, SlotInit
from jaxserve.vision.limits import ImageForm
from jaxserve.vision.rope_positions import RopePositions, find_rope_positions
from jaxserve.vision.windows import PATCH_BUCKETS, lay_out_patches
from jaxserve.weights.placement import ALONE, Placement, make_spec, put_held

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
    num_stages: int  # of the encoder: its blocks
    patch_cost: float  # what it takes to encode one, in tokens of a prompt

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


class EncoderPrograms(NamedTuple):
    """The vision encoder's for images of up to some number of patches."""

    embed: Callable
    blocks: tuple[Callable, ...]  # one a block; those of the same form are the same program
    merge: Callable


@dataclass(slots=True)
class HalfEncoded:
    """An image between two steps."""

    num_padded: int
    x_UD: jax.Array
    places: PatchPlaces
    row_M: np.ndarray


class ImageEncoder:
    """The vision encoder's programs of one model, by number of patches, and the features that they write.

    `model` may hold its parameters or only their shapes and types.
    """

    def __init__(
        self,
        model: Any,
        sizes: ImageSizes,
        placement: Placement = ALONE,
        admit: Callable[[str, Callable[[], None]], None] = lambda _name, use: use(),
    ):
        self.sizes = sizes
        self._admit = admit  # uses programs when every host has them (programs.py)
        self._placement = placement
        self._vision = model.vision
        self.ready: dict[int, EncoderPrograms] = {}  # replaced, never changed
        self._has_run: set[int] = set()
        self._begun: HalfEncoded | None = None
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

    def count_stages(self, num_chunk_tokens: int) -> tuple[tuple[int, int], ...]:
        """For each number of patches how many stages take about as long as so many tokens of a prompt."""
        most_patches = num_chunk_tokens / self.sizes.patch_cost * self.sizes.num_stages
        return tuple((bucket, int(most_patches / bucket)) for bucket in sorted(self.ready))

    def allocate(self) -> None:
        """An empty array of features: at the start, and after a sleep."""
        features = self.abstract_features
        self.feature_MD = jnp.zeros(features.shape, features.dtype, device=features.sharding)
        self._begun = None

    def list_programs(self) -> dict[str, Callable[[], None]]:
        """What is still to be compiled, smallest first."""
        todo = [bucket for bucket in self.sizes.buckets if bucket not in self.ready]
        return {_name_programs(bucket): partial(self.compile_one, bucket) for bucket in todo}

    def compile_one(self, num_patches: int) -> None:
        """Compile the programs for images of so many patches, or restore them from the persistent cache."""
        start_s = time.perf_counter()
        lowered = lower_encoder(
            self._vision, self.sizes, num_patches, self._placement, self.abstract_features
        )
        options = chosen_options(jax.default_backend())
        blocks = {block: block.compile(options) for block in lowered.distinct_blocks}
        programs = EncoderPrograms(
            embed=lowered.embed.compile(options),
            blocks=tuple(blocks[block] for block in lowered.blocks),
            merge=lowered.merge.compile(options),
        )
        elapsed_s = time.perf_counter() - start_s
        logger.info("compiled the vision encoder for %d patches in %.1f s", num_patches, elapsed_s)

        def use() -> None:
            self.ready = {**self.ready, num_patches: programs}

        self._admit(_name_programs(num_patches), use)

    def choose(self, image: ImageEncode) -> int:
        """The programs for an image, by their number of patches; those it began with, if it goes on."""
        if image.first_stage:
            assert self._begun is not None, f"image {image.content_id} goes on and was not begun"
            return self._begun.num_padded
        frames, height, width = image.grid
        return min(bucket for bucket in self.ready if bucket >= frames * height * width)

    def encode(self, params: Any, image: ImageEncode, num_padded: int) -> None:
        """Launch the encoder, or some blocks of it, on an image and return at once."""
        if image.first_stage == 0:
            inputs = lay_out_image(self.sizes, image.grid, num_padded, image.patches, image.rows)
            x_UD = self.ready[num_padded].embed(params["vision"]["embed"], inputs.patch_UB)
            put = partial(put_held, sharding=self.abstract_features.sharding)
            places = jax.tree.map(put, inputs.places)
            self._begun = HalfEncoded(num_padded, x_UD, places, inputs.row_M)
        begun = self._begun
        assert begun is not None, f"image {image.content_id} goes on and was not begun"
        programs = self.ready[begun.num_padded]
        for number in range(image.first_stage, image.end_stage):
            block_params = params["vision"]["blocks"][number]
            begun.x_UD = programs.blocks[number](block_params, begun.x_UD, begun.places)
        if image.is_last:
            self.feature_MD = programs.merge(
                params["vision"]["merge"], self.feature_MD, begun.x_UD, begun.places.order_M, begun.row_M
            )
            self._has_run.add(begun.num_padded)
            self._begun = None

    def find_unrehearsed(self) -> int | None:
        """The smallest program, if it is ready and never ran. A large one would hold up the request that
        comes in the meantime for longer than its own first run takes."""
        smallest = self.sizes.buckets[0]
        is_new = smallest in self.ready.keys() - self._has_run and self._begun is None
        return smallest if is_new else None

    def rehearse(self, params: Any, num_padded: int) -> None:
        """Run the programs on nothing."""
        nothing = ImageEncode("", (1, 2, 2), b"", [], end_stage=self.sizes.num_stages)
        self.encode(params, nothing, num_padded)
        jax.block_until_ready(self.feature_MD)


def _name_programs(num_patches: int) -> str:
    return f"an image of {num_patches} patches"


class ImageInputs(NamedTuple):
    """What the programs take beside parameters and features, on the host."""

    patch_UB: np.ndarray  # uint8
    places: PatchPlaces
    row_M: np.ndarray  # int32, of the features; rows of padding lie outside the array


def lay_out_image(
    sizes: ImageSizes, grid: tuple[int, int, int], num_padded: int, patches: bytes, rows: list[int]
) -> ImageInputs:
    """Of one image; of one that shows nothing if there are no patches."""
    form = sizes.form
    layout = lay_out_patches(
        [grid], num_padded, merge_size=form.merge_size, window_patches=sizes.window_patches
    )
    values = np.frombuffer(patches, np.uint8).reshape(-1, form.patch_bytes)
    if not patches:
        values = np.zeros((grid[1] * grid[2], form.patch_bytes), np.uint8)
    row_M = np.full(num_padded // form.merge_size**2, sizes.num_rows, np.int32)
    row_M[: len(rows)] = rows
    places = PatchPlaces(layout.place, layout.window, layout.image, layout.order)  # type: ignore[arg-type]
    return ImageInputs(layout.arrange(values), places, row_M)


class LoweredEncoder(NamedTuple):
    """EncoderPrograms that are yet to be compiled."""

    embed: jax.stages.Lowered
    blocks: tuple[jax.stages.Lowered, ...]
    merge: jax.stages.Lowered

    @property
    def distinct_blocks(self) -> list[jax.stages.Lowered]:
        return list(dict.fromkeys(self.blocks))


def lower_encoder(
    vision: Any, sizes: ImageSizes, num_patches: int, placement: Placement, features: Any
) -> LoweredEncoder:
    """The programs for images of up to so many patches; arrays are described by shape, type and sharding.

    `vision` is the model's encoder, see PatchPlaces. Devices that share the model have it whole, and each
    encodes every image. The residual stream and the features are donated.
    """
    everywhere = make_spec(())

    def describe(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=features.sharding)

    def lower(program: Callable, *arguments: Any, donated: Sequence[int] = ()) -> jax.stages.Lowered:
        specs = tuple(everywhere for _ in arguments)
        spread = placement.spread(program, in_specs=specs, out_specs=everywhere)
        return jax.jit(spread, donate_argnums=donated).lower(*arguments)

    host = lay_out_image(sizes, (1, 2, 2), num_patches, b"", [])
    inputs = jax.tree.map(lambda array: describe(array.shape, array.dtype), host)
    graphdef, params = split_part(vision.embed)
    embed = lower(partial(embed_patches, graphdef, sizes.form), params, inputs.patch_UB)
    x_UD = describe(embed.out_info.shape, embed.out_info.dtype)
    kinds: dict[nnx.GraphDef, jax.stages.Lowered] = {}
    blocks = []
    for block in vision.blocks:
        graphdef, params = split_part(block)
        if graphdef not in kinds:
            kinds[graphdef] = lower(partial(run_block, graphdef), params, x_UD, inputs.places, donated=[1])
        blocks.append(kinds[graphdef])
    graphdef, params = split_part(vision.merge)
    write = partial(merge_patches, graphdef)
    merge = lower(write, params, features, x_UD, inputs.places.order_M, inputs.row_M, donated=[1])
    return LoweredEncoder(embed, tuple(blocks), merge)


def split_part(part: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """Its structure, which is equal for parts of the same form, and its parameters, described."""
    graphdef, params = nnx.split(part)
    return graphdef, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )


def embed_patches(graphdef: nnx.GraphDef, form: ImageForm, params: Any, patch_UB: jax.Array) -> jax.Array:
    """The residual stream in front of the first block."""
    patch_UC = normalize_patches(patch_UB, form.mean, form.deviation, form.temporal_patch_size)
    return nnx.merge(graphdef, params)(patch_UC)


def run_block(graphdef: nnx.GraphDef, params: Any, x_UD: jax.Array, places: PatchPlaces) -> jax.Array:
    """The residual stream behind a block. Donates that in front of it."""
    return nnx.merge(graphdef, params)(x_UD, places)


def merge_patches(
    graphdef: nnx.GraphDef,
    params: Any,
    feature_MD: jax.Array,
    x_UD: jax.Array,
    order_M: jax.Array,
    row_M: jax.Array,
) -> jax.Array:
    """The features with those of an image in their rows. Donates `feature_MD`."""
    new_MD = nnx.merge(graphdef, params)(x_UD, order_M)
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
