"""Checkpoint tensors to served parameters on the device. Called once, by the runner.

A family's ParamSpecs say which tensors make a parameter. Every one is read a block of rows at a time
(building.py). Both directions are checked: a tensor that is missing, left over, or of the wrong shape is
named. Knows nothing of families or of devices: `put` places an array.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.interface import ParamSpec
from jaxserve.weights.building import PutArray, build_params
from jaxserve.weights.cache import ProgressCallback
from jaxserve.weights.check import CheckpointTensors, check_checkpoint, find_names, is_tied
from jaxserve.weights.gguf_names import open_gguf_checkpoint
from jaxserve.weights.int4_rows import GroupedRows, join_rows, quantize_rows
from jaxserve.weights.packed_int4 import PackedCheckpoint, unpack
from jaxserve.weights.placement import ALONE
from jaxserve.weights.resolve import ModelFiles
from jaxserve.weights.safetensors import open_safetensors


def load_params(
    files: ModelFiles,
    specs: list[ParamSpec],
    *,
    dtype: str,
    quantization: str = "none",
    on_progress: ProgressCallback,
    put: PutArray = ALONE.put,
    random_seed: int = 0,
) -> dict[str, Any]:
    """The served parameters of `specs`, by path, in the layout that devices share them in (layout.py).

    Vectors are float32; matrices and embeddings are `dtype` ("float32", "bfloat16", "float16"), or with
    quantization "int8" or "fp8" a quantised matrix whose parts `put` is given under the same path, or with
    "int4" such a one where the spec has a group size. Progress counts served bytes. For files of kind
    "dummy" the values are made up from `random_seed`. Raises WeightError naming the tensor and the file at
    fault.
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
        specs = find_names(specs, checkpoint.tensor_names())
        check_checkpoint(checkpoint, specs, is_tied=is_tied(files.hf_config))

        def read_block(spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
            return _read_spec_rows(checkpoint, spec, first_row, num_rows)

        def read_groups(spec: ParamSpec, first_row: int, num_rows: int) -> GroupedRows:
            return _read_spec_groups(checkpoint, spec, first_row, num_rows)

        return build_params(specs, read_block, read_groups, dtype, quantization, on_progress, put)


def make_dummy_params(
    specs: list[ParamSpec],
    *,
    dtype: str,
    quantization: str = "none",
    random_seed: int = 0,
    on_progress: ProgressCallback = lambda message, done, total: None,
    put: PutArray = ALONE.put,
) -> dict[str, Any]:
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

    def make_groups(spec: ParamSpec, first_row: int, num_rows: int) -> GroupedRows:
        return quantize_rows(make_block(spec, first_row, num_rows), spec.group_size)

    return build_params(specs, make_block, make_groups, dtype, quantization, on_progress, put)


def _read_spec_rows(
    checkpoint: CheckpointTensors, spec: ParamSpec, first_row: int, num_rows: int
) -> np.ndarray:
    """Rows of the sources' concatenation along axis 0."""
    pieces = [checkpoint.read_rows(*piece) for piece in _find_pieces(spec, first_row, num_rows)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _read_spec_groups(
    checkpoint: CheckpointTensors, spec: ParamSpec, first_row: int, num_rows: int
) -> GroupedRows:
    """The same in 4 bits: as the checkpoint packs them, or quantised here where it does not."""
    found = []
    for name, first, count in _find_pieces(spec, first_row, num_rows):
        if isinstance(checkpoint, PackedCheckpoint) and checkpoint.is_packed(name):
            rows = checkpoint.read_packed_rows(name, first, count)
            if not rows.has_groups_of(spec.group_size):
                raise WeightError(
                    f"Tensor {name} is not packed in groups of {spec.group_size} inputs, in order, as is "
                    "served here: launch a server of its own for this checkpoint."
                )
            found.append(rows)
        else:
            found.append(quantize_rows(checkpoint.read_rows(name, first, count), spec.group_size))
    return join_rows(found)


def _find_pieces(spec: ParamSpec, first_row: int, num_rows: int) -> list[tuple[str, int, int]]:
    """Name, first row and number of rows of each source that has some of the concatenation's.

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
            pieces.append((source.name, start - source_start, end - start))
        source_start = source_end
    return pieces
