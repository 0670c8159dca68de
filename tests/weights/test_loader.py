"""Loading: values, dtypes, int8, blocks, both-way checks, memory, and made-up parameters."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import WeightError
from jaxserve.models import llama, qwen2, qwen3, qwen3_moe
from jaxserve.models.interface import ParamSpec, TensorSource
from jaxserve.models.quant import Matrix, QuantizedMatrix, hadamard
from jaxserve.weights import building
from jaxserve.weights.gguf_names import open_gguf_checkpoint
from jaxserve.weights.loader import load_params, make_dummy_params
from jaxserve.weights.resolve import ModelFiles, resolve_model
from jaxserve.weights.served import DTYPES, count_served_bytes, describe_params
from tests import tiny
from tests.weights.gguf_files import write_model, write_tensors

FAMILIES = {"llama": llama, "llama_tied": llama, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe}


def ignore_progress(message: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


def specs_of(name: str) -> list[ParamSpec]:
    family = FAMILIES[name]
    return family.param_specs(family.Config.from_hf(tiny.tiny_config(name)))


def load(folder: Path, name: str, **options: Any) -> dict[str, Matrix]:
    files = resolve_model(str(folder), on_progress=ignore_progress)
    options = {"dtype": "float32", "on_progress": ignore_progress} | options
    return load_params(files, specs_of(name), **options)


def joined(tensors: dict[str, np.ndarray], spec: ParamSpec) -> np.ndarray:
    return np.concatenate([tensors[source.name] for source in spec.sources])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that tiny tensors take many and blocks straddle fused sources."""
    monkeypatch.setattr(building, "_BLOCK_ELEMENTS", 500)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("name", "source"),
    [(name, source) for name in tiny.TINY_NAMES for source in ("safetensors", "shards")]
    + [(name, "gguf") for name in tiny.GGUF_NAMES],
)
def test_parameters_are_their_sources_joined(tmp_path: Path, name: str, source: str) -> None:
    tensors = tiny.tiny_tensors(name)
    if source == "gguf":
        write_model(tmp_path / "m.gguf", tiny.tiny_config(name), tensors)
    else:
        tiny.write_tiny_checkpoint(tmp_path, name, shards=2 if source == "shards" else 1)
    params = load(tmp_path, name)
    for spec in specs_of(name):
        np.testing.assert_array_equal(params[spec.path], joined(tensors, spec))
    assert len(params) == len(specs_of(name))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
def test_matrices_are_served_in_the_asked_dtype_and_vectors_in_float32(
    tmp_path: Path, stored: str, served: str
) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "qwen2", dtype=stored)
    tensors = load_file(tmp_path / "model.safetensors")
    params = load(tmp_path, "qwen2", dtype=served)
    for spec in specs_of("qwen2"):
        dtype = "float32" if spec.kind == "vector" else served
        expected = joined(tensors, spec).astype(np.float32).astype(DTYPES[dtype])
        assert np.asarray(params[spec.path]).dtype == expected.dtype
        np.testing.assert_array_equal(params[spec.path], expected)


def rotated(x_FD: np.ndarray) -> np.ndarray:
    h_HH = hadamard(x_FD.shape[1])
    return (x_FD.reshape(-1, len(h_HH)) @ h_HH).reshape(x_FD.shape)


