"""Whether a model fits a slice, what is left there, and what would help where it does not.

Decides nothing itself: it asks blueprint.py, which a launch asks as well, about a machine that is not here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from jaxserve.blueprint import Blueprint, ModelSketch, fit_sketch, sketch_model
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.models.sharding import TENSOR
from jaxserve.planning.chips import GIB
from jaxserve.planning.slices import Slice, choose_tp_size, count_copies
from jaxserve.runner.checkpoint import read_family
from jaxserve.runner.sizing import MEMORY_SHARE, Machine, choose_max_rows, choose_page_size
from jaxserve.weights.placement import ALONE, Placement
from jaxserve.weights.resolve import ModelFiles

FEWER_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceFit:
    """A model on a slice: `num_copies` of it, each on `tp_size` devices. No blueprint where none fits."""

    where: Slice
    sketch: ModelSketch
    blueprint: Blueprint | None
    missing_bytes: int  # on a device, until the least that serves is there; 0 where it fits
    context: int  # tokens that one sequence is to have

    @property
    def num_copies(self) -> int:
        return count_copies(self.where.num_devices, self.sketch.tp_size, self.sketch.config.dp_size)

    @property
    def fits(self) -> bool:
        return self.blueprint is not None and self.largest_context >= self.context

    @property
    def largest_context(self) -> int:
        """Of one sequence: what the pool of one copy and the settings allow."""
        sizes = self.blueprint.sizes if self.blueprint else None
        return min(sizes.context_length, sizes.num_tokens) if sizes else 0

    @property
    def free_bytes(self) -> int:
        """Of a device, beside weights, pool and sampling state: for programs and what they compute with."""
        if self.blueprint is None:
            return self.where.chip.hbm_bytes - self.sketch.param_bytes
        taken = self.sketch.param_bytes + self.blueprint.kv_bytes + self.blueprint.slots_bytes
        return self.where.chip.hbm_bytes - taken


def fit_slice(config: ServerConfig, files: ModelFiles, where: Slice, context: int) -> SliceFit:
    """Ask what a launch on that slice would ask. Raises ConfigError for settings that no memory helps with,
    and WeightError for a model that is not served."""
    family, cfg = read_family(config.model_path, files)
    if config.dp_size > 1 and config.dp_size * config.tp_size > where.num_devices:
        raise ConfigError(
            f"dp_size {config.dp_size} with tp_size {config.tp_size} needs {config.dp_size * config.tp_size} "
            f"devices, and {where} has {where.num_devices}.",
            param="dp_size",
        )
    if config.tp_size == 1:
        tp_size = choose_tp_size(cfg, family.param_specs(cfg), where.num_devices // config.dp_size)
    else:
        tp_size = config.tp_size
    if where.num_devices % tp_size:
        raise ConfigError(
            f"tp_size {tp_size} does not divide the {where.num_devices} devices of {where}.", param="tp_size"
        )
    sketch = sketch_model(config, files, _as_machine(where), _imagine_devices(tp_size))
    missing_bytes = max(0, _needed_bytes(sketch, context) - _usable_bytes(sketch))
    try:
        blueprint = fit_sketch(sketch)
    except ConfigError:
        if not missing_bytes:
            raise
        blueprint = None
    return SliceFit(
        where=where, sketch=sketch, blueprint=blueprint, missing_bytes=missing_bytes, context=context
    )


def list_arrangements(config: ServerConfig, files: ModelFiles, where: Slice, context: int) -> list[SliceFit]:
    """The slice with the most devices to a copy first, which is the soonest with each token, and then with
    fewer and more copies, which give more of them in all. One where the settings say which."""
    first = fit_slice(config, files, where, context)
    if config.tp_size > 1 or config.dp_size > 1:
        return [first]
    found = [first]
    for tp_size in range(first.sketch.tp_size - 1, 0, -1):
        if first.sketch.tp_size % tp_size:
            continue
        changed = dataclasses.replace(config, dp_size=where.num_devices // tp_size)
        fit = fit_slice(changed, files, where, context)
        if fit.sketch.tp_size == tp_size:
            found.append(fit)
    return found


def suggest_remedies(config: ServerConfig, files: ModelFiles, fit: SliceFit) -> list[str]:
    """Changes that make it fit, each alone; the smallest larger slice of the chip last."""
    found = []
    for change, words in _list_changes(config, fit.where):
        try:
            changed = fit_slice(dataclasses.replace(config, **change), files, fit.where, fit.context)
        except ConfigError:  # not every shape can be served in 4 bits
            continue
        if changed.fits:
            found.append(f"{words}: weights {_gib(changed.sketch.param_bytes)} a device, {_pool(changed)}")
    larger = (Slice(chip=fit.where.chip, dims=dims) for dims in _list_grids(fit.where))
    for where in larger:
        changed = fit_slice(config, files, where, fit.context)
        if changed.fits:
            found.append(f"more chips, {where}: {_pool(changed)}")
            break
    return found


def _list_changes(config: ServerConfig, where: Slice) -> Iterable[tuple[dict, str]]:
    if config.quantization in ("auto", "none"):
        yield {"quantization": "int8"}, "--quantization int8"
        if where.chip.platform == "gpu":
            yield {"quantization": "fp8"}, "--quantization fp8"
            yield {"quantization": "int4"}, "--quantization int4"
    if config.kv_cache_dtype != "int8":
        yield {"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8"
    if (config.max_running_requests or FEWER_ROWS + 1) > FEWER_ROWS:
        yield {"max_running_requests": FEWER_ROWS}, f"--max-running-requests {FEWER_ROWS}"
    if config.quantization in ("auto", "none") and config.kv_cache_dtype != "int8":
        both = {"quantization": "int8", "kv_cache_dtype": "int8", "max_running_requests": FEWER_ROWS}
        yield both, "all three"


def _list_grids(where: Slice) -> Iterable[tuple[int, ...]]:
    for size in where.chip.slices:
        dims = tuple(int(part) for part in size.split("x"))
        if math.prod(dims) > where.num_chips:
            yield dims


def _imagine_devices(count: int) -> Placement:
    """Devices that share each layer, as many as that, on no machine."""
    return ALONE if count == 1 else Placement(AbstractMesh((count,), (TENSOR,)))


def _as_machine(where: Slice) -> Machine:
    chip = where.chip
    return Machine(
        platform=chip.platform,
        num_devices=where.num_devices,
        memory_bytes=chip.hbm_bytes,
        free_bytes=chip.hbm_bytes,
        compute_capability=chip.compute_capability,
        device_kind=chip.device_kind,
    )


def _usable_bytes(sketch: ModelSketch) -> int:
    return int(sketch.machine.memory_bytes * (sketch.config.mem_fraction_static or MEMORY_SHARE))


def _needed_bytes(sketch: ModelSketch, context: int) -> int:
    """The least that serves one sequence: weights, the slots that are wanted, and its pages."""
    platform = sketch.machine.platform
    slots = choose_max_rows(sketch.config, platform) + 1
    page_size = choose_page_size(sketch.config, platform)
    pages = max(2, math.ceil(context / page_size)) + 1
    return sketch.param_bytes + slots * sketch.slot_bytes + pages * page_size * sketch.kv_bytes_per_token


def _pool(fit: SliceFit) -> str:
    assert fit.blueprint is not None
    return f"{fit.num_copies * fit.blueprint.sizes.num_tokens:,} KV tokens"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
