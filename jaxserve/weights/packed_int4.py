"""AWQ and GPTQ checkpoints, seen as checkpoints of ordinary matrices. Opened by loader.py.

Both keep a matrix as three tensors: `qweight`, eight 4-bit values an int32; `scales`, a float16 for each
output and group of inputs; `qzeros`, packed like the values. A weight is scale * (value - zero). They lie
transposed, inputs first, and differ in what is packed and in which order:

    gptq   qweight [inputs / 8, outputs]   eight inputs a word, in order; zeros are stored less one
    awq    qweight [inputs, outputs / 8]   eight outputs a word, in the order of AWQ_ORDER
    both   qzeros [groups, outputs / 8], scales [groups, outputs]

`g_idx` of GPTQ names each input's group where they are not in order ("desc_act"). Reference: AutoGPTQ's
qlinear_cuda, AutoAWQ's gemm packing. Knows nothing of models or of jax.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.weights.int4_rows import GroupedRows, dequantize

METHODS = ("awq", "gptq")  # what config.json calls them
VALUES_PER_WORD = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, lowest bits first
IN_ORDER = tuple(range(VALUES_PER_WORD))
PACKED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
_MOST_MATRICES_KEPT = 4  # that blocks of several threads are being read from


class Tensors(Protocol):
    """The checkpoint's own tensors."""

    def tensor_names(self) -> list[str]: ...
    def shape_of(self, name: str) -> tuple[int, ...]: ...
    def file_of(self, name: str) -> Path: ...
    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a checkpoint says that it packs its matrices."""

    method: str  # "awq" or "gptq"
    group_size: int  # inputs that share a scale; -1: all of them
    zeros_less_one: bool
    reorders_groups: bool  # each input's group is named by g_idx


def read_packing(hf_config: Mapping[str, Any]) -> Packing | None:
    """From config.json; None where it says nothing. Raises WeightError for what is not served."""
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return None
    method, bits = quantization.get("quant_method"), quantization.get("bits", quantization.get("w_bit"))
    if method not in METHODS or bits != 4:
        raise WeightError(
            f"The checkpoint is quantised as {method!r} of {bits} bits; served are 'awq' and 'gptq' of 4 "
            "bits, GGUF files, and checkpoints that are not quantised."
        )
    if method == "awq" and (
        quantization.get("version", "gemm").lower() != "gemm" or not quantization.get("zero_point", True)
    ):
        raise WeightError("Of AWQ checkpoints, those of version 'gemm' with zero points are served.")
    return Packing(
        method=method,
        group_size=quantization.get("group_size", quantization.get("q_group_size", 128)),
        zeros_less_one=method == "gptq" and quantization.get("checkpoint_format", "gptq") == "gptq",
        reorders_groups=bool(quantization.get("desc_act")),
    )


class RawMatrix(NamedTuple):
    """The tensors of one matrix as they lie in the file."""

    words: np.ndarray
    zero_words: np.ndarray
    scales_GF: np.ndarray
    group_D: np.ndarray | None


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A checkpoint whose packed matrices read as `.weight`, in float32; other tensors are as they were.

    Raises WeightError for a matrix whose tensors are missing or do not fit each other.
    """

    inner: Tensors
    packing: Packing
    _kept: dict[str, RawMatrix] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tensor_names(self) -> list[str]:
        names = [name for name in self.inner.tensor_names() if not name.endswith(PACKED_SUFFIXES)]
        return names + [f"{base}.weight" for base in self._list_packed()]

    def is_packed(self, name: str) -> bool:
        return f"{name.removesuffix('.weight')}.qweight" in self.inner.tensor_names()

    def shape_of(self, name: str) -> tuple[int, ...]:
        if not self.is_packed(name):
            return self.inner.shape_of(name)
        rows, columns = self.inner.shape_of(f"{name.removesuffix('.weight')}.qweight")
        if self.packing.method == "gptq":
            return columns, rows * VALUES_PER_WORD
        return columns * VALUES_PER_WORD, rows

    def file_of(self, name: str) -> Path:
        if not self.is_packed(name):
            return self.inner.file_of(name)
        return self.inner.file_of(f"{name.removesuffix('.weight')}.qweight")

    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray:
        """Float32 for a packed matrix."""
        if not self.is_packed(name):
            return self.inner.read_rows(name, first_row, num_rows)
        return dequantize(self.read_packed_rows(name, first_row, num_rows))

    def read_packed_rows(self, name: str, first_row: int, num_rows: int) -> GroupedRows:
        raw = self._read_matrix(name)
        rows = slice(first_row, first_row + num_rows)
        order = AWQ_ORDER if self.packing.method == "awq" else IN_ORDER
        if self.packing.method == "gptq":
            q_DF = unpack_words(raw.words[:, rows], axis=0, order=IN_ORDER)
        else:
            q_DF = _unpack_columns(raw.words, rows, order)
        zero_GF = _unpack_columns(raw.zero_words, rows, order)
        if self.packing.zeros_less_one:
            zero_GF = (zero_GF + 1) & 15
        scale_FG = raw.scales_GF[:, rows].T.astype(np.float32)
        return GroupedRows(np.ascontiguousarray(q_DF.T), scale_FG, zero_GF.T, raw.group_D)

    def close(self) -> None:
        self.inner.close()

    def _list_packed(self) -> list[str]:
        names = self.inner.tensor_names()
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def _read_matrix(self, name: str) -> RawMatrix:
        """All of a matrix, kept while its blocks are read: every block needs a bit of every word."""
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= _MOST_MATRICES_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = self._read_whole(name)
            return self._kept[name]

    def _read_whole(self, name: str) -> RawMatrix:
        base = name.removesuffix(".weight")
        num_outputs, num_inputs = self.shape_of(name)
        group_size = num_inputs if self.packing.group_size < 0 else self.packing.group_size
        num_groups = -(-num_inputs // group_size)
        present = set(self.inner.tensor_names())
        shapes = {
            f"{base}.qzeros": (num_groups, num_outputs // VALUES_PER_WORD),
            f"{base}.scales": (num_groups, num_outputs),
        }
        for tensor, shape in shapes.items():
            if tensor not in present:
                raise WeightError(f"The checkpoint lacks {tensor}: {base} cannot be unpacked.")
            if self.inner.shape_of(tensor) != shape:
                raise WeightError(
                    f"Tensor {tensor} of {self.inner.file_of(tensor)} has the shape "
                    f"{list(self.inner.shape_of(tensor))}; {base}.qweight and groups of {group_size} ask for "
                    f"{list(shape)}."
                )
        words, zero_words, scales_GF = (
            self.inner.read_rows(tensor, 0, self.inner.shape_of(tensor)[0])
            for tensor in (f"{base}.qweight", *shapes)
        )
        is_ragged = num_inputs % group_size != 0
        group_D = np.arange(num_inputs) // group_size if is_ragged else None
        if self.packing.reorders_groups and f"{base}.g_idx" in present:
            group_D = self.inner.read_rows(f"{base}.g_idx", 0, num_inputs)
            if group_D.min() < 0 or group_D.max() >= num_groups:
                raise WeightError(f"Tensor {base}.g_idx names a group that {base}.scales does not have.")
        return RawMatrix(words.view(np.uint32), zero_words.view(np.uint32), scales_GF, group_D)


def unpack(checkpoint: Tensors, hf_config: Mapping[str, Any]) -> Tensors:
    """The checkpoint, seen through its packing if it has one. Raises WeightError as `read_packing`."""
    packing = read_packing(hf_config)
    return checkpoint if packing is None else PackedCheckpoint(checkpoint, packing)


def unpack_words(words: np.ndarray, *, axis: int, order: tuple[int, ...]) -> np.ndarray:
    """uint32 words to eight uint8 values each, along `axis`; `order` is where each value of a word goes."""
    place = np.argsort(order)  # the four bits that hold value 0, 1, ...
    shifts = (4 * place).astype(np.uint32)
    words = np.expand_dims(words, axis + 1)
    values = (words >> (shifts[:, None] if axis == 0 else shifts)) & np.uint32(15)
    shape = list(words.shape)
    del shape[axis + 1]
    shape[axis] *= VALUES_PER_WORD
    return values.astype(np.uint8).reshape(shape)


def _unpack_columns(words: np.ndarray, columns: slice, order: tuple[int, ...]) -> np.ndarray:
    """Columns of a matrix whose words hold eight columns each."""
    first_word, end_word = columns.start // VALUES_PER_WORD, -(-columns.stop // VALUES_PER_WORD)
    values = unpack_words(words[:, first_word:end_word], axis=1, order=order)
    skip = columns.start - first_word * VALUES_PER_WORD
    return values[:, skip : skip + columns.stop - columns.start]
