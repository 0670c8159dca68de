"""Composition root of the engine: from settings and files to a loop that is ready to run.

Called by engine_main.py (a process of its own under `jaxserve launch`) and by llm.py (a thread). The only
place where weights, models, runner and scheduler meet; decides nothing itself but the order.
"""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.config import ServerConfig
from jaxserve.engine.loop import EngineLink, EngineLoop
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.dispatch import KernelSet, KernelTarget, choose_kernels
from jaxserve.models.interface import ModelConfig
from jaxserve.runner.buckets import make_ladder
from jaxserve.runner.checkpoint import Checkpoint, read_family
from jaxserve.runner.device_state import PoolSize, kv_bytes_per_token
from jaxserve.runner.host_memory import read_host_memory
from jaxserve.runner.images import ImageSizes
from jaxserve.runner.programs import use_compile_cache
from jaxserve.runner.runner import ModelRunner
from jaxserve.runner.sizing import (
    Machine,
    Precision,
    Sizes,
    check_devices,
    choose_page_size,
    choose_precision,
    choose_sizes,
    share_machine,
)
from jaxserve.scheduler.features import BLOCK_ROWS, FeatureCache
from jaxserve.scheduler.state import SchedulerState, new_state
from jaxserve.types import EngineInfo
from jaxserve.vision.limits import read_image_form
from jaxserve.weights.cache import cache_dir
from jaxserve.weights.placement import make_placement
from jaxserve.weights.resolve import ModelFiles

OnProgress = Callable[[str, float, float | None, str], None]  # stage, done, total, unit

logger = logging.getLogger("jaxserve.engine")


def build_engine(
    config: ServerConfig, files: ModelFiles, link: EngineLink, on_progress: OnProgress
) -> tuple[EngineLoop, ModelRunner, EngineInfo]:
    """Load the model, size the pool, compile the first programs; the rest compile on a thread.

    Raises ConfigError or WeightError with a sentence for the person who launched it.
    """
    start_s = time.perf_counter()
    machine = read_machine()
    check_devices(config, machine)
    use_compile_cache(_compile_cache_dir(config, machine))
    family, cfg = read_family(config.model_path, files)
    specs = family.param_specs(cfg)
    precision = choose_precision(config, machine, checkpoint_bits(files, specs))
    _log_precision(config, machine, precision)
    local_cfg = family.divide(cfg, config.tp_size).local_cfg
    kernels = choose_kernels(_describe_target(config, machine, local_cfg, precision.kv_dtype))
    checkpoint = Checkpoint(
        files=files,
        family=family,
        cfg=cfg,
        kernels=kernels,
        dtype=precision.dtype,
        quantization=precision.quantization,
        random_seed=config.random_seed or 0,
        download_dir=config.download_dir,
        placement=make_placement(jax.devices()[: config.tp_size]),
    )
    kv_dtype = jnp.dtype(precision.kv_dtype)
    images = _choose_images(config, files, cfg)
    sizes = choose_sizes(
        config,
        share_machine(machine, config.tp_size),
        precision,
        model_context=cfg.max_context,
        param_bytes=checkpoint.count_device_bytes() + (images.num_bytes if images else 0),
        kv_bytes_per_token=kv_bytes_per_token(local_cfg, kv_dtype, kernels.make_kv),
        slot_bytes=8 * math.ceil(cfg.vocab_size / config.tp_size),
    )
    max_drafts = config.speculative_num_draft_tokens if config.speculative_algorithm == "ngram" else 0
    runner = _load_runner(checkpoint, sizes, kv_dtype, max_drafts, images, on_progress)
    runner.programs.compile_rest(on_done=lambda: _finish_warm_up(runner))
    state = _make_state(config, sizes, images, max_drafts)
    loop = EngineLoop(
        runner,
        runner,
        state,
        link,
        context_length=sizes.context_length,
        max_queued_requests=config.max_queued_requests,
    )
    info = _describe_engine(config, files, cfg, sizes, precision, machine, runner, start_s)
    _log_sizes(sizes, precision, runner, kernels, info)
    return loop, runner, info


def _make_state(
    config: ServerConfig, sizes: Sizes, images: ImageSizes | None, max_drafts: int
) -> SchedulerState:
    """An idle scheduler over the pool."""
    return new_state(
        sizes.num_pages,
        sizes.page_size,
        sizes.max_rows,
        use_prefix_cache=not config.disable_radix_cache,
        prefers_cached=config.schedule_policy == "lpm",
        max_drafts=max_drafts,
        features=FeatureCache(images.num_rows, images.max_tokens) if images else None,
    )


