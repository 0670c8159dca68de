"""What a parameter is served as: the shape and type of each of its arrays, known before anything is read.

Programs are compiled for these descriptions and the pool is sized by their bytes while the files are read.
Knows nothing of files or families.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxserve.models.interface import ParamSpec
from jaxserve.models.quant import QuantizedMatrix
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
QUANTIZATIONS = ("none", *QUANTIZED)


def describe_params(
    specs: list[ParamSpec], *, dtype: str, quantization: str = "none", placement: Placement = ALONE
) -> dict[str, Any]:
    """What `load_params` will give on these devices, as shapes and types: enough to compile for."""
    params: dict[str, Any] = {}
    for spec in specs:
        arrays = [
            jax.ShapeDtypeStruct(shape, item_type, sharding=placement.make_sharding(spec.axes[: len(shape)]))
            for shape, item_type in list_arrays(spec, dtype, quantization)
        ]
        has_scales = is_quantized(spec, quantization)
        params[spec.path] = QuantizedMatrix(*arrays) if has_scales else arrays[0]  # type: ignore[arg-type]
    return params


def count_served_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Bytes of the arrays that `load_params` will give."""
    arrays = [array for spec in specs for array in list_arrays(spec, dtype, quantization)]
    return sum(math.prod(shape) * item_type.itemsize for shape, item_type in arrays)


def count_device_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Those of them that each device holds."""
    num_bytes = 0
    for spec in specs:
        for shape, item_type in list_arrays(spec, dtype, quantization):
            cuts = [cut for cut in spec.cuts[: len(shape)] if cut is not None]
            num_parts = math.prod(len(cut.runs_by_device) for cut in cuts)
            num_bytes += math.prod(shape) * item_type.itemsize // num_parts
    return num_bytes


def is_quantized(spec: ParamSpec, quantization: str) -> bool:
    return spec.kind in ("matrix", "embedding") and quantization != "none"


def find_float_type(spec: ParamSpec, dtype: str) -> np.dtype:
    return DTYPES["float32" if spec.kind == "vector" else dtype]


def list_arrays(spec: ParamSpec, dtype: str, quantization: str) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array that a parameter is served as: the values, and the scales if quantised."""
    if is_quantized(spec, quantization):
        return [(spec.served_shape, QUANTIZED[quantization][0]), (spec.served_shape[:1], DTYPES["float32"])]
    return [(spec.served_shape, find_float_type(spec, dtype))]
