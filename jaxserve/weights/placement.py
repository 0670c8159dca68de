"""Which devices serve the model, and how arrays and programs are spread over them.

A `Placement` is made once, by build.py. The loader places parameters with it, the runner maps its programs:
the step is written as one device sees it (kernels_pallas/shards.py) and runs on all of them under
`jax.shard_map`. So what the devices exchange stands in the program, and does not depend on what a compiler
would infer. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.errors import ConfigError
from jaxserve.models.sharding import MESH_AXES, TENSOR


class HostArray(Protocol):
    """A NumPy array of what this process holds, or one of all devices' parts, which are read from a file when
    they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Any, /) -> np.ndarray: ...
    def __array__(self, dtype: Any = None, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices that share each layer, in the mesh's order; `mesh` is None if it is one alone."""

    mesh: Mesh | AbstractMesh | None = None  # an abstract one is enough to count with

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def held(self) -> range | None:
        """The devices that belong to this process; None if all do."""
        if not isinstance(self.mesh, Mesh) or jax.process_count() == 1:  # or it is of a topology, for a plan
            return None
        own = [i for i, d in enumerate(self.mesh.devices.flat) if d.process_index == jax.process_index()]
        held = range(own[0], own[-1] + 1)
        assert own == list(held), f"the devices of a host are not together in {self.mesh}"
        return held

    def make_sharding(self, axes: Sequence[str | None]) -> jax.sharding.Sharding:
        """How an array with these logical axes lies on the devices."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, make_spec(axes))

    def put(self, path: str, array: HostArray, axes: Sequence[str | None]) -> jax.Array:
        """The PutArray of the loader: each device of this process is given its part. A NumPy array is of
        those parts; of one that is still to be read nothing else is read."""
        if self.mesh is None:
            return jax.device_put(np.asarray(array))
        sharding = self.make_sharding(axes)
        if isinstance(array, np.ndarray):
            return put_held(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def spread(self, program: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The program of all devices, whose arrays are whole, from that of each. The specs are as
        jax.shard_map wants them; what is not cut must be the same on every device."""
        if self.mesh is None:
            return program
        return jax.shard_map(program, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def make_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes as those of the mesh."""
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))


def put_held(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of all devices, from what those of this process hold of it. Other hosts do likewise."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, array)


def read_held(array: jax.Array) -> np.ndarray:
    """What devices of this process hold of an array."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    by_place = [
        ([part.indices(length)[:2] for part, length in zip(shard.index, array.shape, strict=True)], shard)
        for shard in array.addressable_shards
    ]
    axes = range(array.ndim)
    first = [min(place[axis][0] for place, _ in by_place) for axis in axes]
    end = [max(place[axis][1] for place, _ in by_place) for axis in axes]
    held = np.empty([stop - start for start, stop in zip(first, end, strict=True)], array.dtype)
    for place, shard in by_place:
        held[tuple(slice(place[axis][0] - first[axis], place[axis][1] - first[axis]) for axis in axes)] = (
            np.asarray(shard.data)
        )
    return held


def choose_devices(num_devices: int) -> list[Any]:
    """So many devices, as many of each host, those of a host together. Every host chooses alike. Raises
    ConfigError if a host has fewer."""
    num_own = num_devices // jax.process_count()
    chosen = []
    for index in range(jax.process_count()):
        own = [device for device in jax.devices() if device.process_index == index]
        if len(own) < num_own:
            raise ConfigError(
                f"tp_size {num_devices} asks for {num_own} devices of each host, and one has {len(own)}.",
                param="tp_size",
            )
        chosen += own[:num_own]
    return chosen


def make_placement(devices: Sequence[Any]) -> Placement:
    """On these devices, real ones or those of a topology; a single one needs no mesh."""
    return Placement() if len(devices) == 1 else Placement(Mesh(np.array(devices), (TENSOR,)))


ALONE = Placement()
