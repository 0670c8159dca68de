"""Served parameters as an Orbax checkpoint, written while they are made. Called by convert.py.

The loader makes one parameter after another; each goes to the disk at once and is freed, so that a model is
converted in the memory of its largest parameter. Orbax keeps a tree of arrays as one key-value store (OCDBT),
each array in chunks of CHUNK_BYTES that are read on their own; not compressed, for weights hardly get smaller
and every start would wait for it. Any program reads the tree with orbax.checkpoint. Knows nothing of devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxserve.models.interface import ParamSpec
from jaxserve.weights.building import PutArray
from jaxserve.weights.orbax_restore import StoredArray, list_stored, name_part

CHUNK_BYTES = 1 << 20
# Orbax cuts an axis by divisors of its length, and that of a vocabulary may have none. So large arrays of it
# get rows of zeros up to a multiple of this.
ROW_MULTIPLE = 128

Load = Callable[[PutArray], Any]  # makes every parameter and gives it to `put`


@dataclass(frozen=True, slots=True)
class AwaitedArray:
    """A leaf of the tree before its array is made."""

    name: str


class ArrayStream:
    """Orbax's handler of such leaves: writes each array as `load` gives it, as NumPy arrays are written."""

    def __init__(self, load: Load, padded_rows: dict[str, int]):
        self._load = load
        self._padded_rows = padded_rows
        # What is written waits in `serialize`, so that nobody changes it.
        self._numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)

    def typestr(self) -> str:
        return self._numpy.typestr()

    async def serialize(
        self, values: Sequence[AwaitedArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        """Write all of them; nothing is left to wait for.

        The caller's thread loads, so that Ctrl-C ends it. Its event loop waits, so each write has its own.
        """
        info_by_name = {value.name: info for value, info in zip(values, infos, strict=True)}
        with ThreadPoolExecutor(1, thread_name_prefix="save-weights") as writer:

            def put(path: str, array: np.ndarray, _axes: Sequence[str | None]) -> Any:
                name = path if path in info_by_name else name_part(path, array.ndim)
                writing = self._write(self._pad(name, array), info_by_name[name])
                writer.submit(asyncio.run, writing).result()

            self._load(put)
        return []

    async def _write(self, array: np.ndarray, info: Any) -> None:
        args = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        for future in await self._numpy.serialize([array], [info], [args]):
            future.result()

    def _pad(self, name: str, array: np.ndarray) -> np.ndarray:
        num_missing = self._padded_rows.get(name, len(array)) - len(array)
        return np.pad(array, ((0, num_missing),) + ((0, 0),) * (array.ndim - 1)) if num_missing else array


def save_params(
    folder: Path, specs: Sequence[ParamSpec], load: Load, *, dtype: str, quantization: str
) -> dict[str, int]:
    """Write every parameter that `load` makes of `specs` as a new Orbax checkpoint in `folder`.

    Returns the rows of those arrays that have some of zeros behind their own, these included. Raises OSError
    for a disk that is full or fails, and what `load` raises.
    """
    arrays_by_spec = [(spec, list_stored(spec, dtype, quantization)) for spec in specs]
    arrays = [array for _, stored in arrays_by_spec for array in stored]
    padded_rows = {
        array.name: -(-array.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE
        for spec, stored in arrays_by_spec
        for array in stored
        if needs_padding(spec, array)
    }
    stream: Any = ArrayStream(load, padded_rows)  # all that Orbax asks of a handler when it saves
    registry = ocp.type_handlers.create_type_handler_registry((AwaitedArray, stream))
    try:
        with silence(logging.getLogger("absl")):
            handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
            with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
                checkpointer.save(folder, args=ocp.args.PyTreeSave(make_tree(arrays)))
    except (ValueError, RuntimeError) as error:
        raise read_failure(error) from error
    return padded_rows


@contextlib.contextmanager
def silence(logger: logging.Logger) -> Iterator[None]:
    """Orbax warns of what it is not given here, and logs errors that it raises as well."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_failure(error: Exception) -> OSError:
    """The error of the disk in what TensorStore says of it, in many words."""
    code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
    return OSError(code, str(error).partition("[tensorstore_spec=")[0].strip() or os.strerror(code))


def make_tree(arrays: Sequence[StoredArray]) -> dict[str, Any]:
    """Dictionaries by the words of the arrays' names, which Orbax joins to the same names again."""
    tree: dict[str, Any] = {}
    for array in arrays:
        *owners, last = array.name.split(".")
        branch = tree
        for owner in owners:
            branch = branch.setdefault(owner, {})
        branch[last] = AwaitedArray(array.name)
    return tree


def needs_padding(spec: ParamSpec, array: StoredArray) -> bool:
    """Whether the rows are of a vocabulary, too many for one chunk, and not easily cut."""
    is_large = math.prod(array.shape) * array.dtype.itemsize > CHUNK_BYTES
    return spec.axes[0] == "vocab" and is_large and array.shape[0] % ROW_MULTIPLE != 0
