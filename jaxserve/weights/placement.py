"""Which devices serve the model, and how arrays and programs are spread over them.

A `Placement` is made once, by build.py. The loader places parameters with it, the runner maps its programs:
the step is written as one device sees it (kernels_pallas/shards.py) and runs on all of them under
`jax.shard_map`. So what the devices exchange stands in the program, and does not depend on what a compiler
would infer. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.models.sharding import MESH_AXES, TENSOR


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices that share each layer, in the mesh's order; `mesh` is None if it is one alone."""

    mesh: Mesh | AbstractMesh | None = None  # an abstract one is enough to count with

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def make_sharding(self, axes: Sequence[str | None]) -> jax.sharding.Sharding:
        """How an array with these logical axes lies on the devices."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, make_spec(axes))

    def put(self, path: str, array: np.ndarray, axes: Sequence[str | None]) -> jax.Array:
        """The PutArray of the loader: each device is given its part."""
        return jax.device_put(array, None if self.mesh is None else self.make_sharding(axes))

    def spread(self, program: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The program of all devices, whose arrays are whole, from that of each. The specs are as
        jax.shard_map wants them; what is not cut must be the same on every device."""
        if self.mesh is None:
            return program
        return jax.shard_map(program, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def make_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes as those of the mesh."""
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))


def make_placement(devices: Sequence[Any]) -> Placement:
    """On these devices, real ones or those of a topology; a single one needs no mesh."""
    return Placement() if len(devices) == 1 else Placement(Mesh(np.array(devices), (TENSOR,)))


ALONE = Placement()
