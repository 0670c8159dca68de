"""Parameters as devices share them: where rows and columns go, read once, and the same values in int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.models import qwen2
from jaxserve.models.interface import ParamSpec, TensorSource
from jaxserve.models.quant import QuantizedMatrix
from jaxserve.models.sharding import Division, cut_channels
from jaxserve.weights import building, loader
from jaxserve.weights.loader import load_params, make_dummy_params
from jaxserve.weights.placement import make_placement
from jaxserve.weights.resolve import resolve_model
from jaxserve.weights.served import count_device_bytes, count_served_bytes, describe_params
from tests import tiny

CFG = qwen2.Config.from_hf(tiny.tiny_config("qwen2"))  # 6 query and 2 KV heads of 8, 106 channels, 307 ids
HEAD_DIM, NUM_DEVICES = 8, 4


@pytest.fixture
def specs() -> list[ParamSpec]:
    return qwen2.divide(CFG, NUM_DEVICES).cut_specs(qwen2.param_specs(CFG))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is read in blocks of a few rows, which straddle the cuts."""
    monkeypatch.setattr(building, "_BLOCK_ELEMENTS", 500)
    return tiny.write_tiny_checkpoint(tmp_path, "qwen2")


def load(folder: Path, specs: list[ParamSpec], **options: Any) -> dict[str, Any]:
    files = resolve_model(str(folder), on_progress=lambda *_: None)
    return load_params(files, specs, dtype="float32", on_progress=lambda *_: None, **options)


def heads_of(tensor: np.ndarray, *heads: int) -> np.ndarray:
    """Rows of some heads; zeros for head -1."""
    rows = tensor.reshape(-1, HEAD_DIM, *tensor.shape[1:])
    zeros = np.zeros_like(rows[0])
    return np.concatenate([zeros if head < 0 else rows[head] for head in heads])


