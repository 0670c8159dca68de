"""What `--topology` may say, and how a model is cut over a slice."""

from __future__ import annotations

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.planning.chips import CHIPS, GIB
from jaxserve.planning.shapes import find_model, list_shapes, shape_name
from jaxserve.planning.slices import choose_tp_size, list_slices
from jaxserve.runner.checkpoint import read_family


def names(*words: str) -> list[str]:
    return [str(where) for where in list_slices(words)]


def test_slices_are_named_one_by_one_by_chip_or_all():
    assert names("v5e:4x4") == ["v5e:4x4"]
    assert names("v5e:2x2,h200:8", "v5p:2x2x2") == ["v5e:2x2", "h200:8", "v5p:2x2x2"]
    assert names("h200", "h200:2") == ["h200:1", "h200:2", "h200:4", "h200:8"]
    assert {name.partition(":")[0] for name in names("all")} == {chip.name for chip in CHIPS}


def test_devices_are_what_jax_shows():
    (v5e,), (tpu7x,) = list_slices(["v5e:4x8"]), list_slices(["tpu7x:2x2x1"])
    assert (v5e.num_chips, v5e.num_devices) == (32, 32)
    assert (tpu7x.num_chips, tpu7x.num_devices) == (4, 8)


def test_a_copy_is_launched_on_a_slice_that_it_fills():
    (large,) = list_slices(["v5e:16x16"])
    assert [str(large.find_part(count)) for count in (1, 2, 16, 32)] == [
        "v5e:1x1",
        "v5e:2x2",
        "v5e:4x4",
        "v5e:4x8",
    ]
    assert large.find_part(256) == large


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("v5", "is of no chip that is known .* Did you mean v5"),
        ("v5e:4by4", "is no grid of chips"),
        ("v5e:2x2x2", "has 2 axes"),
        ("h200:2x4", "has 1 axis"),
        ("v5e:0x4", "is no grid of chips"),
    ],
)
def test_what_is_no_slice_is_refused(word: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        list_slices([word])


@pytest.mark.parametrize(
    ("model", "num_devices", "tp_size"),
    [
        ("qwen2.5-7b", 4, 4),
        ("qwen2.5-7b", 16, 4),  # 28 heads
        ("qwen2.5-0.5b", 4, 2),  # 14 heads
        ("qwen2.5-72b", 16, 16),  # 8 KV heads: each on two devices
        ("llama-3-70b", 256, 64),
        ("llama-3-8b", 1, 1),
    ],
)
def test_a_layer_is_shared_by_as_many_devices_as_its_heads_and_tensors_allow(model, num_devices, tp_size):
    config = ServerConfig(model_path=model)
    family, cfg = read_family(model, find_model(config))
    assert choose_tp_size(cfg, family.param_specs(cfg), num_devices) == tp_size


def test_chips_are_told_in_the_units_that_they_claim():
    for chip in CHIPS:
        assert 10 * GIB < chip.hbm_bytes < 200 * GIB
        assert 0.5e12 < chip.hbm_bytes_per_s < 10e12
        assert chip.bf16_flops <= chip.int8_flops
        assert all(len(size.split("x")) == chip.num_axes for size in chip.slices)


def test_shapes_ship_for_what_people_ask_for():
    hub_ids = ["Qwen/Qwen2.5-72B-Instruct", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-0.5B"]
    hub_ids.append("Qwen/Qwen2.5-VL-7B-Instruct")
    assert {shape_name(hub_id) for hub_id in hub_ids} <= set(list_shapes())
