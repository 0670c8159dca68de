"""What a parameter is served as: the shape and type of each of its arrays, known before anything is read.

Programs are compiled for these descriptions and the pool is sized by their bytes while the files are read.
Knows nothing of files or families.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxserve.models.interface import ParamSpec
from jaxserve.models.quant import Int4Matrix, QuantizedMatrix
from jaxserve.weights.layout import count_served_groups
from jaxserve.weights.placement import ALONE, Placement

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# The type of a matrix's values, and the largest of them.
QUANTIZED = {
    "int8": (np.dtype(np.int8), 127),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448),
}
QUANTIZATIONS = ("none", *QUANTIZED, "int4")


class ServedArray(NamedTuple):
    """One of the arrays of a parameter. `dims` are the axes of the parameter that its own belong to."""

    shape: tuple[int, ...]
    item_type: np.dtype
    dims: tuple[int, ...]

    def pick(self, by_axis: tuple) -> tuple:
        """Of what a parameter says of each of its axes, what concerns this array."""
        return tuple(by_axis[dim] for dim in self.dims) if by_axis else ()


def describe_params(
    specs: list[ParamSpec], *, dtype: str, quantization: str = "none", placement: Placement = ALONE
) -> dict[str, Any]:
    """What `load_params` will give on these devices, as shapes and types: enough to compile for."""
    params: dict[str, Any] = {}
    for spec in specs:
        arrays = [
            jax.ShapeDtypeStruct(
                array.shape, array.item_type, sharding=placement.make_sharding(array.pick(spec.axes))
            )
            for array in list_arrays(spec, dtype, quantization)
        ]
        params[spec.path] = _FORMS[len(arrays)](*arrays)
    return params


def count_served_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Bytes of the arrays that `load_params` will give."""
    arrays = [array for spec in specs for array in list_arrays(spec, dtype, quantization)]
    return sum(math.prod(array.shape) * array.item_type.itemsize for array in arrays)


def count_device_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Those of them that each device holds."""
    num_bytes = 0
    for spec in specs:
        for array in list_arrays(spec, dtype, quantization):
            cuts = [cut for cut in array.pick(spec.cuts) if cut is not None]
            num_parts = math.prod(len(cut.runs_by_device) for cut in cuts)
            num_bytes += math.prod(array.shape) * array.item_type.itemsize // num_parts
    return num_bytes


def find_form(spec: ParamSpec, quantization: str) -> str:
    """What a parameter is served as: "int4", another quantisation, or "none"."""
    if quantization == "int4":
        return "int4" if spec.group_size else "none"
    return quantization if spec.kind in ("matrix", "embedding") else "none"


def list_arrays(spec: ParamSpec, dtype: str, quantization: str) -> list[ServedArray]:
    """The arrays that a parameter is served as: the values, and if quantised the scales, and of 4-bit values
    the zeros."""
    shape, form = spec.served_shape, find_form(spec, quantization)
    if form == "int4":
        groups = (count_served_groups(spec), shape[0])
        return [
            ServedArray((shape[0], shape[1] // 2), np.dtype(np.int8), (0, 1)),
            ServedArray(groups, DTYPES["float16"], (1, 0)),
            ServedArray(groups, np.dtype(np.int8), (1, 0)),
        ]
    if form != "none":
        values = ServedArray(shape, QUANTIZED[form][0], (0, 1))
        return [values, ServedArray(shape[:1], DTYPES["float32"], (0,))]
    item_type = DTYPES["float32" if spec.kind == "vector" else dtype]
    return [ServedArray(shape, item_type, tuple(range(len(shape))))]


# What a parameter of so many arrays is.
_FORMS: dict[int, Any] = {1: lambda array: array, 2: QuantizedMatrix, 3: Int4Matrix}
