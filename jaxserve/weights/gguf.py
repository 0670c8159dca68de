"""GGUF files: header, metadata, tensor table, and rows of tensors as float32.

Called by resolve.py (the model's config), gguf_names.py (the tensors under Hugging Face names) and the text
room (tokenizer and chat template). The header is parsed here rather than with the `gguf` library's reader,
which takes ten seconds over the 150,000 tokens of a Qwen vocabulary; this takes a fifth of one. The format
is docs/gguf.md in the ggml repository. Knows nothing of models.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.weights.file_bytes import FileBytes
from jaxserve.weights.gguf_dequant import FORMATS, UNREAD_TYPE_NAMES, BlockFormat, dequantize_blocks

_SUPPORTED_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4

# Metadata value types (enum gguf_metadata_value_type).
_SCALAR_DTYPES = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING_TYPE = 8
_ARRAY_TYPE = 9

_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file. `shape` is outermost first, the reverse of GGUF's own order."""

    name: str
    shape: tuple[int, ...]
    block_format: BlockFormat
    offset: int  # from the start of the file
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF file. Call `close` when done; reads may come from several threads."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: FileBytes

    def dequantize_rows(self, tensor: GgufTensor, first_row: int, num_rows: int) -> np.ndarray:
        """Rows [first_row, first_row + num_rows) as float32 [num_rows, *shape[1:]]. Reads those rows only."""
        block_format = tensor.block_format
        if len(tensor.shape) == 1:  # its one row may be a single block: decode it whole
            raw = self.data.read(tensor.offset, tensor.num_bytes)
            values = dequantize_blocks(raw.reshape(-1, block_format.block_bytes), block_format)
            return values.reshape(-1)[first_row : first_row + num_rows]
        start = tensor.offset + first_row * tensor.row_bytes
        raw = self.data.read(start, num_rows * tensor.row_bytes)
        values = dequantize_blocks(raw.reshape(-1, block_format.block_bytes), block_format)
        return values.reshape(num_rows, *tensor.shape[1:])

    def close(self) -> None:
        self.data.close()


def read_gguf_metadata(path: str | Path) -> dict[str, object]:
    """The file's key-value pairs: numbers, booleans, strings, and lists of those. Touches no tensor.

    Strings are decoded as UTF-8; bytes that are not become U+FFFD. Raises WeightError for a damaged header.
    """
    path = Path(path)
    with _Header(path) as header:
        return header.read_metadata()


def copy_gguf_metadata(source: Path, target: Path) -> None:
    """Write a GGUF file with the source's key-value pairs (the tokenizer among them) and no tensors."""
    with _Header(source) as header:
        header.read_metadata()
        target.write_bytes(header.without_tensors())


def open_gguf(path: str | Path) -> GgufFile:
    """Read the header and the tensor table. Raises WeightError that names the file and what is wrong.

    Every tensor's bytes are checked to lie inside the file, so a truncated download is noticed here.
    """
    path = Path(path)
    with _Header(path) as header:
        metadata = header.read_metadata()
        tensors = header.read_tensor_table(metadata)
    num_parts = metadata.get("split.count", 0)
    if isinstance(num_parts, int) and num_parts > 1:
        raise WeightError(
            f"{path} is one of {num_parts} parts of a split GGUF. Join them first with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT`."
        )
    return GgufFile(path, metadata, tensors, FileBytes(path))


