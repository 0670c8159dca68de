"""safetensors: row ranges in every dtype, shards and their index, and what damaged files do."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.errors import WeightError
from jaxserve.weights.safetensors import INDEX_FILE, open_safetensors
from tests import tiny


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, ml_dtypes.float8_e4m3fn]
)
def test_row_ranges_are_read_in_the_dtype_of_the_file(tmp_path: Path, dtype: type) -> None:
    matrix = np.arange(77).reshape(11, 7).astype(dtype)
    save_file({"odd": np.arange(3, dtype=np.int8), "w": matrix}, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    rows = checkpoint.read_rows("w", 4, 5)
    assert rows.dtype == matrix.dtype
    np.testing.assert_array_equal(rows, matrix[4:9])
    checkpoint.close()


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "qwen2", shards=3)
    checkpoint = open_safetensors(tmp_path)
    tensors = tiny.tiny_tensors("qwen2")
    assert sorted(checkpoint.tensor_names()) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read_rows(name, 0, len(tensor)), tensor)
    checkpoint.close()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "qwen2", shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks 1 of the 3 shards.*model-00002-of-00003\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX_FILE).write_bytes(index)
    with pytest.raises(WeightError, match=r"model\.safetensors\.index\.json is damaged"):
        open_safetensors(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / name)
    with pytest.raises(WeightError, match=r"Tensor w is in a\.safetensors and in .*b\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("num_kept", [0, 5, 8, 40, 200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, num_kept: int) -> None:
    save_file({"first": np.ones((4, 8), np.float32), "w": np.ones(9, np.float32)}, tmp_path / "whole")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:num_kept])
    with pytest.raises(WeightError, match=r"model\.safetensors is .*truncated"):
        open_safetensors(tmp_path)


def entry(**changes: object) -> bytes:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    raw = json.dumps({"w": tensor}).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * 16


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (struct.pack("<Q", 2**60) + b" " * 50, "header claims"),
        (struct.pack("<Q", 4) + b"{x}}" + b" " * 50, "not readable as JSON"),
        (struct.pack("<Q", 4) + b"[  ]" + b" " * 50, "not a JSON object"),
        (entry(shape=[2, 3]), r"w has the shape \[2, 3\] of F32 in 16 bytes"),
        (entry(shape=[-2, -2]), "w has the shape"),
        (entry(shape=None), "entry of w is unreadable"),
        (entry(data_offsets=[16]), "entry of w is unreadable"),
        (entry(data_offsets=[0.0, 16.0]), "w has the shape"),
        (entry(data_offsets=[16, 32]), "truncated: w ends at"),
        (entry(dtype="F4"), "Tensor w of .* has the type F4"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_a_sentence(
    tmp_path: Path, raw: bytes, sentence: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightError, match=sentence):
        open_safetensors(tmp_path)


@settings(max_examples=200)
@given(position=st.integers(0, 10_000), flipped=st.integers(1, 255))
def test_a_flipped_byte_is_an_error_with_a_name_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, flipped: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    save_file({"first": np.ones((4, 8), np.float32), "w": np.ones(9, np.float16)}, folder / "f.safetensors")
    raw = bytearray((folder / "f.safetensors").read_bytes())
    raw[position % len(raw)] ^= flipped
    (folder / "f.safetensors").write_bytes(raw)
    sentence = ""
    try:
        checkpoint = open_safetensors(folder)
    except WeightError as error:
        sentence = error.message
    if sentence:
        assert "f.safetensors" in sentence
        return
    for name in checkpoint.tensor_names():
        shape = checkpoint.shape_of(name)
        assert checkpoint.read_rows(name, 0, shape[0]).shape == shape
    checkpoint.close()
