"""GGUF: every block format against the `gguf` library, metadata, and what damaged files do."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import WeightError
from jaxserve.weights.gguf import open_gguf, read_gguf_metadata
from jaxserve.weights.gguf_dequant import FORMATS
from tests.weights.gguf_files import write_tensors

TYPE_NAMES = [block_format.name for block_format in FORMATS.values()]
NUM_ROWS, NUM_COLUMNS = 7, 768


def random_rows(type_name: str) -> np.ndarray:
    """Rows of random bytes in a block format. Its float16 scales are made finite, as in real files."""
    ggml_type = gguf.GGMLQuantizationType[type_name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    generator = np.random.default_rng(7)
    if type_name in ("F32", "F16", "BF16"):
        return gguf.quantize(generator.standard_normal((NUM_ROWS, NUM_COLUMNS), np.float32), ggml_type)
    shape = (NUM_ROWS, NUM_COLUMNS // block_elements, block_bytes)
    blocks = generator.integers(0, 256, shape, dtype=np.uint8)
    scale_offsets = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for offset in scale_offsets.get(type_name, (0,)):
        scales = generator.standard_normal(shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(NUM_ROWS, -1)


@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_rows_dequantise_to_the_same_floats_as_the_gguf_library(tmp_path: Path, type_name: str) -> None:
    rows = random_rows(type_name)
    write_tensors(tmp_path / "one.gguf", {"token_embd.weight": rows}, f"RAW:{type_name}")
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name]).reshape(NUM_ROWS, NUM_COLUMNS)
    file = open_gguf(tmp_path / "one.gguf")
    tensor = file.tensors["token_embd.weight"]
    assert tensor.shape == (NUM_ROWS, NUM_COLUMNS)
    np.testing.assert_array_equal(file.dequantize_rows(tensor, 0, NUM_ROWS), expected)
    np.testing.assert_array_equal(file.dequantize_rows(tensor, 2, 3), expected[2:5])
    file.close()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_quantised_matrix_comes_back_near_what_it_was(tmp_path: Path, type_name: str) -> None:
    matrix = np.random.default_rng(3).standard_normal((5, 64), np.float32)
    file = open_gguf(write_tensors(tmp_path / "q.gguf", {"output.weight": matrix}, type_name))
    back = file.dequantize_rows(file.tensors["output.weight"], 0, 5)
    step = np.abs(matrix).max() / (127 if type_name == "Q8_0" else 7)
    assert np.abs(back - matrix).max() <= step
    file.close()


def write_with_metadata(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -3)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 你好 🙂")
    writer.add_array("a.strings", ["", "Ġthe", "🙂"])
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_comes_as_plain_python_values(tmp_path: Path) -> None:
    metadata = read_gguf_metadata(write_with_metadata(tmp_path / "m.gguf"))
    assert metadata == {
        "general.architecture": "llama",
        "a.u8": 200,
        "a.i16": -3,
        "a.i64": -(2**40),
        "a.f32": 0.5,
        "a.bool": True,
        "a.string": "naïve 你好 🙂",
        "a.strings": ["", "Ġthe", "🙂"],
        "a.ints": [1, 2, 3],
        "a.nested": [[1, 2], [3]],
    }


@pytest.mark.parametrize("kept_share", [0.0, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, kept_share: float) -> None:
    whole = write_with_metadata(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * kept_share)])
    with pytest.raises(WeightError, match=r"cut\.gguf"):
        open_gguf(cut)


def header(version: int = 3, num_tensors: int = 0, num_pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + rest + b"\0" * 64


KEY = struct.pack("<Q", 1) + b"k"
HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"<!DOCTYPE html><html>" + b" " * 64, "is not a GGUF file"),
        (b"GGUF", "is not a GGUF file"),
        (header(version=1), "version 1; versions 2 and 3 are read"),
        (header(version=3 << 24), "big-endian"),
        (header(num_tensors=2**60), r"claims \d+ tensors"),
        (header(num_pairs=2**60), r"claims \d+ metadata entries"),
        (header(num_pairs=1, rest=HUGE), "a string of"),
        (header(num_pairs=1, rest=KEY + struct.pack("<II", 9, 4) + HUGE), "an array of"),
        (header(num_pairs=1, rest=KEY + struct.pack("<II", 9, 8) + HUGE), "an array of"),
        (header(num_pairs=1, rest=KEY + struct.pack("<II", 9, 9) + HUGE), "an array of"),
        (header(num_pairs=1, rest=KEY + struct.pack("<I", 77)), "unknown type 77"),
        (header(num_tensors=1, rest=KEY + struct.pack("<I", 9)), "9 dimensions"),
        (header(num_tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 256, 10, 0)), "Tensor k of .* type Q2_K"),
        (header(num_tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 2**60, 0, 0)), "truncated: tensor k"),
        (header(num_tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 33, 8, 0)), r"shape \[33\] with type Q8_0"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_a_sentence(
    tmp_path: Path, raw: bytes, sentence: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(WeightError, match=sentence) as caught:
        open_gguf(path)
    assert "bad.gguf" in str(caught.value)


@settings(max_examples=300)
@given(position=st.integers(0, 10_000), flipped=st.integers(1, 255))
def test_a_flipped_byte_is_an_error_with_a_name_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, flipped: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    raw = bytearray(write_with_metadata(folder / "f.gguf").read_bytes())
    raw[position % len(raw)] ^= flipped
    (folder / "f.gguf").write_bytes(raw)
    sentence = ""
    try:
        file = open_gguf(folder / "f.gguf")
    except WeightError as error:
        sentence = error.message
    if sentence:
        assert "f.gguf" in sentence
        return
    for tensor in file.tensors.values():
        assert file.dequantize_rows(tensor, 0, tensor.shape[0]).shape == tensor.shape
    file.close()


def test_a_part_of_a_split_model_says_how_to_join_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(WeightError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")
