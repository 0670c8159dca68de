"""Parameters of all layers in one array: the same values as apart, on the host and on the device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models import qwen2
from jaxserve.weights.loader import make_dummy_params
from jaxserve.weights.placement import ALONE
from jaxserve.weights.served import describe_params
from jaxserve.weights.stacks import LayerStacks, describe_stacks, stacked_path
from tests.tiny import TINY_CONFIGS

CFG = qwen2.Config.from_hf(TINY_CONFIGS["qwen2"])
SPECS = qwen2.param_specs(CFG)
PLACES = {"device": ALONE.put, "host": lambda path, array, axes: array}


def flat(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("place", PLACES)
def test_a_stack_holds_every_layer_in_its_place(place, quantization):
    stacks = LayerStacks(PLACES[place], CFG.num_layers)
    precision = {"dtype": "bfloat16", "quantization": quantization}
    stacked = flat(stacks.collect(make_dummy_params(SPECS, **precision, put=stacks.put)))
    apart = flat(make_dummy_params(SPECS, **precision))
    assert len(stacked) < len(apart)
    for name, value in apart.items():
        path, quote, rest = name.removeprefix("['").partition("'")
        stack = stacked[f"['{stacked_path(path)}{quote}{rest}"]
        here = stack[int(path.split(".")[1])] if path.startswith("layers.") else stack
        np.testing.assert_array_equal(here, value)


def test_what_is_described_is_what_is_made():
    described = describe_stacks(describe_params(SPECS, dtype="bfloat16", quantization="int8"), CFG.num_layers)
    stacks = LayerStacks(ALONE.put, CFG.num_layers)
    made = stacks.collect(make_dummy_params(SPECS, dtype="bfloat16", quantization="int8", put=stacks.put))
    assert jax.tree.structure(made) == jax.tree.structure(described)
    for leaf, shape in zip(jax.tree.leaves(made), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_layers_are_freed_as_they_are_stacked_and_stacks_when_told():
    placed = []

    def put(path, array, axes):
        placed.append(ALONE.put(path, array, axes))
        return placed[-1]

    stacks = LayerStacks(put, CFG.num_layers)
    made = stacks.collect(make_dummy_params(SPECS, dtype="float32", put=stacks.put))
    alive = [array for array in placed if not array.is_deleted()]
    assert len(alive) == len([spec for spec in SPECS if not spec.path.startswith("layers.")])
    stacks.delete()
    assert made["layers.w_o_DF"].is_deleted()


def test_layers_that_are_cut_over_devices_are_stacked_without_moving_them():
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    cut = NamedSharding(mesh, PartitionSpec("tensor", None))
    stacks = LayerStacks(lambda path, array, axes: jax.device_put(array, cut), CFG.num_layers)
    for layer in range(CFG.num_layers):
        stacks.put(f"layers.{layer}.w_o_DF", np.full((4, 3), layer, np.float32), ("heads", None))
    place = stacks.put("layers.0.w_o_DF", np.zeros((4, 3), np.float32), ("heads", None))
    stack = stacks.collect({"layers.0.w_o_DF": place})["layers.w_o_DF"]
    assert stack.sharding.spec == PartitionSpec(None, "tensor", None)
    np.testing.assert_array_equal(np.asarray(stack)[:, 0, 0], range(CFG.num_layers))
