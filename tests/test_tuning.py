"""`--tune-kernels`: sizes are timed once, kept, and given to the kernels."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxserve.blueprint import draw_blueprint
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.paged_attention import tpu_tuner
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Blocks, TunedBlocks
from jaxserve.kernels_pallas.paged_attention.tpu_tuned import read_tuned
from jaxserve.planning.shapes import find_model
from jaxserve.runner.sizing import GIB, Machine
from jaxserve.tuning import TUNED_NAME, find_tuned
from jaxserve.weights.placement import ALONE

V5E = Machine(
    platform="tpu",
    num_devices=1,
    memory_bytes=16 * GIB,
    free_bytes=16 * GIB,
    device_kind="TPU v5 lite",
)


@pytest.fixture
def tunings(monkeypatch):
    """What was timed, on a TPU that finds the sizes of its model too large."""
    seen = []

    def tune(workload, device_kind, chip, on_progress):
        seen.append(workload)
        return [
            TunedBlocks(
                device_kind=device_kind,
                jax_version=jax.__version__,
                layout=workload.layout,
                page_size=workload.page_size,
                rows_per_token=rows,
                blocks=Blocks(block_tokens=128, num_items=1, tile_tokens=16, num_cores=chip.num_cores),
                time_s=1e-5,
                model_time_s=2e-5,
            )
            for rows in (0, workload.rows_per_token)
        ]

    monkeypatch.setattr(tpu_tuner, "tune", tune)
    return seen


def find(path, machine=V5E, **settings):
    config = ServerConfig(model_path="qwen2.5-0.5b", **settings)
    files = find_model(config)
    machine = find_tuned(config, files, machine, ALONE, path / TUNED_NAME, lambda *progress: None)
    return machine, draw_blueprint(config, files, machine)


def test_sizes_are_timed_once_and_the_kernels_have_them(tmp_path, tunings):
    untuned, _ = find(tmp_path)
    assert not tunings
    machine, blueprint = find(tmp_path, tune_kernels=True)
    (workload,) = tunings
    assert (workload.num_heads, workload.layout.num_kv_heads, workload.page_size) == (14, 2, 128)
    decode, prefill = read_tuned(tmp_path / TUNED_NAME)
    assert machine.tuned == (decode, prefill, *untuned.tuned)
    for form in ("paged_decode", "paged_prefill"):
        chip = getattr(blueprint.sketch.checkpoint.kernels, form).keywords["chip"]
        assert chip.tuned[:2] == (decode, prefill)
    again, _ = find(tmp_path, tune_kernels=True)
    assert (again, len(tunings)) == (machine, 1)
    find(tmp_path, tune_kernels=True, page_size=64)  # another pool
    assert len(tunings) == 2


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path, tunings, caplog):
    caplog.set_level("WARNING", "jaxserve")  # which commands that other tests ran may have raised
    (tmp_path / TUNED_NAME).write_text("{")
    machine, _ = find(tmp_path)
    assert machine.tuned == find(tmp_path / "nothing")[0].tuned
    assert "is no table of tuned sizes" in caplog.text


def test_there_is_nothing_to_tune_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match="times kernels for TPUs, and JAX finds cpu devices"):
        find(tmp_path, replace(V5E, platform="cpu"), tune_kernels=True)