@pytest.mark.usefixtures("small_blocks")
def test_int8_rows_are_rotated_have_their_own_scale_and_round_half_to_even(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[3] = 0
    row_D = np.zeros((1, embedding.shape[1]), np.float32)
    row_D[0, :5] = [127, 2.5, 3.5, -2.5, -127]  # scale 1: ties are visible
    embedding[4] = rotated(row_D)[0]  # exact: runs of four channels; and its own inverse
    save_file(tensors, tmp_path / "model.safetensors")
    params = load(tmp_path, "qwen2", quantization="int8")
    for spec in specs_of("qwen2"):
        param, expected = params[spec.path], joined(tensors, spec)
        if spec.kind == "vector":
            assert np.asarray(param).dtype == np.float32
            continue
        assert isinstance(param, QuantizedMatrix)
        assert param.q_FD.dtype == np.int8
        expected = rotated(expected)
        scale = np.maximum(np.abs(expected).max(axis=1), np.float32(1e-12)) / np.float32(127)
        np.testing.assert_allclose(param.scale_F, scale, rtol=1e-6)
        np.testing.assert_allclose(param.q_FD, expected / scale[:, None], rtol=0, atol=0.5 + 1e-3)
    served = params["embed_VD"]
    assert isinstance(served, QuantizedMatrix)
    assert served.q_FD.dtype == np.int8
    assert not np.asarray(served.q_FD[3]).any()
    assert float(served.scale_F[3]) > 0
    assert np.asarray(served.q_FD[4, :5]).tolist() == [127, 2, 4, -2, -127]


def test_fp8_rows_have_their_own_scale_and_are_not_rotated(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    params = load(tmp_path, "qwen2", quantization="fp8")
    described = describe_params(specs_of("qwen2"), dtype="bfloat16", quantization="fp8")
    for spec in specs_of("qwen2"):
        if spec.kind == "vector":
            continue
        param, expected = params[spec.path], joined(tensors, spec)
        assert isinstance(param, QuantizedMatrix)
        assert param.q_FD.dtype == ml_dtypes.float8_e4m3fn
        assert jax.tree.map(lambda x: (x.shape, x.dtype), param) == jax.tree.map(
            lambda x: (x.shape, x.dtype), described[spec.path]
        )
        scale = np.abs(expected).max(axis=1) / np.float32(448)
        np.testing.assert_array_equal(param.scale_F, scale)
        values = np.asarray(param.q_FD).astype(np.float32)
        np.testing.assert_allclose(values, expected / scale[:, None], rtol=1 / 16, atol=2**-10)  # 3 bits


def test_put_places_every_array_under_its_path_and_axes(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    placed: list[tuple[str, str, tuple[int, ...], tuple[str | None, ...]]] = []

    def put(path: str, array: np.ndarray, axes: Sequence[str | None]) -> jax.Array:
        placed.append((path, str(array.dtype), array.shape, tuple(axes)))
        return jax.device_put(array)

    load(tmp_path, "llama", quantization="int8", put=put)
    assert ("embed_VD", "int8", (307, 54), ("vocab", None)) in placed
    assert ("embed_VD", "float32", (307,), ("vocab",)) in placed
    assert ("final_norm_D", "float32", (54,), (None,)) in placed


def test_progress_counts_served_bytes_to_the_end(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    told: list[tuple[int, int | None]] = []
    params = load(
        tmp_path,
        "llama",
        dtype="bfloat16",
        on_progress=lambda message, done, total: told.append((done, total)),
    )
    served_bytes = sum(param.nbytes for param in jax.tree.leaves(params))
    assert told == sorted(told)
    assert told[-1] == (served_bytes, served_bytes)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "none"), ("float32", "int8")])
def test_what_will_be_loaded_is_described_before_it_is(tmp_path: Path, dtype: str, quantization: str) -> None:
    """Programs are compiled for the description, and the pool is sized by it, while the files are read."""
    tiny.write_tiny_checkpoint(tmp_path, "qwen2")
    precision: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    params = load(tmp_path, "qwen2", **precision)
    described = describe_params(specs_of("qwen2"), **precision)
    assert jax.tree.structure(described) == jax.tree.structure(params)
    for shape, array in zip(jax.tree.leaves(described), jax.tree.leaves(params), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
    served_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
    assert count_served_bytes(specs_of("qwen2"), **precision) == served_bytes


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; dots in names are written as __."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


NAN_ROW = np.where(np.arange(307 * 54).reshape(307, 54) == 9999, np.nan, 0.5)


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"model__norm__weight": None}, {}, r"lacks tensor model\.norm\.weight"),
        (
            {"lm_head__weight": np.zeros((307, 60), np.float32)},
            {},
            r"lm_head\.weight of .*model\.safetensors has the shape \[307, 60\].*\[307, 54\]",
        ),
        ({"score__weight": np.zeros(2, np.float32)}, {}, r"holds tensor score\.weight, which"),
        ({"lm_head__weight": NAN_ROW.astype(np.float32)}, {}, r"lm_head\.weight\) contains NaN"),
        ({"lm_head__weight": NAN_ROW.astype(np.float32)}, {"quantization": "int8"}, "contains NaN"),
        ({"lm_head__weight": NAN_ROW.astype(ml_dtypes.bfloat16)}, {"dtype": "bfloat16"}, "contains NaN"),
        (
            {"lm_head__weight": np.full((307, 54), 1e6, np.float32)},
            {"dtype": "float16"},
            "values that float16 cannot hold",
        ),
    ],
)
def test_a_tensor_at_fault_is_named(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, **changes)
    with pytest.raises(WeightError, match=sentence):
        load(tmp_path, "llama", **options)


