"""Parameters from a folder that `jaxserve convert` wrote, straight to the devices that serve them.

An array lies in the folder as one device would have it. Devices that share it each hold some of its rows or
columns, and perhaps zeros (models/sharding.py); of a `StoredValues` every device is given its own part, for
which the chunks that hold it are read and no others. So any number of devices serves what was converted once.
Read with TensorStore, as Orbax itself reads. Called by runner/checkpoint.py. Knows nothing of families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from jaxserve.errors import WeightError
from jaxserve.models.interface import Cut, ParamSpec
from jaxserve.models.quant import Matrix, QuantizedMatrix, hadamard
from jaxserve.weights.building import PutArray, allocate, build_quantized, num_threads, rotate
from jaxserve.weights.cache import ProgressCallback
from jaxserve.weights.layout import count_own_columns, find_held, list_pieces
from jaxserve.weights.placement import ALONE
from jaxserve.weights.resolve import ModelFiles
from jaxserve.weights.saved_form import PARAMS_FOLDER, SavedForm, name_form
from jaxserve.weights.served import count_served_bytes, list_arrays

QUANTIZED_PARTS = ("q", "scale")  # of a QuantizedMatrix, by name under the parameter's path


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of the folder: its name in Orbax's tree, and its shape and type as one device has it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class StoredValues:
    """An array as all devices together are served it, which is read where it is indexed with slices.

    `spec.cuts` say where its parts lie. As a NumPy array it is what the devices of this process hold. Raises
    WeightError, naming the array, for what cannot be read.
    """

    def __init__(self, stored: StoredArray, spec: ParamSpec, store: tensorstore.TensorStore):
        self.stored = stored
        self._spec = spec
        self.store = store
        self._cuts: tuple[Cut | None, ...] = (spec.cuts or (None, None))[: len(stored.shape)]
        self.shape: tuple[int, ...] = spec.served_shape[: len(stored.shape)]
        self.dtype = stored.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        ranges = [part.indices(length)[:2] for part, length in zip(index, self.shape, strict=True)]
        values = allocate(self._spec, tuple(end - start for start, end in ranges), self.dtype)
        target = tensorstore.array(values, copy=False)
        boxes = product(
            *(
                _list_overlaps(cut, length, *own)
                for cut, length, own in zip(self._cuts, self.stored.shape, ranges, strict=True)
            )
        )
        reads = [
            target[tuple(to for _, to in box)].write(self.store[tuple(source for source, _ in box)])
            for box in boxes
        ]
        _wait_for(reads, self.stored.name)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What this process holds, as NumPy asks for it."""
        return self[tuple(find_held(self._spec, axis) for axis in range(self.ndim))]


def restore_params(
    files: ModelFiles,
    specs: list[ParamSpec],
    *,
    dtype: str,
    quantization: str,
    on_progress: ProgressCallback,
    put: PutArray = ALONE.put,
) -> dict[str, Matrix]:
    """The parameters that `load_params` gives for the model that was converted, with the same `put`.

    Raises WeightError if they were saved in another type, or cannot be read.
    """
    form = files.saved
    assert form is not None, "files without a header are not of this kind"
    if (form.dtype, form.quantization) != (dtype, quantization):
        served_as = name_form(dtype, quantization)
        advice = (
            "Take the original."
            if quantization == "int4"
            else f"Convert the model again with --dtype {dtype} --quantization {quantization}."
        )
        raise WeightError(
            f"{files.local_dir} was converted to {form.served_as}, and {served_as} is served here. {advice}"
        )
    stores = _open_all(files.local_dir, specs, form)
    total_bytes = count_served_bytes(specs, dtype=dtype, quantization=quantization)
    done_bytes = 0
    params: dict[str, Matrix] = {}
    for spec in specs:
        values = [StoredValues(stored, spec, stores[stored.name]) for stored in _list(spec, form)]
        if form.quantization == "int8" and len(values) == len(QUANTIZED_PARTS) and not keeps_rotation(spec):
            params[spec.path] = _quantize_again(spec, values, put)
        else:
            arrays = [put(spec.path, value, spec.axes[: value.ndim]) for value in values]
            params[spec.path] = QuantizedMatrix(arrays[0], arrays[1]) if len(arrays) > 1 else arrays[0]
        done_bytes += count_served_bytes([spec], dtype=dtype, quantization=quantization)
        on_progress("Loading weights", done_bytes, total_bytes)
    return params


