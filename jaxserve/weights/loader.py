"""Checkpoint tensors to served parameters on the device, in row blocks. Called once, by the runner.

A family's ParamSpecs say which tensors make a parameter. Every one is read, dequantised, converted (or
quantised to int8) a block of rows at a time, so that memory holds the served parameters, one parameter in the
making, and a few blocks. Both directions are checked: a tensor that is missing, left over, of the wrong shape
or not finite is named. Knows nothing of families or of devices: `put` places an array.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.interface import ParamSpec, TensorSource
from jaxserve.models.quant import Matrix, QuantizedMatrix, hadamard
from jaxserve.weights.cache import ProgressCallback
from jaxserve.weights.gguf_names import open_gguf_checkpoint
from jaxserve.weights.layout import count_own_columns, pick_columns, place_rows
from jaxserve.weights.packed_int4 import unpack
from jaxserve.weights.placement import ALONE, Placement
from jaxserve.weights.resolve import ModelFiles
from jaxserve.weights.safetensors import open_safetensors

# Places a finished host array on the device or devices: (path, array, logical axis names).
PutArray = Callable[[str, np.ndarray, Sequence[str | None]], jax.Array]

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

# 0.5 MB of float32: a block and its temporaries stay in a core's cache, and NumPy's overhead is small.
_BLOCK_ELEMENTS = 1 << 17
_MAX_THREADS = 8
_ALIGNMENT = 64  # bytes; jax takes a host array as it is on the CPU, without a copy, if it starts on this
_MIN_ABSMAX = 1e-12  # as in models/quant.py: the scale of a row of zeros is tiny, not zero
# Buffers that some writers save beside the weights, and that are computed here.
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip


class CheckpointTensors(Protocol):
    """What a checkpoint offers: tensors under Hugging Face names, read by rows of axis 0."""

    def tensor_names(self) -> list[str]: ...
    def shape_of(self, name: str) -> tuple[int, ...]: ...
    def file_of(self, name: str) -> Path: ...
    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray: ...
    def close(self) -> None: ...


def load_params(
    files: ModelFiles,
    specs: list[ParamSpec],
    *,
    dtype: str,
    quantization: str = "none",
    on_progress: ProgressCallback,
    put: PutArray = ALONE.put,
    random_seed: int = 0,
) -> dict[str, Matrix]:
    """The served parameters of `specs`, by path, in the layout that devices share them in (layout.py).

    Vectors are float32; matrices and embeddings are `dtype` ("float32", "bfloat16", "float16"), or with
    quantization "int8" or "fp8" a quantised matrix whose parts `put` is given under the same path. Progress
    counts served bytes. For files of kind "dummy" the values are made up from `random_seed`. Raises
    WeightError naming the tensor and the file at fault.
    """
    if files.kind == "dummy":
        return make_dummy_params(
            specs,
            dtype=dtype,
            quantization=quantization,
            random_seed=random_seed,
            on_progress=on_progress,
            put=put,
        )
    if files.kind == "gguf":
        checkpoint: CheckpointTensors = open_gguf_checkpoint(files.files[0])
    else:
        checkpoint = unpack(open_safetensors(files.local_dir), files.hf_config)
    with contextlib.closing(checkpoint):
        specs = _find_names(specs, checkpoint.tensor_names())
        check_checkpoint(checkpoint, specs, is_tied=_is_tied(files.hf_config))

        def read_block(spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
            return _read_spec_rows(checkpoint, spec, first_row, num_rows)

        return _build_params(specs, read_block, dtype, quantization, on_progress, put)


def make_dummy_params(
    specs: list[ParamSpec],
    *,
    dtype: str,
    quantization: str = "none",
    random_seed: int = 0,
    on_progress: ProgressCallback = lambda message, done, total: None,
    put: PutArray = ALONE.put,
) -> dict[str, Matrix]:
    """Parameters of the right shapes and made-up values, for trying things out without weights.

    Normal with standard deviation 0.02; norms are 1. A parameter's values depend on the seed, its path and
    its shape, not on the order or the number of specs, nor on threads.
    """

    def make_block(spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
        shape = (num_rows, *spec.shape[1:])
        if spec.kind == "vector" and not all(source.name.endswith("bias") for source in spec.sources):
            return np.ones(shape, np.float32)
        generator = np.random.default_rng([random_seed, zlib.crc32(spec.path.encode()), first_row])
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    return _build_params(specs, make_block, dtype, quantization, on_progress, put)


def describe_params(
    specs: list[ParamSpec], *, dtype: str, quantization: str = "none", placement: Placement = ALONE
) -> dict[str, Any]:
    """What `load_params` will give on these devices, as shapes and types: enough to compile for."""
    params: dict[str, Any] = {}
    for spec in specs:
        arrays = [
            jax.ShapeDtypeStruct(shape, item_type, sharding=placement.make_sharding(spec.axes[: len(shape)]))
            for shape, item_type in _list_arrays(spec, dtype, quantization)
        ]
        is_quantized = _is_quantized(spec, quantization)
        params[spec.path] = QuantizedMatrix(*arrays) if is_quantized else arrays[0]  # type: ignore[arg-type]
    return params


def count_served_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Bytes of the arrays that `load_params` will give."""
    return sum(_served_bytes(spec, dtype, quantization) for spec in specs)


