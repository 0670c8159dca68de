"""What a launch would decide on machines that are not here: the one place where plan and launch agree."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from jaxserve.blueprint import BYTES_PER_EDIT, Blueprint, draw_blueprint, sketch_model
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError, WeightError
from jaxserve.models.sharding import TENSOR
from jaxserve.planning.shapes import find_model
from jaxserve.runner.device_state import make_state
from jaxserve.runner.sizing import GIB, Machine
from jaxserve.weights.placement import Placement
from tests.tiny import write_tiny_checkpoint

LAPTOP = Machine(platform="cpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=10 * GIB)
V5E = Machine(platform="tpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=16 * GIB)


H200 = Machine(
    platform="gpu", num_devices=1, memory_bytes=139 * GIB, free_bytes=139 * GIB, compute_capability="9.0"
)
A100 = replace(H200, compute_capability="8.0")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
NEEDS_JAX_011 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="The GPU kernels need jax 0.11.2 or later."
)


def draw(
    machine: Machine, model_path: str = "qwen2.5-0.5b", packing: dict | None = None, **flags
) -> Blueprint:
    config = ServerConfig(model_path=model_path, **flags)
    files = find_model(config)
    words = {"quantization_config": packing} if packing else {}
    return draw_blueprint(config, replace(files, hf_config=files.hf_config | words), machine)


@pytest.mark.parametrize("flags", [{}, {"quantization": "int4"}], ids=str)
def test_the_bytes_are_those_of_the_arrays_that_would_be_made(flags):
    blueprint = draw(V5E, **flags)
    sketch = blueprint.sketch
    params = jax.tree.leaves(nnx.split(sketch.checkpoint.describe_model())[1])
    assert sketch.param_bytes == sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in params)
    state = jax.eval_shape(lambda: make_state(sketch.cfg, blueprint.pool, sketch.kv_dtype))
    kv_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.kv))
    assert blueprint.kv_bytes == kv_bytes
    assert blueprint.slots_bytes == BYTES_PER_EDIT * state.edits_XV.size
    page_bytes = blueprint.kv_bytes // blueprint.pool.num_pages  # trash, beyond the share
    assert sketch.param_bytes + kv_bytes + blueprint.slots_bytes <= 0.88 * V5E.memory_bytes + page_bytes


def test_devices_that_share_layers_hold_a_share_of_weights_pages_and_logits():
    config = ServerConfig(model_path="llama-3-8b")
    whole, half, many = (
        sketch_model(config, find_model(config), V5E, Placement(AbstractMesh((size,), (TENSOR,))))
        for size in (1, 2, 32)
    )
    assert half.param_bytes == pytest.approx(whole.param_bytes / 2, rel=1e-3)  # norms are on both
    assert half.kv_bytes_per_token == whole.kv_bytes_per_token // 2
    assert half.slot_bytes == whole.slot_bytes // 2
    assert many.kv_bytes_per_token == whole.kv_bytes_per_token // 8  # of 8 KV heads none is cut


def test_a_draft_has_rows_even_where_there_are_few_slots():
    flags = {"max_running_requests": 2, "speculative_algorithm": "ngram", "speculative_num_draft_tokens": 5}
    assert max(shape.num_rows for shape in draw(LAPTOP, **flags).ladder.shapes) == 6
    flags["speculative_algorithm"] = "none"
    assert max(shape.num_rows for shape in draw(LAPTOP, **flags).ladder.shapes) == 2


@NEEDS_JAX_011
def test_what_is_packed_in_four_bits_stays_so_where_a_kernel_reads_it():
    sketch = draw(H200, packing=AWQ).sketch
    assert (sketch.precision.quantization, sketch.checkpoint.kernels.reads_int4) == ("int4", True)
    assert sketch.unpacks_because == ""
    num_matrices = sum(spec.group_size == 128 for spec in sketch.specs)
    assert num_matrices == 4 * sketch.cfg.num_layers
    assert sketch.param_bytes < draw(H200, packing=AWQ, quantization="int8").sketch.param_bytes
    assert draw(H200, packing=AWQ, quantization="none").sketch.precision.quantization == "none"
    assert draw(H200).sketch.precision.quantization == "none"


@pytest.mark.parametrize(
    ("machine", "packing", "reason"),
    [
        (A100, AWQ, "no kernel reads them here"),
        (V5E, AWQ, "no kernel reads them here"),
        (H200, {**AWQ, "quant_method": "gptq", "desc_act": True}, "desc_act"),
        pytest.param(H200, {**AWQ, "group_size": 32}, "groups of 64", marks=NEEDS_JAX_011),
    ],
)
def test_elsewhere_it_is_unpacked_and_the_reason_is_told(machine, packing, reason):
    sketch = draw(machine, packing=packing).sketch
    assert sketch.precision.quantization == "none"
    assert reason in sketch.unpacks_because
    assert not sketch.checkpoint.group_sizes


def test_who_asks_for_four_bits_that_cannot_be_served_is_told_why():
    packing = {**AWQ, "quant_method": "gptq", "desc_act": True}
    with pytest.raises(ConfigError, match=r"int4 cannot serve qwen2.5-0.5b on 1 device: .*desc_act"):
        draw(LAPTOP, packing=packing, quantization="int4")


def test_a_model_that_is_not_served_is_refused_by_name(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OddModel"]}))
    with pytest.raises(WeightError, match="architecture OddModel is not served"):
        draw(LAPTOP, str(folder))