def list_stored(spec: ParamSpec, dtype: str, quantization: str) -> list[StoredArray]:
    """The arrays that a parameter is saved as."""
    arrays = list_arrays(spec, dtype, quantization)
    if len(arrays) == 1:
        return [StoredArray(spec.path, spec.shape, arrays[0].item_type)]
    ranks = [len(array.shape) for array in arrays]
    return [
        StoredArray(name_part(spec.path, rank), spec.shape[:rank], array.item_type)
        for rank, array in zip(ranks, arrays, strict=True)
    ]


def name_part(path: str, rank: int) -> str:
    """The name of a quantised matrix's values, which have two axes, or of its scales, which have one."""
    return f"{path}.{QUANTIZED_PARTS[2 - rank]}"


def keeps_rotation(spec: ParamSpec) -> bool:
    """Whether the runs of channels that int8 mixes are the same on these devices as on one.

    They are where whole runs move together, which they do unless a head's width is no multiple of 64.
    """
    cut = spec.cuts[1] if len(spec.cuts) > 1 else None
    if cut is None:
        return True
    width = hadamard(spec.shape[1]).shape[0]
    return width == hadamard(count_own_columns(spec)).shape[0] and not any(
        number % width for piece in list_pieces(cut) for number in piece
    )


def _list(spec: ParamSpec, form: SavedForm) -> list[StoredArray]:
    return list_stored(spec, form.dtype, form.quantization)


def _quantize_again(spec: ParamSpec, values: Sequence[StoredValues], put: PutArray) -> QuantizedMatrix:
    """For devices that mix other channels: the values as they were before they were mixed, quantised anew.
    Every device's rows are read, and rounded once more than a matrix that the loader quantises."""
    whole = ParamSpec(path=spec.path, kind=spec.kind, sources=spec.sources, axes=spec.axes)
    q, scale = (StoredValues(value.stored, whole, value.store) for value in values)
    h_HH = hadamard(spec.shape[1])

    def read_block(_spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
        rows = slice(first_row, first_row + num_rows)
        return rotate(q[rows, :].astype(np.float32) * scale[(rows,)][:, None], h_HH)

    with ThreadPoolExecutor(num_threads(), thread_name_prefix="load-weights") as pool:
        return build_quantized(spec, "int8", read_block, pool, put)


def _open_all(
    folder: Path, specs: Sequence[ParamSpec], form: SavedForm
) -> dict[str, tensorstore.TensorStore]:
    """Every array of the specs, by name. Raises WeightError for one that is missing, or of another form."""
    context = tensorstore.Context()
    stored = [array for spec in specs for array in _list(spec, form)]
    opening = [
        tensorstore.open(_describe_store(folder, array.name), open=True, read=True, context=context)
        for array in stored
    ]
    stores = _wait_for(opening, "an array")
    for array, store in zip(stored, stores, strict=True):
        rows = form.padded_rows.get(array.name, array.shape[0])
        expected = (rows, *array.shape[1:])
        if store.shape != expected or store.dtype.numpy_dtype != array.dtype:
            raise WeightError(
                f"{array.name} of {folder} is {store.dtype.name}{list(store.shape)}; the model's config asks "
                f"for {array.dtype.name}{list(expected)}. Convert the model again."
            )
    return {array.name: store for array, store in zip(stored, stores, strict=True)}


def _describe_store(folder: Path, name: str) -> dict[str, Any]:
    base = f"file://{(folder / PARAMS_FOLDER).absolute()}/"
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "fill_missing_data_reads": False,  # a chunk that is not there is an error, not zeros
    }


def _list_overlaps(cut: Cut | None, length: int, start: int, end: int) -> Iterator[tuple[slice, slice]]:
    """Of indices [start, end) of a served axis: where they are saved, and where they go behind `start`."""
    for source, target, count in [(0, 0, length)] if cut is None else list_pieces(cut):
        first, last = max(start, target), min(end, target + count)
        if first < last:
            yield (
                slice(source + first - target, source + last - target),
                slice(first - start, last - start),
            )


def _wait_for(futures: Sequence[Any], name: str) -> list[Any]:
    try:
        return [future.result() for future in futures]
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise WeightError(f"{name} cannot be read from the converted model: {reason}.") from error