def count_device_bytes(specs: list[ParamSpec], *, dtype: str, quantization: str = "none") -> int:
    """Those of them that each device holds."""
    num_bytes = 0
    for spec in specs:
        for shape, item_type in _list_arrays(spec, dtype, quantization):
            cuts = [cut for cut in spec.cuts[: len(shape)] if cut is not None]
            num_parts = math.prod(len(cut.runs_by_device) for cut in cuts)
            num_bytes += math.prod(shape) * item_type.itemsize // num_parts
    return num_bytes


def check_checkpoint(checkpoint: CheckpointTensors, specs: list[ParamSpec], *, is_tied: bool) -> None:
    """Raise WeightError for tensors that are missing, of another shape, or used by no spec."""
    names = checkpoint.tensor_names()
    present = set(names)
    sources = [source for spec in specs for source in spec.sources]
    missing = [source.name for source in sources if source.name not in present]
    if missing:
        raise WeightError(
            f"The checkpoint lacks {_list_names(missing)}. It is incomplete, or of another architecture than "
            "its config says."
        )
    for source in sources:
        shape = checkpoint.shape_of(source.name)
        if shape != source.shape:
            raise WeightError(
                f"Tensor {source.name} of {checkpoint.file_of(source.name)} has the shape {list(shape)}; the "
                f"model's config asks for {list(source.shape)}."
            )
    used = {source.name for source in sources}
    left_over = [
        name
        for name in names
        if name not in used
        and not name.endswith(_IGNORED_SUFFIXES)
        and not (is_tied and name == "lm_head.weight")
    ]
    if left_over:
        raise WeightError(
            f"The checkpoint holds {_list_names(left_over)}, which the model does not use: the config names "
            "another architecture than the weights are of."
        )


def _find_names(specs: list[ParamSpec], names: list[str]) -> list[ParamSpec]:
    """The specs with each source under the one of its names that the checkpoint has."""
    present = set(names)

    def find(source: TensorSource) -> TensorSource:
        found = next((name for name in (source.name, *source.other_names) if name in present), source.name)
        return replace(source, name=found)

    return [replace(spec, sources=tuple(map(find, spec.sources))) for spec in specs]


