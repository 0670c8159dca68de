"""AWQ and GPTQ checkpoints read as the matrices that they pack, whole and by rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import WeightError
from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix, dequantize
from jaxserve.models import llama
from jaxserve.runner.grouping import find_grouping, mark_groups
from jaxserve.weights import building
from jaxserve.weights.loader import load_params
from jaxserve.weights.packed_int4 import PackedCheckpoint, read_packing
from jaxserve.weights.resolve import resolve_model
from jaxserve.weights.safetensors import open_safetensors
from tests.weights.packed_files import CONFIG, write_packed_model

WIDE: dict[str, Any] = {"width": 256, "mlp_width": 384}
LAYOUTS = [
    ("awq", {"version": "gemm", "zero_point": True}),
    ("gptq", {"sym": False, "desc_act": False}),
    ("gptq", {"desc_act": True}),
    ("gptq", {"checkpoint_format": "gptq_v2"}),
    ("gptq", {"group_size": -1}),
]


def load(folder: Path, *, is_grouped: bool = False, **options: Any) -> dict[str, Any]:
    files = resolve_model(str(folder), on_progress=lambda *_: None)
    specs = llama.param_specs(llama.Config.from_hf(files.hf_config))
    if is_grouped:
        specs = mark_groups(specs, find_grouping(files, specs).group_sizes)
    return load_params(files, specs, **{"dtype": "float32", "on_progress": lambda *_: None, **options})


@pytest.mark.parametrize(("method", "settings"), LAYOUTS, ids=str)
@pytest.mark.parametrize("block_elements", [1 << 17, 300], ids=["whole", "blocks"])
def test_parameters_are_those_of_the_unpacked_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict, block_elements: int
):
    monkeypatch.setattr(
        building, "_BLOCK_ELEMENTS", block_elements
    )  # a few rows: blocks begin inside of words
    write_packed_model(tmp_path, method, **settings)
    packed, plain = load(tmp_path), load(tmp_path / "plain")
    assert packed.keys() == plain.keys()
    for path, expected in plain.items():
        np.testing.assert_array_equal(packed[path], expected, err_msg=path)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("awq", {}), ("gptq", {"group_size": 64}), ("gptq", {"group_size": -1, "checkpoint_format": "gptq_v2"})],
    ids=str,
)
def test_packed_matrices_are_served_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict
):
    monkeypatch.setattr(building, "_BLOCK_ELEMENTS", 200 * 256)  # blocks straddle q, k and v, gate and up
    write_packed_model(tmp_path, method, **WIDE, **{"group_size": 128, **settings})
    packed = load(tmp_path, quantization="int4", is_grouped=True)
    plain = load(tmp_path / "plain")
    assert packed.keys() == plain.keys()
    for path, expected in plain.items():
        is_matrix = expected.ndim == 2 and path.startswith("layers")
        assert isinstance(packed[path], Int4Matrix) == is_matrix
        got = dequantize(packed[path]) if is_matrix else packed[path]
        np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=path)


def test_groups_that_are_not_those_that_are_served_are_refused(tmp_path: Path):
    """As another checkpoint may have that is to take the place of the served one."""
    write_packed_model(tmp_path, "gptq", **WIDE, group_size=128, desc_act=True)
    with pytest.raises(
        WeightError, match=r"layers\.0\.self_attn\.q_proj\.weight is not packed in groups of 128"
    ):
        load(tmp_path, quantization="int4", is_grouped=True)


def test_a_packed_checkpoint_can_be_served_in_int8(tmp_path: Path):
    write_packed_model(tmp_path, "awq")
    packed, plain = (load(folder, quantization="int8") for folder in (tmp_path, tmp_path / "plain"))
    jax.tree.map(np.testing.assert_array_equal, packed, plain)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 8},
        {"quant_method": "fp8"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 4, "zero_point": False},
    ],
    ids=str,
)
def test_other_packings_are_refused(quantization: dict):
    with pytest.raises(WeightError, match=r"are served|served are"):
        read_packing({**CONFIG, "quantization_config": quantization})


@pytest.mark.parametrize("fault", ["missing", "shape", "group"])
def test_a_matrix_that_does_not_fit_together_is_named(tmp_path: Path, fault: str):
    write_packed_model(tmp_path, "gptq", desc_act=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    base = "model.layers.1.mlp.up_proj"
    if fault == "missing":
        del tensors[f"{base}.scales"]
    elif fault == "shape":
        tensors[f"{base}.scales"] = tensors[f"{base}.scales"][:, 1:].copy()
    else:
        tensors[f"{base}.g_idx"][3] = 9
    save_file(tensors, path)
    with pytest.raises(WeightError, match=base):
        load(tmp_path)


def test_only_packed_matrices_change_their_names(tmp_path: Path):
    write_packed_model(tmp_path, "gptq")
    packing = read_packing(json.loads((tmp_path / "config.json").read_text()))
    assert packing is not None
    checkpoint = PackedCheckpoint(open_safetensors(tmp_path), packing)
    plain = open_safetensors(tmp_path / "plain")
    assert sorted(checkpoint.tensor_names()) == sorted(plain.tensor_names())
    assert {name: checkpoint.shape_of(name) for name in plain.tensor_names()} == {
        name: plain.shape_of(name) for name in plain.tensor_names()
    }
    checkpoint.close()
    plain.close()
