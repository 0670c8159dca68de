"""The checkpoint behind the served weights: enough to read it again, or another one in its place.

Made by build.py, kept by the runner. Another checkpoint must be of the same architecture, to the field,
because the compiled programs are; its files may be of any kind and type. Reading may be stopped from another
thread. Knows nothing of devices beyond the `placement` that arrays go to.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxserve.errors import UnavailableError, WeightError
from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.models.interface import ParamSpec
from jaxserve.models.quant import bind_kernels
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import Division
from jaxserve.runner.grouping import mark_groups
from jaxserve.runner.host_memory import read_host_memory
from jaxserve.runner.memory import delete_arrays
from jaxserve.weights.building import PutArray
from jaxserve.weights.loader import load_params
from jaxserve.weights.orbax_restore import restore_params
from jaxserve.weights.placement import ALONE, HostArray, Placement
from jaxserve.weights.resolve import ModelFiles, resolve_model
from jaxserve.weights.served import count_device_bytes, count_served_bytes, describe_params
from jaxserve.weights.stacks import LayerStacks, describe_stacks

OnProgress = Callable[[str, float, float | None], None]  # stage, done, total

GIB = 1 << 30

logger = logging.getLogger("jaxserve.runner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Files, and how they are made into parameters."""

    files: ModelFiles
    family: Any
    cfg: Any
    kernels: KernelSet
    dtype: str
    quantization: str
    group_sizes: Mapping[str, int] = field(default_factory=dict)  # of what is served in 4 bits, by path
    random_seed: int = 0
    download_dir: str | None = None
    placement: Placement = ALONE
    stacks_layers: bool = False  # parameters of all layers in one array, with an axis of them in front
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def local_cfg(self) -> Any:
        """The config of the part that one device holds."""
        return self._divide().local_cfg

    def _divide(self) -> Division:
        return self.family.divide(self.cfg, self.placement.num_devices)

    def list_whole_specs(self) -> list[ParamSpec]:
        """The parameters as if one device held them."""
        return mark_groups(self.family.param_specs(self.cfg), self.group_sizes)

    def _list_specs(self) -> list[ParamSpec]:
        return self._divide().cut_specs(self.list_whole_specs())

    def _make_model(self, params: Mapping[str, Any]) -> nnx.Module:
        return self.family.Model(self.local_cfg, bind_kernels(params, self.kernels), self.kernels)

    def read_model(self, on_progress: OnProgress, put: PutArray | None = None) -> nnx.Module:
        """The model with its parameters. Raises WeightError, and UnavailableError once `stopping` is set."""

        def tell(stage: str, done: float, total: float | None) -> None:
            if self.stopping.is_set():
                raise UnavailableError("The engine is shutting down; the weights were not read to the end.")
            on_progress(stage, done, total)

        load = partial(
            restore_params
            if self.files.kind == "orbax"
            else partial(load_params, random_seed=self.random_seed),
            self.files,
            [replace(spec, held=self.placement.held) for spec in self._list_specs()],
            dtype=self.dtype,
            quantization=self.quantization,
            on_progress=tell,
        )
        put = put or self.placement.put
        if not self.stacks_layers:
            return self._make_model(load(put=put))
        stacks = LayerStacks(put, self.cfg.num_layers)
        try:
            return self._make_model(stacks.collect(load(put=stacks.put)))
        except BaseException:
            stacks.delete()
            raise

    def read_tree(self, on_progress: OnProgress) -> Any:
        """The parameters on the device, as the step programs take them; on failure nothing stays there."""
        placed: list[jax.Array] = []

        def put(path: str, array: HostArray, axes: Sequence[str | None]) -> jax.Array:
            placed.append(self.placement.put(path, array, axes))
            return placed[-1]

        try:
            return jax.block_until_ready(nnx.split(self.read_model(on_progress, put))[1])
        except BaseException:
            delete_arrays(placed)
            raise

    def read_values(self, on_progress: OnProgress) -> list[np.ndarray]:
        """The same on the host, by leaf of that tree. Raises WeightError if the host has no room."""
        num_bytes = self.count_bytes()
        free_bytes = read_host_memory().free_bytes
        if num_bytes > free_bytes:
            raise WeightError(
                f"The new weights take {num_bytes / GIB:.1f} GiB of host memory until they are in place, "
                f"and {free_bytes / GIB:.1f} GiB are free."
            )
        model = self.read_model(on_progress, put=lambda _path, array, _axes: np.asarray(array))  # type: ignore[arg-type]
        return jax.tree.leaves(nnx.split(model)[1])

    def find_other(self, model_path: str, load_format: str) -> Checkpoint:
        """Another checkpoint in place of this one, checked to be of the same architecture; nothing is read
        but its config. Raises ConfigError or WeightError naming what differs."""
        files = resolve_model(
            model_path,
            download_dir=self.download_dir,
            load_format=load_format,
            on_progress=lambda *_: None,
        )
        family, cfg = read_family(model_path, files)
        if family is not self.family:
            raise WeightError(
                f"{model_path} is a {_architecture(files)}; this server serves a {_architecture(self.files)}."
            )
        for name in (setting.name for setting in dataclasses.fields(self.cfg)):
            served, other = getattr(self.cfg, name), getattr(cfg, name)
            if served != other:
                raise WeightError(
                    f"{model_path} has {name} {other}, the served model has {served}: its weights do not fit."
                )
        return dataclasses.replace(self, files=files)

    def describe_model(self) -> nnx.Module:
        """The model with shapes and types in place of its parameters, before anything is read."""
        params = describe_params(
            self._list_specs(), dtype=self.dtype, quantization=self.quantization, placement=self.placement
        )
        if self.stacks_layers:
            params = describe_stacks(params, self.cfg.num_layers)
        return self._make_model(params)

    def count_bytes(self) -> int:
        """Of the served parameters."""
        return count_served_bytes(self._list_specs(), dtype=self.dtype, quantization=self.quantization)

    def count_device_bytes(self) -> int:
        """Those of them that each device holds."""
        return count_device_bytes(self._list_specs(), dtype=self.dtype, quantization=self.quantization)

    def count_patch_cost(self) -> float:
        """What the vision encoder takes for a patch, in tokens of a prompt: what the bytes of their matrices
        say, since products of wider types take longer too."""
        specs = [spec for spec in self._list_specs() if spec.kind in ("matrix", "exact")]
        of_vision = [spec for spec in specs if spec.path.startswith("vision.")]
        of_language = [spec for spec in specs if not spec.path.startswith("vision.")]
        count = partial(count_device_bytes, dtype=self.dtype, quantization=self.quantization)
        return count(of_vision) / count(of_language)


def log_progress(stage: str, done: float, total: float | None) -> None:
    """For reading while the server is up: the end of it is worth a line."""
    if done == total:
        logger.info("%s: %.2f GB", stage, done / 1e9)


def read_family(model_path: str, files: ModelFiles) -> tuple[Any, Any]:
    """The family module and its Config of a model; WeightError if it is none that we serve."""
    try:
        family = find_family(files.hf_config)
        return family, family.Config.from_hf(files.hf_config)
    except (ValueError, KeyError, TypeError) as error:
        detail = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise WeightError(f"{model_path} cannot be served: {detail}.") from error


def _architecture(files: ModelFiles) -> str:
    return ", ".join(files.hf_config.get("architectures") or ["model of no name"])
