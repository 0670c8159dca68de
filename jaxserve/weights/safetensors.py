"""Checkpoints of safetensors files: headers, the shard index, and rows of tensors. Opened by loader.py.

Only headers are read at first (8 bytes of length, then JSON); rows are read when asked for, in the file's own
dtype. The `safetensors` library hands out whole tensors, and none in bfloat16, to NumPy; hence this reader.
Format: README of huggingface/safetensors. Knows nothing of models or of jax.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.weights.file_bytes import FileBytes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: where its bytes lie and how they read."""

    data: FileBytes
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsCheckpoint:
    """What the loader reads: tensors by name over one or several files."""

    tensors: dict[str, StoredTensor]
    files: tuple[FileBytes, ...]

    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def file_of(self, name: str) -> Path:
        return self.tensors[name].data.path

    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray:
        """Rows [first_row, first_row + num_rows) in the file's dtype. Reads those bytes only."""
        tensor = self.tensors[name]
        start = tensor.offset + first_row * tensor.row_bytes
        raw = tensor.data.read(start, num_rows * tensor.row_bytes)
        return raw.view(tensor.dtype).reshape(num_rows, *tensor.shape[1:])

    def close(self) -> None:
        for file in self.files:
            file.close()


def find_safetensors(folder: Path) -> tuple[Path, ...]:
    """The checkpoint's files in `folder`, in order; () if there are none.

    The index decides if there is one, then model.safetensors, then every *.safetensors file (but not
    Mistral's consolidated copy of the same weights). Raises WeightError for a missing shard or a bad index.
    """
    index_path = folder / INDEX_FILE
    if index_path.is_file():
        weight_map = _read_json(index_path.read_bytes(), index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightError(f"{index_path} is damaged: it has no weight_map from tensor to file name.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WeightError(
                f"{folder} lacks {len(missing)} of the {len(names)} shards that {INDEX_FILE} names: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Download the model again."
            )
        return tuple(folder / name for name in names)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    return tuple(sorted(path for path in folder.glob("*.safetensors") if "consolidated" not in path.name))


def open_safetensors(folder: Path) -> SafetensorsCheckpoint:
    """Open the checkpoint in `folder`. Raises WeightError naming the file that is missing or damaged."""
    paths = find_safetensors(folder)
    if not paths:
        raise WeightError(f"{folder} holds no *.safetensors file.")
    tensors: dict[str, StoredTensor] = {}
    files: list[FileBytes] = []
    try:
        for path in paths:
            data = FileBytes(path)
            files.append(data)
            for name, tensor in _read_header(data).items():
                if name in tensors:
                    raise WeightError(f"Tensor {name} is in {tensors[name].data.path.name} and in {path}.")
                tensors[name] = tensor
    except WeightError:
        for data in files:
            data.close()
        raise
    return SafetensorsCheckpoint(tensors, tuple(files))


def _read_header(data: FileBytes) -> dict[str, StoredTensor]:
    if data.num_bytes < 8:
        raise WeightError(f"{data.path} is truncated: it has only {data.num_bytes} bytes. Download it again.")
    header_bytes = int.from_bytes(data.read(0, 8).tobytes(), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, data.num_bytes - 8):
        raise WeightError(
            f"{data.path} is damaged or truncated: its header claims {header_bytes} bytes and the file has "
            f"{data.num_bytes}. Download it again."
        )
    header = _read_json(data.read(8, header_bytes).tobytes(), data.path)
    return {
        name: _locate_tensor(data, name, entry, 8 + header_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _locate_tensor(data: FileBytes, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype_name, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        is_sound = all(isinstance(count, int) and count >= 0 for count in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise WeightError(f"{data.path} is damaged: the header's entry of {name} is unreadable.") from None
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise WeightError(
            f"Tensor {name} of {data.path} has the type {dtype_name}; these are read: {', '.join(_DTYPES)}."
        )
    if not is_sound or end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightError(
            f"{data.path} is damaged: {name} has the shape {list(shape)} of {dtype_name} in {end - begin} "
            "bytes."
        )
    if data_start + end > data.num_bytes:
        raise WeightError(
            f"{data.path} is truncated: {name} ends at byte {data_start + end} and the file has "
            f"{data.num_bytes}. Download it again."
        )
    return StoredTensor(data, dtype, shape, data_start + begin)


def _read_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise WeightError(f"{path} is damaged: it is not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise WeightError(f"{path} is damaged: it is not a JSON object.")
    return value
