"""What a launch would decide on machines that are not here: the one place where plan and launch agree."""

from __future__ import annotations

import json
import math

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from jaxserve.blueprint import BYTES_PER_EDIT, Blueprint, draw_blueprint, sketch_model
from jaxserve.config import ServerConfig
from jaxserve.errors import WeightError
from jaxserve.models.sharding import TENSOR
from jaxserve.planning.shapes import find_model
from jaxserve.runner.device_state import make_state
from jaxserve.runner.sizing import GIB, Machine
from jaxserve.weights.placement import Placement
from tests.tiny import write_tiny_checkpoint

LAPTOP = Machine(platform="cpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=10 * GIB)
V5E = Machine(platform="tpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=16 * GIB)


def draw(machine: Machine, model_path: str = "qwen2.5-0.5b", **flags) -> Blueprint:
    config = ServerConfig(model_path=model_path, **flags)
    return draw_blueprint(config, find_model(config), machine)


def test_the_bytes_are_those_of_the_arrays_that_would_be_made():
    blueprint = draw(V5E)
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


def test_a_model_that_is_not_served_is_refused_by_name(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OddModel"]}))
    with pytest.raises(WeightError, match="architecture OddModel is not served"):
        draw(LAPTOP, str(folder))