def test_each_device_holds_its_own_rows_and_columns(folder: Path, specs: list[ParamSpec]) -> None:
    placement = make_placement(jax.devices()[:NUM_DEVICES])
    params = load(folder, specs, put=placement.put)
    tensors = {name.removeprefix("model.layers.0."): x for name, x in tiny.tiny_tensors("qwen2").items()}

    def parts(path: str) -> list[np.ndarray]:
        shards = sorted(params[path].addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.device for shard in shards] == jax.devices()[:NUM_DEVICES]
        return [np.asarray(shard.data) for shard in shards]

    q, k, v = (tensors[f"self_attn.{name}_proj.weight"] for name in "qkv")
    q_heads = [(0, 1), (2, -1), (3, 4), (5, -1)]
    for device, part in enumerate(parts("layers.0.w_qkv_FD")):
        kv_head = device // 2
        expected = [heads_of(q, *q_heads[device]), heads_of(k, kv_head), heads_of(v, kv_head)]
        np.testing.assert_array_equal(part, np.concatenate(expected))
    bias = tensors["self_attn.q_proj.bias"]
    np.testing.assert_array_equal(parts("layers.0.b_qkv_F")[1][:16], heads_of(bias, 2, -1))
    o = tensors["self_attn.o_proj.weight"]
    np.testing.assert_array_equal(parts("layers.0.w_o_DF")[3], heads_of(o.T, 5, -1).T)
    gate, up = (tensors[f"mlp.{name}_proj.weight"] for name in ("gate", "up"))
    np.testing.assert_array_equal(parts("layers.0.w_gate_up_FD")[1], np.concatenate([gate[27:54], up[27:54]]))
    down = np.pad(tensors["mlp.down_proj.weight"], ((0, 0), (0, 2)))
    np.testing.assert_array_equal(parts("layers.0.w_down_DF")[3], down[:, 81:])
    embedding = np.pad(tensors["model.embed_tokens.weight"], ((0, 1), (0, 0)))
    np.testing.assert_array_equal(parts("embed_VD")[3], embedding[231:])
    for part in parts("final_norm_D"):
        np.testing.assert_array_equal(part, tensors["model.norm.weight"])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_it_is_described_and_counted_before_it_is_loaded(
    folder: Path, specs: list[ParamSpec], quantization: str
) -> None:
    placement = make_placement(jax.devices()[:NUM_DEVICES])
    params = load(folder, specs, put=placement.put, quantization=quantization)
    described = describe_params(specs, dtype="float32", quantization=quantization, placement=placement)
    for shape, array in zip(jax.tree.leaves(described), jax.tree.leaves(params), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
    arrays = jax.tree.leaves(params)
    precision: dict[str, Any] = {"dtype": "float32", "quantization": quantization}
    assert count_served_bytes(specs, **precision) == sum(array.nbytes for array in arrays)
    own_bytes = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    assert count_device_bytes(specs, **precision) == own_bytes


def test_every_row_is_read_once_whoever_holds_it(
    folder: Path, specs: list[ParamSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read: dict[str, int] = {}
    read_rows = loader._read_spec_rows

    def count_rows(checkpoint: Any, spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
        num_read[spec.path] = num_read.get(spec.path, 0) + num_rows
        return read_rows(checkpoint, spec, first_row, num_rows)

    monkeypatch.setattr(loader, "_read_spec_rows", count_rows)
    load(folder, specs)
    assert num_read == {spec.path: spec.shape[0] for spec in specs}


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_each_host_reads_and_holds_the_parts_of_its_own_devices(
    folder: Path, specs: list[ParamSpec], quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts' arrays side by side are what one host has, and rows are read by whom they belong to."""
    whole = load(folder, specs, quantization=quantization)
    rows_read: dict[str, list[range]] = {}
    read_rows = loader._read_spec_rows

    def note_rows(checkpoint: Any, spec: ParamSpec, first_row: int, num_rows: int) -> np.ndarray:
        rows_read.setdefault(spec.path, []).append(range(first_row, first_row + num_rows))
        return read_rows(checkpoint, spec, first_row, num_rows)

    monkeypatch.setattr(loader, "_read_spec_rows", note_rows)
    parts, num_read = [], []
    for held in (range(0, 1), range(1, 4)):
        rows_read.clear()
        own = [replace(spec, held=held) for spec in specs]
        parts.append(load(folder, own, quantization=quantization, put=lambda _path, array, _axes: array))
        num_read.append(sum(map(len, rows_read["layers.0.w_gate_up_FD"])))
    for spec in specs:
        pairs = zip(*(jax.tree.leaves(part[spec.path]) for part in (whole, *parts)), strict=True)
        for array, *held_arrays in pairs:
            axis = next((i for i, cut in enumerate(spec.cuts[: array.ndim]) if cut is not None), None)
            joined = held_arrays[0] if axis is None else np.concatenate(held_arrays, axis)
            np.testing.assert_array_equal(joined, array)
    num_rows = 2 * CFG.mlp_width
    assert num_read[0] < num_rows // 4 + 60  # blocks of 10 rows straddle the cuts
    assert sum(num_read) < num_rows + 60


def test_int8_values_are_those_of_one_device_where_mixed_channels_stay_together() -> None:
    """Three runs of 64 channels on two devices: the last run of the second is of zeros. The same but for the
    last bit, as NumPy's product adds up in an order that depends on shapes and on the CPU."""
    source = TensorSource("down.weight", (5, 192))
    spec = ParamSpec(path="w_down_DF", kind="matrix", sources=(source,), axes=(None, "mlp"))
    division = Division(num_devices=2, local_cfg=None, cuts={"mlp": cut_channels(192, 2)})
    whole, shared = (
        make_dummy_params(specs, dtype="float32", quantization="int8")["w_down_DF"]
        for specs in ([spec], division.cut_specs([spec]))
    )
    assert isinstance(whole, QuantizedMatrix)
    assert isinstance(shared, QuantizedMatrix)
    np.testing.assert_allclose(shared.scale_F, whole.scale_F, rtol=2e-7)
    difference = np.asarray(shared.q_FD, np.int32) - np.pad(whole.q_FD, ((0, 0), (0, 64)))
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) < 0.01 * difference.size
