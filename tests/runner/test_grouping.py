"""Which matrices are served in 4 bits, from names or words alone, and what is told where they cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import WeightError
from jaxserve.models import qwen2
from jaxserve.planning.shapes import find_model
from jaxserve.runner.checkpoint import read_family
from jaxserve.runner.grouping import GROUP_SIZE, find_grouping, find_grouping_limit, mark_groups
from jaxserve.weights.resolve import ModelFiles, resolve_model
from tests.weights.packed_files import write_packed_model

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def find_7b(**quantization) -> tuple[ModelFiles, list]:
    """A config.json of that size without weights."""
    files = find_model(ServerConfig(model_path="qwen2.5-7b"))
    words = {"quantization_config": quantization} if quantization else {}
    return replace(files, hf_config=files.hf_config | words), qwen2.param_specs(read_family("m", files)[1])


def test_the_names_in_the_files_say_what_is_packed(tmp_path: Path):
    write_packed_model(tmp_path, "awq")
    files = resolve_model(str(tmp_path), on_progress=lambda *_: None)
    specs = read_family("m", files)[0].param_specs(read_family("m", files)[1])
    grouping = find_grouping(files, specs)
    assert grouping.is_packed
    assert sorted(grouping.group_sizes) == sorted(
        spec.path for spec in specs if spec.kind == "matrix" and spec.path != "head_VD"
    )
    assert set(grouping.group_sizes.values()) == {32}


def test_without_files_the_config_says_it():
    files, specs = find_7b(**AWQ, modules_to_not_convert=["layers.3.", "k_proj.bias"])
    sizes = find_grouping(files, specs).group_sizes
    assert "head_VD" not in sizes
    assert "layers.3.w_o_DF" not in sizes
    assert sizes["layers.4.w_qkv_FD"] == 128
    files, specs = find_7b(**AWQ | {"group_size": -1})
    assert find_grouping(files, specs).group_sizes["layers.0.w_down_DF"] == 18944


def test_what_is_not_packed_is_put_in_groups_but_for_embedding_and_head():
    files, specs = find_7b()
    grouping = find_grouping(files, specs)
    assert not grouping.is_packed
    assert len(grouping.group_sizes) == 4 * 28
    assert set(grouping.group_sizes.values()) == {GROUP_SIZE}


def test_an_order_of_inputs_is_a_limit_and_other_bits_are_an_error():
    files, specs = find_7b(quant_method="gptq", bits=4, group_size=128, desc_act=True)
    assert "desc_act" in find_grouping(files, specs).limit
    files, specs = find_7b(quant_method="gptq", bits=3)
    with pytest.raises(WeightError, match="of 3 bits"):
        find_grouping(files, specs)


@pytest.mark.parametrize(
    ("num_devices", "group_size", "by_kernel", "limit"),
    [
        (1, 128, True, ""),
        (4, 128, True, ""),
        (2, 18944, True, ""),  # one group a row is cut into one on each device
        (
            8,
            128,
            True,
            "of layers.0.w_down_DF, 4-bit matrices want inputs in 128s and in whole groups, not 2368",
        ),
        (1, 32, False, ""),
        (1, 32, True, "want groups of 64 or multiples of 128 inputs, not 32"),
    ],
)
def test_a_cut_must_leave_whole_runs_and_groups(num_devices, group_size, by_kernel, limit):
    files, specs = find_7b()
    sizes = {"layers.0.w_down_DF": group_size, "layers.0.w_gate_up_FD": min(group_size, 3584)}
    division = qwen2.divide(read_family("m", files)[1], num_devices)
    found = find_grouping_limit(division.cut_specs(mark_groups(specs, sizes)), by_kernel=by_kernel)
    assert limit in found
    assert bool(limit) == bool(found)