def _is_tied(hf_config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding; models that see images may say so with their language side."""
    configs = (hf_config, hf_config.get("text_config") or {})
    return any(config.get("tie_word_embeddings") for config in configs)


def _build_params(
    specs: list[ParamSpec],
    read_block: Callable[[ParamSpec, int, int], np.ndarray],
    dtype: str,
    quantization: str,
    on_progress: ProgressCallback,
    put: PutArray,
) -> dict[str, Matrix]:
    """Make one parameter after another, its blocks in parallel; at most one is on the host unplaced."""
    if quantization not in QUANTIZATIONS:
        raise WeightError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    if dtype not in DTYPES:
        raise WeightError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    total_bytes = count_served_bytes(specs, dtype=dtype, quantization=quantization)
    done_bytes = 0
    params: dict[str, Matrix] = {}
    with ThreadPoolExecutor(_num_threads(), thread_name_prefix="load-weights") as pool:
        for spec in specs:
            if _is_quantized(spec, quantization):
                params[spec.path] = _build_quantized(spec, quantization, read_block, pool, put)
            else:
                params[spec.path] = _build_float(spec, _float_type(spec, dtype), read_block, pool, put)
            done_bytes += _served_bytes(spec, dtype, quantization)
            on_progress("Loading weights", done_bytes, total_bytes)
    return params


def _build_float(
    spec: ParamSpec,
    dtype: np.dtype,
    read_block: Callable[[ParamSpec, int, int], np.ndarray],
    pool: ThreadPoolExecutor,
    put: PutArray,
) -> jax.Array:
    host = _allocate(spec, spec.served_shape, dtype)

    def fill(block_range: tuple[int, int]) -> None:
        first_row, num_rows = block_range
        block = pick_columns(read_block(spec, first_row, num_rows), spec)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = block.astype(dtype, copy=False)
        _require_finite(spec, block, rows)
        place_rows(host, spec, first_row, rows)

    _run_blocks(pool, fill, spec)
    return put(spec.path, host, spec.axes)


def _build_quantized(
    spec: ParamSpec,
    quantization: str,
    read_block: Callable[[ParamSpec, int, int], np.ndarray],
    pool: ThreadPoolExecutor,
    put: PutArray,
) -> QuantizedMatrix:
    """Symmetric, with a scale a row: absmax / the largest value. int8 is of the rotated rows, rounded half to
    even (models/quant.py)."""
    item_type, largest = QUANTIZED[quantization]
    h_HH = hadamard(count_own_columns(spec))
    q_host = _allocate(spec, spec.served_shape, item_type)
    scale_host = _allocate(spec, spec.served_shape[:1], np.dtype(np.float32))

    def fill(block_range: tuple[int, int]) -> None:
        first_row, num_rows = block_range
        block = pick_columns(read_block(spec, first_row, num_rows), spec).astype(np.float32, copy=False)
        if quantization == "int8":
            block = _rotate(block, h_HH)
        absmax = np.maximum(block.max(axis=1), -block.min(axis=1))
        _require_finite(spec, block, absmax)
        scale = np.maximum(absmax, np.float32(_MIN_ABSMAX)) / np.float32(largest)
        block /= scale[:, None]
        place_rows(q_host, spec, first_row, np.rint(block, out=block) if quantization == "int8" else block)
        place_rows(scale_host, spec, first_row, scale)

    _run_blocks(pool, fill, spec)
    return QuantizedMatrix(put(spec.path, q_host, spec.axes), put(spec.path, scale_host, spec.axes[:1]))


def _rotate(block_FD: np.ndarray, h_HH: np.ndarray) -> np.ndarray:
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
    """Call `fill` with every (first_row, num_rows) of the parameter; the first error ends the rest."""
    num_rows = spec.shape[0]
    block_rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(spec.shape[1:])))
    ranges = [(start, min(block_rows, num_rows - start)) for start in range(0, num_rows, block_rows)]
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


def _read_spec_rows(
    checkpoint: CheckpointTensors, spec: ParamSpec, first_row: int, num_rows: int
) -> np.ndarray:
    """Rows of the sources' concatenation along axis 0.

        source 0         source 1      source 2
    |----------------|-------------|-------------|
    0        first_row      |  end_row
             [==============|=====]      each source gives the rows that fall in it
    """
    end_row = first_row + num_rows
    pieces = []
    source_start = 0
    for source in spec.sources:
        source_end = source_start + source.shape[0]
        start, end = max(first_row, source_start), min(end_row, source_end)
        if start < end:
            pieces.append(checkpoint.read_rows(source.name, start - source_start, end - start))
        source_start = source_end
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


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


def _is_quantized(spec: ParamSpec, quantization: str) -> bool:
    return spec.kind in ("matrix", "embedding") and quantization != "none"


def _float_type(spec: ParamSpec, dtype: str) -> np.dtype:
    return DTYPES["float32" if spec.kind == "vector" else dtype]


def _list_arrays(spec: ParamSpec, dtype: str, quantization: str) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array that a parameter is served as: the values, and the scales if quantised."""
    if _is_quantized(spec, quantization):
        return [(spec.served_shape, QUANTIZED[quantization][0]), (spec.served_shape[:1], DTYPES["float32"])]
    return [(spec.served_shape, _float_type(spec, dtype))]


def _served_bytes(spec: ParamSpec, dtype: str, quantization: str) -> int:
    arrays = _list_arrays(spec, dtype, quantization)
    return sum(math.prod(shape) * item_type.itemsize for shape, item_type in arrays)


def _num_threads() -> int:
    """The cores this process may use; macOS cannot tell, and has them all."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(num_cores, _MAX_THREADS)


def _allocate(spec: ParamSpec, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a multiple of _ALIGNMENT bytes; of zeros, if the checkpoint may not fill it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = (np.zeros if spec.cuts else np.empty)(num_bytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + num_bytes].view(dtype).reshape(shape)


def _list_names(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{rest}"
