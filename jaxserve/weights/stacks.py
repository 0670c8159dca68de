"""Parameters of all layers in one array, with an axis of layers in front: what a program that loops wants.

`layers.3.w_qkv_FD` becomes the fourth part of `layers.w_qkv_FD`. Called by runner/checkpoint.py, between the
loader, which makes one parameter after another, and the `put` that places it: each goes into its stack at
once and is freed, so that a device never holds the parameters twice. Knows nothing of families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxserve.weights.building import PutArray
from jaxserve.weights.placement import HostArray

LAYER_PATH = re.compile(r"(?P<owner>(?:language\.)?layers)\.(?P<layer>\d+)\.(?P<name>\w+)")


class StackPlace(NamedTuple):
    """Where an array of a layer went: the stack of its name, shape and type, as a parameter may be several
    arrays."""

    path: str
    shape: tuple[int, ...]
    item_type: np.dtype


class LayerStacks:
    """Stacks in the making, on the device or the host, wherever `put` places an array."""

    def __init__(self, put: PutArray, num_layers: int):
        self._put = put
        self._num_layers = num_layers
        self._stacks: dict[StackPlace, Any] = {}

    def put(self, path: str, array: HostArray, axes: Sequence[str | None]) -> Any:
        """A PutArray: gives the place in a stack for what belongs to a layer, and the array for the rest."""
        match = LAYER_PATH.fullmatch(path)
        placed = self._put(path, array, axes)
        if match is None:
            return placed
        place, layer = StackPlace(stacked_path(path), array.shape, array.dtype), int(match["layer"])
        if isinstance(placed, np.ndarray):
            stack = self._stacks.setdefault(place, np.empty((self._num_layers, *placed.shape), placed.dtype))
            stack[layer] = placed
            return place
        if place not in self._stacks:
            self._stacks[place] = _allocate(placed, self._num_layers)
        self._stacks[place] = _write_layer(self._stacks[place], placed, layer)
        placed.delete()
        return place

    def collect(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that a loader made with `put`, with stacks in place of the layers'."""

        def find(leaf: Any) -> Any:
            return self._stacks[leaf] if isinstance(leaf, StackPlace) else leaf

        by_path = {stacked_path(path): value for path, value in params.items()}
        return jax.tree.map(find, by_path, is_leaf=lambda leaf: isinstance(leaf, StackPlace))

    def delete(self) -> None:
        """Free what is on a device."""
        for stack in self._stacks.values():
            if isinstance(stack, jax.Array):
                stack.delete()


def describe_stacks(params: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The shapes and types of stacks, from those of the parameters of every layer."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = None if leaf.sharding is None else _stack_sharding(leaf.sharding)
        return jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype, sharding=sharding)

    return {
        stacked_path(path): jax.tree.map(stack, value) if LAYER_PATH.fullmatch(path) else value
        for path, value in params.items()
    }


def stacked_path(path: str) -> str:
    """The path of the stack that holds a parameter, or its own."""
    match = LAYER_PATH.fullmatch(path)
    return path if match is None else f"{match['owner']}.{match['name']}"


def _allocate(first: jax.Array, num_layers: int) -> jax.Array:
    make = partial(jnp.zeros, (num_layers, *first.shape), first.dtype)
    return jax.jit(make, out_shardings=_stack_sharding(first.sharding))()


@partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, array: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)


def _stack_sharding(sharding: Sharding) -> Sharding:
    """That of a layer's array, with the axis of layers on every device."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding
