"""XLA's settings: nothing is chosen that was not measured, and the compiler knows every one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxserve.runner.xla_flags import NOT_MEASURED, SETTINGS, XlaSetting, chosen_options
from tests.kernels.h200 import compile_for_h200
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, device_kind


def test_only_what_was_measured_is_chosen():
    assert [setting for setting in SETTINGS if setting.is_chosen and setting.measured == NOT_MEASURED] == []


def test_a_setting_is_for_its_platform(monkeypatch):
    setting = XlaSetting(platform="gpu", options={"a": 1}, why="", measured="once", is_chosen=True)
    monkeypatch.setattr("jaxserve.runner.xla_flags.SETTINGS", (setting,))
    assert (chosen_options("gpu"), chosen_options("cpu")) == ({"a": 1}, {})


def test_some_are_for_chips_and_for_programs_in_halves():
    of_all, of_halves = chosen_options("tpu"), chosen_options("tpu", "TPU7x", is_halved=True)
    of_v5e = chosen_options("tpu", "TPU v5 lite", is_halved=True)
    assert chosen_options("tpu", "TPU v5 lite") == of_all
    assert of_v5e.items() > of_halves.items() > of_all.items()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting.options)))
def test_its_compiler_knows_it(setting):
    x = jnp.ones((64, 64))
    if setting.platform == "gpu":
        assert compile_for_h200(lambda x: x @ x, x, compiler_options=setting.options).hlo
    else:
        chips = [chip for chip in TOPOLOGIES if device_kind(chip) in setting.device_kinds] or ["v5e"]
        for chip in chips:
            assert compile_for_tpu(chip, lambda x: x @ x, x, compiler_options=setting.options).hlo


def test_an_option_that_xla_does_not_know_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_no_such_flag": 1}).lower(1.0).compile()
