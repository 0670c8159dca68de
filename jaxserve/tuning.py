"""The sizes of the TPU kernels' blocks for a start: timed on the TPU that is there, or read from their files.

Called by build.py before anything is decided. Those that were timed here (`--tune-kernels`) go before those
that ship with jaxserve, and where neither has any, the kernels choose by a model of the chip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from jaxserve.blueprint import sketch_model
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.kv_pages import PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import ANOTHER_CHIP, CHIPS, TunedBlocks, find_limit
from jaxserve.kernels_pallas.paged_attention.tpu_tuned import SHIPPED, read_tuned, write_tuned
from jaxserve.runner.sizing import Machine, choose_page_size
from jaxserve.weights.placement import Placement
from jaxserve.weights.resolve import ModelFiles

TUNED_NAME = "tuned.json"  # beside compiled programs

logger = logging.getLogger("jaxserve.engine")


def find_tuned(
    config: ServerConfig,
    files: ModelFiles,
    machine: Machine,
    placement: Placement,
    path: Path,
    on_progress: Callable[[str, float, float | None, str], None],
) -> Machine:
    """The machine with all sizes that are known; those for this model are timed first if that is asked for
    and they are not in the file. Raises ConfigError where there is nothing to time."""
    if config.tune_kernels and machine.platform != "tpu":
        raise ConfigError(
            f"tune_kernels times kernels for TPUs, and JAX finds {machine.platform} devices.",
            param="tune_kernels",
        )
    own = _read(path)
    if config.tune_kernels and jax.process_index() == 0:  # which tells the other hosts
        own = _tune(config, files, machine, placement, own, path, on_progress)
    return replace(machine, tuned=(*own, *read_tuned(SHIPPED)))


def _read(path: Path) -> tuple[TunedBlocks, ...]:
    try:
        return read_tuned(path)
    except (OSError, ValueError) as error:
        logger.warning("%s. It is passed over; delete it to have it made anew.", error)
        return ()


def _tune(
    config: ServerConfig,
    files: ModelFiles,
    machine: Machine,
    placement: Placement,
    own: tuple[TunedBlocks, ...],
    path: Path,
    on_progress: Callable[[str, float, float | None, str], None],
) -> tuple[TunedBlocks, ...]:
    """What is known, with the sizes for this model's heads and pool in front."""
    sketch = sketch_model(config, files, machine, placement)
    cfg, kv_dtype = sketch.checkpoint.local_cfg, sketch.precision.kv_dtype
    page_size = choose_page_size(config, machine.platform)
    if limit := find_limit(cfg.head_dim, page_size, kv_dtype):
        logger.warning("No kernels are tuned: %s.", limit)
        return own
    # Pallas for TPUs takes a second to import, so it waits until it is known to be wanted.
    from jaxserve.kernels_pallas.paged_attention.tpu_tuner import Workload, tune

    layout = PagesLayout(num_kv_heads=cfg.num_kv_heads, head_dim=cfg.head_dim, kv_dtype=kv_dtype)
    workload = Workload(layout=layout, num_heads=cfg.num_heads, page_size=page_size)
    known = {
        row.rows_per_token
        for row in own
        if (row.device_kind, row.jax_version, row.layout, row.page_size)
        == (machine.device_kind, jax.__version__, layout, page_size)
    }
    if known >= {0, workload.rows_per_token}:
        return own
    chip = CHIPS.get(machine.device_kind, ANOTHER_CHIP)
    rows = tune(
        workload,
        machine.device_kind,
        chip,
        on_progress=lambda done, total: on_progress("Tuning", done, total, "sizes"),
    )
    for row in rows:
        logger.info(
            "Tuned %s: %s, %.0f us; the sizes for its chip take %.0f us.",
            "prefill" if row.rows_per_token else "decode",
            row.blocks,
            row.time_s * 1e6,
            row.model_time_s * 1e6,
        )
    try:
        write_tuned(path, rows)
    except (OSError, ValueError) as error:
        logger.warning("Tuned sizes are not kept: %s", error)
    return (*rows, *own)
