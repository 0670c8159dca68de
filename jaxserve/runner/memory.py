"""Arrays that leave the device and come back: weights moved to the host, dropped, put back, exchanged.

Held by the runner, for sleep and for other weights; used on a thread, while no step runs. A tree whose
arrays were deleted keeps its structure, shapes and shardings, so it is the pattern for what comes back; used
by mistake it raises. Everything goes array by array. Knows nothing of models, steps or requests.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.weights.placement import put_held, read_held

ALIGNMENT = 64  # bytes; JAX on the CPU takes a host array that starts on this as it is, without a copy

# What a device or a host that has no room raises (jax.errors.JaxRuntimeError is a RuntimeError).
NO_ROOM = (RuntimeError, MemoryError)


class LostWeightsError(RuntimeError):
    """Weights left the device, and neither they nor others could be put there: nothing can be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes held now, and which of "weights" and "kv_cache" are away."""

    param_bytes: int
    kv_bytes: int
    slot_bytes: int  # sampling state and block tables
    device_bytes: int  # all that the process holds, as the allocator counts; 0 where it does not (CPU)
    host_param_bytes: int  # of weights that sleep in host memory
    released: tuple[str, ...]


def live_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays that are not deleted."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if not leaf.is_deleted())


def allocated_bytes() -> int:
    """What this process holds of the first device, programs' temporaries included; 0 where nobody counts."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["bytes_in_use"]) if stats else 0


def delete_arrays(tree: Any) -> None:
    """Free the device memory of a tree's arrays, whoever else refers to them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def trim_host_memory() -> None:
    """Give memory that nobody uses back to the system, what a device that is the CPU has freed included.

    A model object that was taken apart is garbage in a cycle.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give back what was freed: glibc keeps pieces of up to 32 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Weights:
    """The parameters of the served model: on the device, kept on the host, or in their files only.

    `tree` is what the step programs take. After an exception other than LostWeightsError it is as before.
    """

    def __init__(self, tree: Any):
        self.tree = tree
        self._kept: list[np.ndarray] | None = None  # by leaf of the tree

    @property
    def is_away(self) -> bool:
        return all(leaf.is_deleted() for leaf in jax.tree.leaves(self.tree))

    @property
    def is_kept(self) -> bool:
        """Whether they are away, with a copy on the host."""
        return self._kept is not None

    @property
    def kept_bytes(self) -> int:
        return sum(value.nbytes for value in self._kept or ())

    def move_to_host(self) -> None:
        """Copy every array to the host and free it on the device, one after the other."""
        leaves = jax.tree.leaves(self.tree)
        values: list[np.ndarray] = []
        try:
            for leaf in leaves:
                values.append(_copy_aligned(leaf))
                leaf.delete()
        except NO_ROOM:
            self._put_back(values)
            raise
        self._kept = values

    def drop(self) -> None:
        """Free them on the device, or the copy on the host: the files must be read again."""
        delete_arrays(self.tree)
        self._kept = None

    def put_back(self) -> None:
        """From the host to the device; the copy is kept until all is there."""
        assert self._kept is not None, "there is no copy on the host"
        self.tree = self._put_all(self._kept)
        self._kept = None

    def put_new(self, tree: Any) -> None:
        """Take arrays of the same structure that are on the device already, in place of dropped ones."""
        self.tree = jax.tree.unflatten(jax.tree.structure(self.tree), jax.tree.leaves(tree))

    def exchange(self, values: list[np.ndarray]) -> None:
        """Take other values, by leaf of the tree, of the same shapes and types.

        Two sets may not fit the device, so each array leaves before its successor comes. The old values
        wait on the host until all is done, and are put back if it fails. `values` is emptied on the way:
        what is left of it and the old values together are one set.
        """
        leaves, treedef = jax.tree.flatten(self.tree)
        values.reverse()
        old_values: list[np.ndarray] = []
        arrays: list[jax.Array] = []
        try:
            for leaf in leaves:
                old_values.append(_copy_aligned(leaf))
                leaf.delete()
                arrays.append(_put(values.pop(), leaf.sharding))
        except NO_ROOM:
            delete_arrays(arrays)
            self._put_back(old_values)
            raise
        self.tree = jax.tree.unflatten(treedef, arrays)

    def _put_all(self, values: list[np.ndarray]) -> Any:
        leaves, treedef = jax.tree.flatten(self.tree)
        arrays: list[jax.Array] = []
        try:
            for value, leaf in zip(values, leaves, strict=True):
                arrays.append(_put(value, leaf.sharding))
        except NO_ROOM:
            delete_arrays(arrays)
            raise
        return jax.tree.unflatten(treedef, arrays)

    def _put_back(self, values: list[np.ndarray]) -> None:
        """Undo what was done so far: the first leaves are away, and `values` are theirs."""
        leaves, treedef = jax.tree.flatten(self.tree)
        try:
            for index, value in enumerate(values):
                if leaves[index].is_deleted():
                    leaves[index] = _put(value, leaves[index].sharding)
        except NO_ROOM as error:
            raise LostWeightsError(f"The weights could not be put back on the device: {error}") from error
        self.tree = jax.tree.unflatten(treedef, leaves)


def _put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.block_until_ready(put_held(value, sharding))


def _copy_aligned(array: jax.Array) -> np.ndarray:
    """A copy of its own: NumPy's view of an array on the CPU would keep the device's memory."""
    held = read_held(array)
    raw = np.empty(held.nbytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    copy = raw[skip : skip + held.nbytes].view(held.dtype).reshape(held.shape)
    np.copyto(copy, held)
    return copy
