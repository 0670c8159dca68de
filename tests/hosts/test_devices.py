"""Which devices each of several engine processes sees."""

from __future__ import annotations

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.hosts.devices import divide_devices


def divide(dp_size: int, tp_size: int = 1, num_gpus: int = 0, num_tpus: int = 0, **environ: str):
    config = ServerConfig(model_path="m", dp_size=dp_size, tp_size=tp_size)
    return divide_devices(config, environ, num_gpus, num_tpus)


def test_a_single_engine_sees_what_we_see():
    assert divide(1, tp_size=2, num_gpus=8, CUDA_VISIBLE_DEVICES="4,5") == [{}]


def test_gpus_are_cut_in_order_out_of_those_that_we_see():
    assert divide(2, 2, num_gpus=8) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    shares = divide(2, num_gpus=8, CUDA_VISIBLE_DEVICES="7, GPU-ab,3")
    assert shares == [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "GPU-ab"}]


def test_tpu_chips_are_cut_with_all_that_libtpu_wants_to_know():
    first, second = divide(2, 2, num_tpus=4)
    assert (first["TPU_VISIBLE_CHIPS"], second["TPU_VISIBLE_CHIPS"]) == ("0,1", "2,3")
    assert {share["TPU_CHIPS_PER_PROCESS_BOUNDS"] for share in (first, second)} == {"1,2,1"}
    assert first["TPU_PROCESS_PORT"] != second["TPU_PROCESS_PORT"]
    with pytest.raises(ConfigError, match="needs a tp_size of 1, 2, 4, 8, got 3"):
        divide(2, 3, num_tpus=8)


def test_a_cpu_is_not_cut_whatever_else_the_machine_has():
    assert divide(3) == [{}, {}, {}]
    assert divide(3, num_gpus=1, JAX_PLATFORMS="cpu") == [{}, {}, {}]


def test_more_engines_than_there_are_devices_for_are_refused():
    sentence = "dp_size 2 with tp_size 4 needs 8 GPUs, and this process sees 4"
    with pytest.raises(ConfigError, match=sentence):
        divide(2, 4, num_gpus=4)
    with pytest.raises(ConfigError, match="needs 2 GPUs, and this process sees 1"):
        divide(2, num_gpus=8, CUDA_VISIBLE_DEVICES="3")
