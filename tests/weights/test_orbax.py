"""A converted model gives each device, of any number, the very values that the loader gives it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from jaxserve.config import ServerConfig
from jaxserve.convert import convert
from jaxserve.errors import WeightError
from jaxserve.kernels_pallas.dispatch import XLA_KERNELS
from jaxserve.models.interface import ParamSpec, TensorSource
from jaxserve.models.sharding import cut_evenly
from jaxserve.runner.checkpoint import Checkpoint, read_family
from jaxserve.weights import orbax_save
from jaxserve.weights.orbax_restore import StoredArray, StoredValues, keeps_rotation, restore_params
from jaxserve.weights.placement import make_placement
from jaxserve.weights.resolve import resolve_model
from jaxserve.weights.saved_form import HEADER_FILE, PARAMS_FOLDER
from tests.tiny import write_tiny_checkpoint

Folders = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    """Of a name and a quantisation: a tiny model, and what was converted of it."""

    @cache
    def make(name: str, quantization: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(f"{name}-{quantization}")
        original = write_tiny_checkpoint(folder / "model", name)
        config = ServerConfig(model_path=str(original), quantization=quantization, log_level="error")
        convert(config, folder / "converted")
        return original, folder / "converted"

    return make


def read_tree(folder: Path, quantization: str, num_devices: int, *, stacks_layers: bool = False):
    files = resolve_model(str(folder), on_progress=lambda *_: None)
    family, cfg = read_family(str(folder), files)
    checkpoint = Checkpoint(
        files=files,
        family=family,
        cfg=cfg,
        kernels=XLA_KERNELS,
        dtype="float32",
        quantization=quantization,
        placement=make_placement(jax.devices()[:num_devices]),
        stacks_layers=stacks_layers,
    )
    return checkpoint, checkpoint.read_tree(lambda *_: None)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", "none"), ("llama_tied", "int8"), ("qwen2", "fp8"), ("qwen3_moe", "none")],
)
def test_every_device_gets_what_the_loader_gives_it(folders, name, quantization, num_devices):
    original, converted = folders(name, quantization)
    _, expected = read_tree(original, quantization, num_devices)
    checkpoint, restored = read_tree(converted, quantization, num_devices)
    assert checkpoint.files.kind == "orbax"
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for array, loaded in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert (array.dtype, array.sharding) == (loaded.dtype, loaded.sharding)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(loaded))
    host = checkpoint.read_values(lambda *_: None)
    assert all(map(np.array_equal, host, map(np.asarray, jax.tree.leaves(expected))))


@pytest.mark.parametrize(("name", "quantization"), [("qwen2", "int8"), ("qwen3_moe", "none")])
def test_a_host_is_given_the_parts_of_its_own_devices(folders, name, quantization):
    """What four devices have, of which one host has the first and another the rest."""
    _, converted = folders(name, quantization)
    checkpoint, _ = read_tree(converted, quantization, 4)
    files, specs = checkpoint.files, checkpoint._list_specs()
    whole, *parts = (
        restore_params(
            files,
            [replace(spec, held=held) for spec in specs],
            dtype="float32",
            quantization=quantization,
            on_progress=lambda *_: None,
            put=lambda _path, array, _axes: np.asarray(array),  # type: ignore[arg-type]
        )
        for held in (None, range(0, 1), range(1, 4))
    )
    for spec in specs:
        pairs = zip(*(jax.tree.leaves(params[spec.path]) for params in (whole, *parts)), strict=True)
        for array, *held_arrays in pairs:
            axis = next((i for i, cut in enumerate(spec.cuts[: array.ndim]) if cut is not None), None)
            joined = held_arrays[0] if axis is None else np.concatenate(held_arrays, axis)
            np.testing.assert_array_equal(joined, array)


def test_layers_are_stacked_where_programs_loop_over_them(folders):
    original, converted = folders("llama", "none")
    _, expected = read_tree(original, "none", 2, stacks_layers=True)
    _, restored = read_tree(converted, "none", 2, stacks_layers=True)
    for array, loaded in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(loaded))


def test_channels_that_int8_mixes_otherwise_are_quantised_again(folders):
    """Two devices mix runs of 4 of the 24 channels that each has of w_o; one device mixes 16 of 48."""
    original, converted = folders("qwen2", "int8")
    checkpoint, restored = read_tree(converted, "int8", 2)
    specs = {spec.path: spec for spec in checkpoint._list_specs()}
    assert [path for path, spec in specs.items() if not keeps_rotation(spec)] == [
        f"layers.{layer}.w_o_DF" for layer in range(3)
    ]
    _, expected = read_tree(original, "int8", 2)
    pairs = list(zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True))
    num_other = 0
    for array, loaded in pairs:
        mine, theirs = np.asarray(array, np.float64), np.asarray(loaded, np.float64)
        if not np.array_equal(mine, theirs):
            num_other += 1
            assert np.abs(mine - theirs).max() <= (0.02 * theirs.max() if mine.ndim == 1 else 4)
    assert num_other == 2 * 3  # values and scales


def test_orbax_itself_reads_the_folder(folders):
    original, converted = folders("llama_tied", "int8")
    _, expected = read_tree(original, "int8", 1)
    tree = ocp.PyTreeCheckpointer().restore(converted / PARAMS_FOLDER)
    assert sorted(tree) == ["embed_VD", "final_norm_D", "layers"]  # the head is the embedding
    flat = jax.tree.leaves(expected["layers"][2]["w_qkv_FD"])
    for part, loaded in zip(("q", "scale"), flat, strict=True):
        np.testing.assert_array_equal(tree["layers"]["2"]["w_qkv_FD"][part], np.asarray(loaded))


class CountedStore:
    """A TensorStore that notes what is read of it."""

    def __init__(self, values: np.ndarray):
        self.store = tensorstore.array(values)
        self.num_read = 0

    def __getitem__(self, index):
        part = self.store[index]
        self.num_read += part.size
        return part


def test_a_device_reads_its_own_rows_and_columns():
    """Ten rows on four devices: three each, and the last has one and two of zeros."""
    values = np.arange(70, dtype=np.float32).reshape(10, 7)
    store = CountedStore(values)
    cuts = (cut_evenly(10, 4), None)
    spec = ParamSpec(
        path="w", kind="matrix", sources=(TensorSource("w", (10, 7)),), axes=("mlp", None), cuts=cuts
    )
    served = StoredValues(StoredArray("w", (10, 7), values.dtype), spec, store)  # type: ignore[arg-type]
    sharding = make_placement(jax.devices()[:4]).make_sharding(spec.axes)
    array = jax.make_array_from_callback(served.shape, sharding, lambda index: served[index])
    assert store.num_read == values.size
    expected = np.zeros((12, 7), np.float32)
    expected[:10] = values
    np.testing.assert_array_equal(np.asarray(array), expected)


def test_a_large_array_is_cut_into_chunks_whatever_its_rows(tmp_path, monkeypatch):
    """The vocabulary is a prime, 307: without rows of zeros Orbax would write a chunk a row."""
    monkeypatch.setattr(orbax_save, "CHUNK_BYTES", 20_000)
    original = write_tiny_checkpoint(tmp_path / "model", "llama")
    form = convert(ServerConfig(model_path=str(original), log_level="error"), tmp_path / "converted")
    assert form.padded_rows == {"embed_VD": 384, "head_VD": 384}
    _, expected = read_tree(original, "none", 2)
    _, restored = read_tree(tmp_path / "converted", "none", 2)
    for array, loaded in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(loaded))


def test_a_full_disk_is_known_by_what_tensorstore_says():
    text = "RESOURCE_EXHAUSTED: ... : No space left on device [os_error_code='28'] [tensorstore_spec='...']"
    assert orbax_save.read_failure(ValueError(text)).errno == errno.ENOSPC
    other = orbax_save.read_failure(ValueError("DATA_LOSS: oh"))
    assert (other.errno, other.strerror) == (errno.EIO, "DATA_LOSS: oh")


def test_other_types_and_missing_arrays_are_told(folders, tmp_path):
    _, converted = folders("llama", "none")
    with pytest.raises(WeightError, match="was converted to float32, and int8 is served here"):
        read_tree(converted, "int8", 1)
    with pytest.raises(WeightError, match=r"int4 is served here\. Take the original\."):
        read_tree(converted, "int4", 1)
    shutil.copytree(converted, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    header = json.loads((tmp_path / "copy" / HEADER_FILE).read_text())
    for change, sentence in [
        ({"num_hidden_layers": 4}, "cannot be read from the converted model"),
        ({"intermediate_size": 96}, r"is float32\[188, 54\]; the model's config asks for float32\[192, 54\]"),
    ]:
        text = json.dumps(config | change)
        (tmp_path / "copy" / "config.json").write_text(text)
        header["files"]["config.json"] = len(text)
        (tmp_path / "copy" / HEADER_FILE).write_text(json.dumps(header))
        with pytest.raises(WeightError, match=sentence):
            read_tree(tmp_path / "copy", "none", 1)
