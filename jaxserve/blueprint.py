"""What a launch decides before it touches a device: types, kernels, pool, rows and programs.

`draw_blueprint` is one function from settings, a model's config and a machine. build.py builds what it says;
`jaxserve plan` prints it for machines that are not here, so both decide by the same code. No weights are read
and nothing is allocated: a config.json is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.dispatch import KernelTarget, choose_kernels, has_int4_kernel
from jaxserve.models.experts import describe_experts
from jaxserve.models.interface import ModelConfig, ParamSpec
from jaxserve.models.sharding import Division
from jaxserve.runner.buckets import Ladder, make_ladder
from jaxserve.runner.checkpoint import Checkpoint, read_family
from jaxserve.runner.device_state import PoolSize, kv_bytes_per_token
from jaxserve.runner.grouping import Grouping, find_grouping, find_grouping_limit, mark_groups
from jaxserve.runner.images import ImageSizes
from jaxserve.runner.sizing import (
    Machine,
    Precision,
    Sizes,
    choose_page_size,
    choose_precision,
    choose_sizes,
    keep_form,
    share_machine,
)
from jaxserve.scheduler.features import BLOCK_ROWS
from jaxserve.vision.limits import read_image_form
from jaxserve.weights.placement import ALONE, Placement
from jaxserve.weights.resolve import ModelFiles

BYTES_PER_EDIT = 8  # of a slot and a token of the vocabulary: its count, and its bias

# Where programs loop over layers: code and compile time do not grow with their number. XLA's other backends
# copy a layer's weights out of the stack before they multiply.
STACKING_PLATFORMS = ("tpu",)
# An int8 product takes half of bf16's time where bytes decide; on a CPU with AMX it was found to take a
# quarter.
CPU_INT8_GAIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSketch:
    """A model as a machine would serve it, before it is known whether it fits. Bytes are one device's."""

    config: ServerConfig
    machine: Machine
    precision: Precision
    checkpoint: Checkpoint
    tp_size: int
    max_drafts: int
    param_bytes: int
    kv_bytes_per_token: int
    images: ImageSizes | None  # what the device holds for images; None for a model that reads text only
    slot_bytes: int  # what a running sequence costs beside its pages
    unpacks_because: str = ""  # why a checkpoint of 4 bits is not served in them, if nobody asked for that

    @property
    def cfg(self) -> Any:
        return self.checkpoint.cfg

    @property
    def specs(self) -> list[ParamSpec]:
        return self.checkpoint.list_whole_specs()

    @property
    def kv_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.precision.kv_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model that fits: all that there is to build."""

    sketch: ModelSketch
    sizes: Sizes
    pool: PoolSize
    ladder: Ladder

    @property
    def kv_bytes(self) -> int:
        """Of the pool, on one device; the trash page included."""
        return self.pool.num_pages * self.pool.page_size * self.sketch.kv_bytes_per_token

    @property
    def slots_bytes(self) -> int:
        """Of the sampling state, on one device; the trash slot included."""
        return (self.pool.num_slots + 1) * self.sketch.slot_bytes


def draw_blueprint(
    config: ServerConfig, files: ModelFiles, machine: Machine, placement: Placement = ALONE
) -> Blueprint:
    """Everything that is decided before a device is touched.

    Raises WeightError for a model that is not served, and ConfigError where nothing fits or a setting is out
    of what the model has.
    """
    return fit_sketch(sketch_model(config, files, machine, placement))


def sketch_model(
    config: ServerConfig, files: ModelFiles, machine: Machine, placement: Placement = ALONE
) -> ModelSketch:
    """The types and kernels that a machine serves a model with, and what they take."""
    family, cfg = read_family(config.model_path, files)
    specs = family.param_specs(cfg)
    tp_size = placement.num_devices
    division = family.divide(cfg, tp_size)
    local_cfg = division.local_cfg
    wanted = _keep_form(config, files)
    grouping = _choose_grouping(wanted, files, machine, specs, division, placement)
    reads_packed = grouping.is_packed and not grouping.limit
    bits = checkpoint_bits(files, specs)
    precision = choose_precision(wanted, machine, bits, reads_packed=reads_packed)
    is_int4 = precision.quantization == "int4"
    checkpoint = Checkpoint(
        files=files,
        family=family,
        cfg=cfg,
        kernels=choose_kernels(_describe_target(config, machine, local_cfg, precision, tp_size)),
        dtype=precision.dtype,
        quantization=precision.quantization,
        group_sizes=grouping.group_sizes if is_int4 else {},
        random_seed=config.random_seed or 0,
        download_dir=config.download_dir,
        placement=placement,
        stacks_layers=machine.platform in STACKING_PLATFORMS,
    )
    images = _choose_images(config, files, checkpoint, machine.platform)
    num_held = tp_size if placement.held is None else len(placement.held)
    return ModelSketch(
        config=config,
        machine=share_machine(machine, config.dp_size * num_held),
        precision=precision,
        checkpoint=checkpoint,
        tp_size=tp_size,
        max_drafts=config.speculative_num_draft_tokens if config.speculative_algorithm == "ngram" else 0,
        param_bytes=checkpoint.count_device_bytes() + (images.num_bytes if images else 0),
        images=images,
        kv_bytes_per_token=kv_bytes_per_token(
            local_cfg, jnp.dtype(precision.kv_dtype), checkpoint.kernels.make_kv
        ),
        slot_bytes=BYTES_PER_EDIT * math.ceil(cfg.vocab_size / tp_size),
        unpacks_because=grouping.limit if grouping.is_packed and config.quantization == "auto" else "",
    )


def fit_sketch(sketch: ModelSketch) -> Blueprint:
    """The pool, rows and programs that a sketch leaves room for. Raises ConfigError if it leaves none."""
    sizes = choose_sizes(
        sketch.config,
        sketch.machine,
        sketch.precision,
        model_context=sketch.cfg.max_context,
        param_bytes=sketch.param_bytes,
        kv_bytes_per_token=sketch.kv_bytes_per_token,
        slot_bytes=sketch.slot_bytes,
    )
    pool = PoolSize(
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        num_slots=sizes.max_rows,
        table_width=sizes.table_width,
        stacks_layers=sketch.checkpoint.stacks_layers,
    )
    # A draft has a row for each of its tokens, whatever the number of slots.
    ladder = make_ladder(
        max_rows=max(sizes.max_rows, 1 + sketch.max_drafts),
        max_tokens=sizes.chunk_tokens,
        max_mixed_tokens=sizes.mixed_chunk_tokens,
        min_rows=sizes.min_rows,
        mixes=sizes.mixes,
        window=min(sketch.config.num_continuous_decode_steps, sizes.page_size),  # two pages at most
    )
    return Blueprint(sketch=sketch, sizes=sizes, pool=pool, ladder=ladder)


def _keep_form(config: ServerConfig, files: ModelFiles) -> ServerConfig:
    saved = files.saved
    if saved is None:
        return config
    return keep_form(config, dtype=saved.dtype, quantization=saved.quantization)


def checkpoint_bits(files: ModelFiles, specs: Sequence[ParamSpec]) -> float:
    """Bits a weight takes in the files, on average, metadata included; 16 where there are no files."""
    if files.kind == "dummy":
        return 16
    num_weights = sum(math.prod(spec.shape) for spec in specs)
    return 8 * sum(path.stat().st_size for path in files.files) / num_weights


def _choose_images(
    config: ServerConfig, files: ModelFiles, checkpoint: Checkpoint, platform: str
) -> ImageSizes | None:
    """What the device holds for images; None for a model that reads text only."""
    vision = getattr(checkpoint.cfg, "vision", None)
    if vision is None:
        return None
    form = read_image_form(files.local_dir, files.hf_config["vision_config"])
    largest = config.max_image_pixels // form.tile_size**2  # tokens
    num_rows = config.image_cache_tokens or 4 * largest
    if num_rows < largest:
        raise ConfigError(
            f"image_cache_tokens must hold the largest image, {largest} tokens of max_image_pixels, got "
            f"{num_rows}.",
            param="image_cache_tokens",
        )
    is_int8_cpu = platform == "cpu" and checkpoint.quantization == "int8"
    return ImageSizes(
        form=form,
        width=vision.out_width,
        max_patches=largest * form.merge_size**2,
        num_rows=-(-num_rows // BLOCK_ROWS) * BLOCK_ROWS,
        window_patches=vision.window_patches,
        image_token_id=files.hf_config["image_token_id"],
        num_stages=vision.depth,
        patch_cost=checkpoint.count_patch_cost() * (CPU_INT8_GAIN if is_int8_cpu else 1),
    )


def _choose_grouping(
    config: ServerConfig,
    files: ModelFiles,
    machine: Machine,
    specs: Sequence[ParamSpec],
    division: Division,
    placement: Placement,
) -> Grouping:
    """What is served in 4 bits if anything is, and for which reason it is not unless somebody asks for it.

    Raises ConfigError for one who asks for what cannot be.
    """
    grouping = find_grouping(files, specs)
    has_kernel = has_int4_kernel(machine.platform, machine.compute_capability)
    marked = division.cut_specs(mark_groups(specs, grouping.group_sizes))
    limit = grouping.limit or find_grouping_limit(marked, by_kernel=has_kernel)
    if placement.held is not None:
        limit = limit or "hosts that share a model do not read packed matrices in parts"
    if limit and config.quantization == "int4":
        raise ConfigError(
            f"quantization int4 cannot serve {config.model_path} on {division.num_devices} "
            f"device{'s' if division.num_devices > 1 else ''}: {limit}. Serve it with another quantization; "
            "none is bfloat16.",
            param="quantization",
        )
    return replace(grouping, limit=limit if has_kernel else limit or "no kernel reads them here")


def _describe_target(
    config: ServerConfig, machine: Machine, cfg: ModelConfig, precision: Precision, num_devices: int
) -> KernelTarget:
    return KernelTarget(
        platform=machine.platform,
        head_dim=cfg.head_dim,
        num_kv_heads=cfg.num_kv_heads,
        page_size=choose_page_size(config, machine.platform),
        kv_dtype=precision.kv_dtype,
        compute_capability=machine.compute_capability,
        num_devices=num_devices,
        dtype=precision.dtype,
        device_kind=machine.device_kind,
        experts=describe_experts(cfg, dtype=precision.dtype, quantization=precision.quantization),
        tuned=machine.tuned,
    )
