"""One served parameter after another, on the host in blocks of rows, and from there to where it is served.

Memory holds the served parameters, one in the making, and a few blocks, which threads make. Called by
loader.py, whose `read_block` gives rows of a checkpoint's parameter. Knows nothing of files or of devices:
`put` places an array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.interface import ParamSpec
from jaxserve.models.quant import Int4Matrix, QuantizedMatrix, hadamard
from jaxserve.weights.cache import ProgressCallback
from jaxserve.weights.int4_rows import GroupedRows, pack_runs
from jaxserve.weights.layout import (
    count_own_columns,
    holds_rows,
    keep_columns,
    pick_columns,
    pick_groups,
    place_rows,
)
from jaxserve.weights.served import (
    DTYPES,
    QUANTIZATIONS,
    QUANTIZED,
    count_served_bytes,
    find_form,
    list_arrays,
)

# Places a host array (HostArray of placement.py) on the device or devices: (path, array, logical axis names).
PutArray = Callable[[str, Any, Sequence[str | None]], jax.Array]

ReadBlock = Callable[[ParamSpec, int, int], np.ndarray]  # (parameter, first row, number of rows)
ReadGroups = Callable[[ParamSpec, int, int], GroupedRows]

# 0.5 MB of float32: a block and its temporaries stay in a core's cache, and NumPy's overhead is small.
_BLOCK_ELEMENTS = 1 << 17
_MAX_THREADS = 8
_ALIGNMENT = 64  # bytes; jax takes a host array as it is on the CPU, without a copy, if it starts on this
_MIN_ABSMAX = 1e-12  # as in models/quant.py: the scale of a row of zeros is tiny, not zero


def build_params(
    specs: list[ParamSpec],
    read_block: ReadBlock,
    read_groups: ReadGroups,
    dtype: str,
    quantization: str,
    on_progress: ProgressCallback,
    put: PutArray,
) -> dict[str, Any]:
    """Make one parameter after another, its blocks in parallel; at most one is on the host unplaced.

    `read_groups` is asked for what is served in 4 bits.
    """
    if quantization not in QUANTIZATIONS:
        raise WeightError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    if dtype not in DTYPES:
        raise WeightError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    total_bytes = count_served_bytes(specs, dtype=dtype, quantization=quantization)
    done_bytes = 0
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(num_threads(), thread_name_prefix="load-weights") as pool:
        for spec in specs:
            form = find_form(spec, quantization)
            if form == "int4":
                params[spec.path] = _build_grouped(spec, read_groups, pool, put)
            elif form == "none":
                (array,) = list_arrays(spec, dtype, quantization)
                params[spec.path] = _build_float(spec, array.item_type, read_block, pool, put)
            else:
                params[spec.path] = build_quantized(spec, form, read_block, pool, put)
            done_bytes += count_served_bytes([spec], dtype=dtype, quantization=quantization)
            on_progress("Loading weights", done_bytes, total_bytes)
    return params


def _build_float(
    spec: ParamSpec,
    dtype: np.dtype,
    read_block: ReadBlock,
    pool: ThreadPoolExecutor,
    put: PutArray,
) -> jax.Array:
    host = allocate(spec, spec.held_shape, dtype)

    def fill(block_range: tuple[int, int]) -> None:
        first_row, num_rows = block_range
        block = keep_columns(pick_columns(read_block(spec, first_row, num_rows), spec), spec)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = block.astype(dtype, copy=False)
        _require_finite(spec, block, rows)
        place_rows(host, spec, first_row, rows)

    _run_blocks(pool, fill, spec)
    return put(spec.path, host, spec.axes)


def build_quantized(
    spec: ParamSpec,
    quantization: str,
    read_block: ReadBlock,
    pool: ThreadPoolExecutor,
    put: PutArray,
) -> QuantizedMatrix:
    """Symmetric, with a scale a row: absmax / the largest value. int8 is of the rotated rows, rounded half to
    even (models/quant.py)."""
    item_type, largest = QUANTIZED[quantization]
    h_HH = hadamard(count_own_columns(spec))
    q_host = allocate(spec, spec.held_shape, item_type)
    scale_host = allocate(spec, spec.held_shape[:1], np.dtype(np.float32))

    def fill(block_range: tuple[int, int]) -> None:
        first_row, num_rows = block_range
        block = pick_columns(read_block(spec, first_row, num_rows), spec).astype(np.float32, copy=False)
        if quantization == "int8":
            block = rotate(block, h_HH)
        absmax = np.maximum(block.max(axis=1), -block.min(axis=1))
        _require_finite(spec, block, absmax)
        scale = np.maximum(absmax, np.float32(_MIN_ABSMAX)) / np.float32(largest)
        block = keep_columns(block, spec)
        block /= scale[:, None]
        place_rows(q_host, spec, first_row, np.rint(block, out=block) if quantization == "int8" else block)
        place_rows(scale_host, spec, first_row, scale)

    _run_blocks(pool, fill, spec)
    return QuantizedMatrix(put(spec.path, q_host, spec.axes), put(spec.path, scale_host, spec.axes[:1]))


def _build_grouped(
    spec: ParamSpec, read_groups: ReadGroups, pool: ThreadPoolExecutor, put: PutArray
) -> Int4Matrix:
    """Values as they are packed (kernels_pallas/int4_matmul/ref.py), groups of scales and zeros first."""
    arrays = list_arrays(spec, "bfloat16", "int4")
    q_host, scale_host, zero_host = (allocate(spec, array.shape, array.item_type) for array in arrays)

    def fill(block_range: tuple[int, int]) -> None:
        first_row, num_rows = block_range
        rows = read_groups(spec, first_row, num_rows)
        with np.errstate(over="ignore"):
            scale_FG = rows.scale_FG.astype(scale_host.dtype)
        _require_finite(spec, rows.scale_FG, scale_FG)
        place_rows(q_host, spec, first_row, pack_runs(pick_columns(rows.q_FD, spec)))
        place_rows(scale_host.T, spec, first_row, pick_groups(scale_FG, spec))
        place_rows(zero_host.T, spec, first_row, pick_groups(rows.zero_FG, spec))

    _run_blocks(pool, fill, spec)
    hosts = zip(arrays, (q_host, scale_host, zero_host), strict=True)
    return Int4Matrix(*(put(spec.path, host, array.pick(spec.axes)) for array, host in hosts))


def rotate(block_FD: np.ndarray, h_HH: np.ndarray) -> np.ndarray:
    """Every run of H channels times the Hadamard matrix, as `rotate` of models/quant.py."""
    width = h_HH.shape[0]
    runs_RH = block_FD.reshape(-1, width)
    # So small that BLAS leaves each product to the thread that asks: its own would get in each other's way.
    num_whole = len(runs_RH) // width * width
    out_RH = np.empty_like(runs_RH)
    out_RH[:num_whole] = np.matmul(runs_RH[:num_whole].reshape(-1, width, width), h_HH).reshape(-1, width)
    out_RH[num_whole:] = runs_RH[num_whole:] @ h_HH
    return out_RH.reshape(block_FD.shape)


def _run_blocks(pool: ThreadPoolExecutor, fill: Callable[[tuple[int, int]], None], spec: ParamSpec) -> None:
    """Call `fill` with every (first_row, num_rows) of the parameter that holds something of ours; the first
    error ends the rest."""
    num_rows = spec.shape[0]
    block_rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(spec.shape[1:])))
    ranges = [(start, min(block_rows, num_rows - start)) for start in range(0, num_rows, block_rows)]
    ranges = [block_range for block_range in ranges if holds_rows(spec, *block_range)]
    if len(ranges) == 1:
        fill(ranges[0])
        return
    futures = [pool.submit(fill, block_range) for block_range in ranges]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


def _require_finite(spec: ParamSpec, block: np.ndarray, derived: np.ndarray) -> None:
    """Raise if `derived` (the block converted, or its row maxima) shows that a value is not finite."""
    if np.isfinite(derived).all():
        return
    names = ", ".join(source.name for source in spec.sources)
    if np.isfinite(block).all():
        raise WeightError(
            f"{spec.path} (from {names}) has values that {derived.dtype} cannot hold. Serve it with dtype "
            "bfloat16 or float32."
        )
    raise WeightError(
        f"{spec.path} (from {names}) contains NaN or infinite values: the checkpoint is damaged."
    )


def num_threads() -> int:
    """The cores this process may use; macOS cannot tell, and has them all."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(num_cores, _MAX_THREADS)


def allocate(spec: ParamSpec, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a multiple of _ALIGNMENT bytes; of zeros, if the checkpoint may not fill it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = (np.zeros if spec.cuts else np.empty)(num_bytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + num_bytes].view(dtype).reshape(shape)
