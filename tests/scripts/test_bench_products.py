"""bench_products.py in XLA's form, which runs anywhere, and in the kernel's, compiled for TPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from scripts.bench_products import SHAPES, choose_form, describe_operands, run_layers
from tests.kernels.tpu import compile_for_tpu, device_kind

ROOT = Path(__file__).parents[2]


def test_it_prints_a_table_and_one_line_of_json():
    words = ["--form", "xla", "--layers", "1", "--only", "0.5B", "--rows", "2"]
    command = [
        sys.executable,
        "scripts/bench_products.py",
        *words,
        "--copy-mib",
        "8",
        "--matmul-width",
        "128",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, last_row, line = done.stdout.splitlines()
    assert last_row.startswith("| 0.5B on one | 2 | xla |")
    (found,) = json.loads(line)["products"]
    assert found["gb_per_s"] == pytest.approx(SHAPES[0].layer_bytes / found["layer_us"] / 1e3)


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_kernel_compiles_for_every_shape(chip, shape):
    kernels = choose_form("pallas", device_kind(chip))
    report = compile_for_tpu(
        chip, partial(run_layers, kernels, shape.q_width), describe_operands(shape, 8, num_layers=2)
    )
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == (4 if chip == "v5p" else 3)
    assert report.temp_bytes < min(outputs * inputs for outputs, inputs in shape.matrices.values())