def _choose_images(config: ServerConfig, files: ModelFiles, cfg: ModelConfig) -> ImageSizes | None:
    """What the device holds for images; None for a model that reads text only."""
    vision = getattr(cfg, "vision", None)
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
    return ImageSizes(
        form=form,
        width=vision.out_width,
        max_patches=largest * form.merge_size**2,
        num_rows=-(-num_rows // BLOCK_ROWS) * BLOCK_ROWS,
        window_patches=vision.window_patches,
        image_token_id=files.hf_config["image_token_id"],
    )


def _describe_target(config: ServerConfig, machine: Machine, cfg: ModelConfig, kv_dtype: str) -> KernelTarget:
    return KernelTarget(
        platform=machine.platform,
        head_dim=cfg.head_dim,
        num_kv_heads=cfg.num_kv_heads,
        page_size=choose_page_size(config, machine.platform),
        kv_dtype=kv_dtype,
        compute_capability=machine.compute_capability,
        num_devices=config.tp_size,
        device_kind=machine.device_kind,
    )


def _log_precision(config: ServerConfig, machine: Machine, precision: Precision) -> None:
    if machine.platform == "cpu" and precision.quantization == "fp8":
        logger.warning("On a CPU fp8 weights are converted in every step; --quantization int8 is far faster.")
    served = precision.dtype if precision.quantization == "none" else precision.quantization
    logger.info("Load weight begin. %s as %s", config.model_path, served)


def _log_sizes(
    sizes: Sizes, precision: Precision, runner: ModelRunner, kernels: KernelSet, info: EngineInfo
) -> None:
    logger.info(
        "max_total_num_tokens=%d, chunked_prefill_size=%d, max_running_requests=%d, context_len=%d, "
        "page_size=%d, kv_cache=%.2f GB %s, kernels=%s, device=%s",
        sizes.num_tokens,
        sizes.chunk_tokens,
        sizes.max_rows,
        sizes.context_length,
        sizes.page_size,
        runner.kv_bytes / 1e9,
        precision.kv_dtype,
        kernels.name,
        info.device_kind,
    )


def read_machine() -> Machine:
    """The hardware as JAX and the operating system tell it."""
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "its backend gives no reason"
        raise ConfigError(
            f"JAX finds no device to run on: {reason}. Install the extra for your hardware "
            "(pip install '.[cuda13]' or '.[tpu]'), or set JAX_PLATFORMS=cpu."
        ) from error
    kind = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    stats = device.memory_stats() if kind != "cpu" else None
    if stats:
        memory_bytes = stats["bytes_limit"]
        free_bytes = memory_bytes - stats["bytes_in_use"]
    else:
        memory = read_host_memory()
        memory_bytes, free_bytes = memory.total_bytes, memory.free_bytes
    return Machine(
        platform=kind,
        num_devices=jax.device_count(),
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        compute_capability=getattr(device, "compute_capability", ""),
        device_kind=device.device_kind,
        # XLA's CPU backend converted a bf16 pool for every scatter into it, and back.
        updates_bf16_in_place=kind != "cpu" or jax.__version_info__ >= (0, 11),
    )


def checkpoint_bits(files: ModelFiles, specs: list) -> float:
    """Bits a weight takes in the files, on average, metadata included; 16 where there are no files."""
    if files.kind == "dummy":
        return 16
    num_weights = sum(math.prod(spec.shape) for spec in specs)
    return 8 * sum(path.stat().st_size for path in files.files) / num_weights


def _load_runner(
    checkpoint: Checkpoint,
    sizes: Sizes,
    kv_dtype: jnp.dtype,
    max_drafts: int,
    images: ImageSizes | None,
    on_progress: OnProgress,
) -> ModelRunner:
    """Read the weights while the pool is allocated and the first programs compile, which needs their shapes
    only."""
    pool = PoolSize(
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        num_slots=sizes.max_rows,
        table_width=sizes.table_width,
    )
    # A draft has a row for each of its tokens, whatever the number of slots.
    ladder = make_ladder(
        max_rows=max(sizes.max_rows, 1 + max_drafts),
        max_tokens=sizes.chunk_tokens,
        max_mixed_tokens=sizes.mixed_chunk_tokens,
        min_rows=sizes.min_rows,
        mixes=sizes.mixes,
    )
    model = checkpoint.describe_model()
    runner = ModelRunner(model, checkpoint.local_cfg, pool, kv_dtype, ladder, checkpoint, images)
    runner.programs.begin()
    start_s = time.perf_counter()
    runner.load(lambda stage, done, total: on_progress(stage, done, total, "B"))
    num_bytes = checkpoint.count_bytes()
    logger.info("Load weight end. %.2f GB in %.1f s", num_bytes / 1e9, time.perf_counter() - start_s)
    runner.warm_up(lambda done, total: on_progress("Compiling", done, total, "programs"))
    return runner


def _finish_warm_up(runner: ModelRunner) -> None:
    runner.compiles.expect_no_more()
    logger.info("All %d programs are ready.", len(runner.programs.ready))


def _describe_engine(
    config: ServerConfig,
    files: ModelFiles,
    cfg,
    sizes: Sizes,
    precision: Precision,
    machine: Machine,
    runner: ModelRunner,
    start_s: float,
) -> EngineInfo:
    return EngineInfo(
        model_path=config.model_path,
        architecture=files.hf_config["architectures"][0],
        model_type=files.hf_config.get("model_type", ""),
        vocab_size=cfg.vocab_size,
        context_length=min(sizes.context_length, sizes.num_tokens),
        max_total_tokens=sizes.num_tokens,
        max_running_requests=sizes.max_rows,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages - 1,
        chunked_prefill_size=sizes.chunk_tokens,
        param_bytes=runner.param_bytes,
        kv_bytes=runner.kv_bytes,
        dtype=precision.dtype,
        quantization=precision.quantization,
        platform=machine.platform,
        device_kind=jax.devices()[0].device_kind,
        num_devices=config.tp_size,
        startup_s=time.perf_counter() - start_s,
    )


def _compile_cache_dir(config: ServerConfig, machine: Machine) -> Path:
    """Programs for the CPU hold its own instructions: another CPU gets another folder."""
    if config.compilation_cache_dir:
        return Path(config.compilation_cache_dir).expanduser()
    folder = cache_dir() / "programs"
    if machine.platform != "cpu":
        return folder / machine.platform
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    traits = "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    return folder / f"cpu-{hashlib.sha256(traits.encode()).hexdigest()[:12]}"
