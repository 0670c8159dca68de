"""Composition root of the engine: from settings and files to a loop that is ready to run.

Called by engine_main.py (a process of its own under `jaxserve launch`) and by llm.py (a thread); a host that
follows another (follower_main.py) builds the runner alone. The only place where weights, models, runner and
scheduler meet; blueprint.py decides, and this only the order.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax

from jaxserve.blueprint import Blueprint, ModelSketch, draw_blueprint
from jaxserve.config import ServerConfig
from jaxserve.engine.loop import EngineLink, EngineLoop
from jaxserve.errors import ConfigError
from jaxserve.hosts.lead_runner import LeadRunner
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.link import digest_of
from jaxserve.runner.host_memory import read_host_memory
from jaxserve.runner.programs import OneHost, ProgramHosts, use_compile_cache
from jaxserve.runner.runner import ModelRunner
from jaxserve.runner.sizing import Machine, check_devices
from jaxserve.scheduler.features import FeatureCache
from jaxserve.scheduler.state import SchedulerState, new_state
from jaxserve.tuning import TUNED_NAME, find_tuned
from jaxserve.types import EngineInfo
from jaxserve.weights.cache import cache_dir
from jaxserve.weights.placement import choose_devices, make_placement
from jaxserve.weights.resolve import ModelFiles

OnProgress = Callable[[str, float, float | None, str], None]  # stage, done, total, unit

logger = logging.getLogger("jaxserve.engine")


class Hosts(Protocol):
    """The other hosts that build the same runner, if there are some (hosts/). Each of these may wait."""

    def admit(self, name: str, use: Callable[[], None]) -> None: ...  # as ProgramHosts, and so the next
    def miss(self, name: str) -> None: ...
    def agree_hardware(self, machine: Machine) -> Machine: ...  # what all plan for
    def tell_loaded(self, digest: str) -> None: ...  # of the sizes that were decided: all must have the same


def build_engine(
    config: ServerConfig,
    files: ModelFiles,
    link: EngineLink,
    on_progress: OnProgress,
    leader: Leader | None = None,
) -> tuple[EngineLoop, ModelRunner, EngineInfo]:
    """Load the model, size the pool, compile the first programs; the rest compile on a thread.

    `leader` speaks to the other hosts, if there are some; the loop tells them what the runner does. Raises
    ConfigError or WeightError with a sentence for the person who launched it.
    """
    start_s = time.perf_counter()
    blueprint, runner = build_runner(config, files, on_progress, leader)
    driven = runner if leader is None else LeadRunner(runner, leader)
    loop = EngineLoop(
        driven,
        driven,
        _make_state(blueprint),
        link,
        context_length=blueprint.sizes.context_length,
        max_queued_requests=config.max_queued_requests,
    )
    info = _describe_engine(blueprint, files, runner, start_s)
    _log_sizes(blueprint, runner, info)
    return loop, runner, info


def build_runner(
    config: ServerConfig, files: ModelFiles, on_progress: OnProgress, hosts: Hosts | None = None
) -> tuple[Blueprint, ModelRunner]:
    """The runner, with weights and its first programs, on this host's part of the devices. Raises as
    `build_engine` does."""
    machine = read_machine()
    check_devices(config, machine)
    cache = _compile_cache_dir(config, machine)
    use_compile_cache(cache)
    placement = make_placement(choose_devices(config.tp_size))
    machine = find_tuned(config, files, machine, placement, cache / TUNED_NAME, on_progress)
    if hosts is not None:
        machine = hosts.agree_hardware(machine)  # host 0's sizes are everybody's
    blueprint = draw_blueprint(config, files, machine, placement)
    _log_precision(config, machine, blueprint.sketch)
    runner = _load_runner(blueprint, on_progress, hosts or OneHost())
    if hosts is not None:
        sketch = blueprint.sketch
        kernels = sketch.checkpoint.kernels.name
        hosts.tell_loaded(
            digest_of(blueprint.sizes, blueprint.pool, blueprint.ladder, sketch.precision, kernels)
        )
    runner.programs.compile_rest(on_done=lambda: _finish_warm_up(runner))
    return blueprint, runner


def _make_state(blueprint: Blueprint) -> SchedulerState:
    """An idle scheduler over the pool."""
    sizes, sketch, images = blueprint.sizes, blueprint.sketch, blueprint.sketch.images
    return new_state(
        sizes.num_pages,
        sizes.page_size,
        sizes.max_rows,
        use_prefix_cache=not sketch.config.disable_radix_cache,
        prefers_cached=sketch.config.schedule_policy == "lpm",
        max_drafts=sketch.max_drafts,
        features=FeatureCache(images.num_rows, images.max_tokens) if images else None,
    )


def _log_precision(config: ServerConfig, machine: Machine, sketch: ModelSketch) -> None:
    precision = sketch.precision
    if machine.platform == "cpu" and precision.quantization == "fp8":
        logger.warning("On a CPU fp8 weights are converted in every step; --quantization int8 is far faster.")
    if precision.quantization == "int4" and not sketch.checkpoint.kernels.reads_int4:
        logger.warning("Here 4-bit weights become bfloat16 in every step: they save memory, and take time.")
    if sketch.unpacks_because:
        logger.info("The checkpoint's 4 bits are not served as they are: %s.", sketch.unpacks_because)
    logger.info("Load weight begin. %s as %s", config.model_path, precision.served_as)


def _log_sizes(blueprint: Blueprint, runner: ModelRunner, info: EngineInfo) -> None:
    sizes, sketch = blueprint.sizes, blueprint.sketch
    logger.info(
        "max_total_num_tokens=%d, chunked_prefill_size=%d, max_running_requests=%d, context_len=%d, "
        "page_size=%d, kv_cache=%.2f GB %s, kernels=%s, device=%s",
        sizes.num_tokens,
        sizes.chunk_tokens,
        sizes.max_rows,
        sizes.context_length,
        sizes.page_size,
        runner.kv_bytes / 1e9,
        sketch.precision.kv_dtype,
        sketch.checkpoint.kernels.name,
        info.device_kind,
    )


def read_machine() -> Machine:
    """The hardware as JAX and the operating system tell it."""
    try:
        device = jax.local_devices()[0]
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


def _load_runner(blueprint: Blueprint, on_progress: OnProgress, hosts: ProgramHosts) -> ModelRunner:
    """Read the weights while the pool is allocated and the first programs compile, which needs their shapes
    only."""
    sketch, checkpoint = blueprint.sketch, blueprint.sketch.checkpoint
    runner = ModelRunner(
        checkpoint.describe_model(),
        checkpoint.local_cfg,
        blueprint.pool,
        sketch.kv_dtype,
        blueprint.ladder,
        checkpoint,
        sketch.images,
        hosts,
    )
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
    blueprint: Blueprint, files: ModelFiles, runner: ModelRunner, start_s: float
) -> EngineInfo:
    sizes, sketch = blueprint.sizes, blueprint.sketch
    return EngineInfo(
        model_path=sketch.config.model_path,
        architecture=files.hf_config["architectures"][0],
        model_type=files.hf_config.get("model_type", ""),
        vocab_size=sketch.cfg.vocab_size,
        context_length=min(sizes.context_length, sizes.num_tokens),
        max_total_tokens=sizes.num_tokens,
        max_running_requests=sizes.max_rows,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages - 1,
        chunked_prefill_size=sizes.chunk_tokens,
        param_bytes=runner.param_bytes,
        kv_bytes=runner.kv_bytes,
        dtype=sketch.precision.dtype,
        quantization=sketch.precision.quantization,
        platform=sketch.machine.platform,
        device_kind=sketch.machine.device_kind,
        num_devices=sketch.tp_size,
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