def test_computed_buffers_and_a_tied_head_are_no_leftovers(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama_tied")
    inv_freq = np.ones(5, np.float32)
    rewrite(
        tmp_path,
        lm_head__weight=np.zeros((307, 60), np.float32),
        model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq,
        rope_freqs__weight=inv_freq,
    )
    assert "embed_VD" in load(tmp_path, "llama_tied")


def test_loading_never_holds_a_float32_copy_of_a_quantised_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "num_threads", lambda: 2)
    shape = (16384, 1024)
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    write_tensors(tmp_path / "m.gguf", {"token_embd.weight": matrix}, "F16")
    spec = ParamSpec(
        path="embed_VD",
        kind="embedding",
        sources=(TensorSource("model.embed_tokens.weight", shape),),
        axes=("vocab", None),
    )
    files = ModelFiles(
        kind="gguf",
        model_id="m",
        local_dir=tmp_path,
        files=(tmp_path / "m.gguf",),
        hf_config={},
        generation_config={},
    )
    del matrix
    tracemalloc.start()
    params = load_params(files, [spec], dtype="float32", quantization="int8", on_progress=ignore_progress)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    served_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert served_bytes < peak_bytes < 2 * served_bytes  # float32 would be four times


def test_real_quantised_types_load_to_what_the_gguf_library_makes_of_them(tmp_path: Path) -> None:
    matrix = np.random.default_rng(1).standard_normal((40, 64), np.float32)
    write_tensors(tmp_path / "m.gguf", {"output.weight": matrix}, "Q5_1", architecture="qwen2")
    ggml_type = gguf.GGMLQuantizationType.Q5_1
    expected = gguf.dequantize(gguf.quantize(matrix, ggml_type), ggml_type)
    checkpoint = open_gguf_checkpoint(tmp_path / "m.gguf")
    np.testing.assert_array_equal(checkpoint.read_rows("lm_head.weight", 0, 40), expected)
    checkpoint.close()


def test_made_up_parameters_depend_on_seed_and_path_only() -> None:
    specs = specs_of("qwen2")
    first = make_dummy_params(specs, dtype="float32", random_seed=1)
    again = make_dummy_params(specs[::-1], dtype="float32", random_seed=1)
    other = make_dummy_params(specs, dtype="float32", random_seed=2)
    for spec in specs:
        values = np.asarray(first[spec.path])
        np.testing.assert_array_equal(values, again[spec.path])
        assert values.shape == spec.shape
        if spec.kind == "vector" and "norm" in spec.path:
            assert (values == 1).all()
        else:
            assert (values != np.asarray(other[spec.path])).any()
    assert abs(float(np.std(np.asarray(first["embed_VD"]))) - 0.02) < 0.001
    assert not np.array_equal(first["layers.0.w_o_DF"], first["layers.1.w_o_DF"])
    quantised = make_dummy_params(specs, dtype="float32", quantization="int8", random_seed=1)
    assert isinstance(quantised["layers.0.w_o_DF"], QuantizedMatrix)
    assert quantised["layers.0.w_o_DF"].q_FD.dtype == np.int8