class _Header:
    """A cursor over the head of the file. Every count is checked against the bytes left before it is used."""

    def __init__(self, path: Path):
        self._path = path
        try:
            with open(path, "rb") as file:
                self._num_bytes = file.seek(0, 2)
                if self._num_bytes < 24:
                    raise WeightError(f"{path} is not a GGUF file: it has only {self._num_bytes} bytes.")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise WeightError(f"Cannot open {path}: {error.strerror}.") from error
        self._position = 0

    def __enter__(self) -> _Header:
        self._check_magic()
        self._num_tensors = self._uint64()
        self._num_pairs = self._uint64()
        # The least a tensor entry takes is 32 bytes (name length, rank, one dimension, type, offset) and a
        # pair 13: larger counts are damage, and are refused before anything is built from them.
        if self._num_tensors * 32 > self._num_bytes:
            raise self._damaged(f"its header claims {self._num_tensors} tensors")
        if self._num_pairs * 13 > self._num_bytes:
            raise self._damaged(f"its header claims {self._num_pairs} metadata entries")
        return self

    def __exit__(self, *_exception: object) -> None:
        self._map.close()

    def _check_magic(self) -> None:
        magic = self._take(4)
        if magic != b"GGUF":
            raise WeightError(f"{self._path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'.")
        version = self._uint32()
        if version in _SUPPORTED_VERSIONS:
            return
        if version & 0xFFFF == 0:
            raise WeightError(f"{self._path} is a big-endian GGUF file; only little-endian ones are read.")
        raise WeightError(
            f"{self._path} is GGUF version {version}; versions 2 and 3 are read. Convert the model again."
        )

    def read_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(self._num_pairs):
            key = self._string()
            metadata[key] = self._value(self._uint32(), depth=0)
        return metadata

    def without_tensors(self) -> bytes:
        """The bytes up to here, behind the metadata, for a file that has no more than these."""
        start, num_tensors_at, num_pairs_at = 0, 8, 16
        return self._map[start:num_tensors_at] + _UINT64.pack(0) + self._map[num_pairs_at : self._position]

    def read_tensor_table(self, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        entries = [self._tensor_entry() for _ in range(self._num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"general.alignment is {alignment!r}")
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise self._damaged(f"tensor {name} is listed twice")
            tensors[name] = self._place_tensor(name, shape, type_id, data_start + offset)
        return tensors

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._uint32()
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._uint64() for _ in range(num_dimensions))[::-1]
        return name, shape, self._uint32(), self._uint64()

    def _place_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        block_format = FORMATS.get(type_id)
        if block_format is None:
            type_name = UNREAD_TYPE_NAMES.get(type_id, f"number {type_id}")
            readable = ", ".join(known.name for known in FORMATS.values())
            raise WeightError(
                f"Tensor {name} of {self._path} has the type {type_name}, which is not read. Use a file of "
                f"these types: {readable} (Q4_K_M and Q8_0 files are)."
            )
        if 0 in shape or shape[-1] % block_format.block_elements:
            raise self._damaged(f"tensor {name} has the shape {list(shape)} with type {block_format.name}")
        num_bytes = math.prod(shape) // block_format.block_elements * block_format.block_bytes
        if offset + num_bytes > self._num_bytes:
            raise WeightError(
                f"{self._path} is truncated: tensor {name} ends at byte {offset + num_bytes} and the file "
                f"has {self._num_bytes}. Download it again."
            )
        return GgufTensor(name, shape, block_format, offset, num_bytes)

    def _value(self, type_id: int, depth: int) -> Any:
        if type_id == _STRING_TYPE:
            return self._string(strict=False)
        if type_id == _ARRAY_TYPE:
            return self._array(depth)
        return self._numbers(type_id, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        if depth >= _MAX_ARRAY_DEPTH:
            raise self._damaged("its metadata nests arrays too deeply")
        item_type, count = self._uint32(), self._uint64()
        if item_type == _STRING_TYPE:
            return self._strings(count)
        if item_type == _ARRAY_TYPE:
            self._require_bytes(count * 12, f"an array of {count} arrays")
            return [self._array(depth + 1) for _ in range(count)]
        return self._numbers(item_type, count)

    def _numbers(self, type_id: int, count: int) -> list[Any]:
        dtype_name = _SCALAR_DTYPES.get(type_id)
        if dtype_name is None:
            raise self._damaged(f"its metadata holds a value of unknown type {type_id}")
        dtype = np.dtype(dtype_name)
        self._require_bytes(count * dtype.itemsize, f"an array of {count} numbers")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _strings(self, count: int) -> list[str]:
        # The one hot loop of the header: a vocabulary and its merges are some 300,000 strings.
        self._require_bytes(count * 8, f"an array of {count} strings")
        data, position, end = self._map, self._position, self._num_bytes
        unpack = _UINT64.unpack_from
        strings = []
        for _ in range(count):
            if position + 8 > end:
                raise self._damaged("an array of strings runs past the end of the file")
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > end:
                raise self._damaged("a string runs past the end of the file")
            strings.append(data[start:position].decode("utf-8", "replace"))
        self._position = position
        return strings

    def _string(self, strict: bool = True) -> str:
        num_bytes = self._uint64()
        self._require_bytes(num_bytes, f"a string of {num_bytes} bytes")
        raw = self._take(num_bytes)
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a name is not UTF-8: {raw[:40]!r}") from error

    def _uint32(self) -> int:
        return _UINT32.unpack(self._take(4))[0]

    def _uint64(self) -> int:
        return _UINT64.unpack(self._take(8))[0]

    def _take(self, num_bytes: int) -> bytes:
        self._require_bytes(num_bytes, "the next value")
        start = self._position
        self._position = start + num_bytes
        return self._map[start : self._position]

    def _require_bytes(self, num_bytes: int, what: str) -> None:
        if num_bytes > self._num_bytes - self._position:
            raise self._damaged(f"{what} runs past the end of the file")

    def _damaged(self, what: str) -> WeightError:
        return WeightError(
            f"{self._path} is damaged: {what} (byte {self._position} of {self._num_bytes}). Download it "
            "again."
        )
