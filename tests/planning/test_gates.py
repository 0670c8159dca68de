"""Programs of real models for real slices, by the TPU's own compiler: small, in place, near the roofline.

Some of the slices of `scripts/compile_slices.py`, whose table for all is benchmarks/tpu.md. Seconds are not
asserted, as they are this machine's. Each is a process of its own, as the command is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


# The goals are 10 MB and 1.3; programs that are larger are faster for it (runner/xla_flags.py), those of
# prefill as sums go on within products of theirs. A tpu7x likes weights in other tiles than they come in, and
# must not copy them.
@pytest.mark.parametrize(
    ("model", "slice_name", "most_code_bytes", "most_times_roofline", "hides_sums"),
    [
        ("qwen2.5-0.5b", "v5e:2x2", 11e6, 1.2, False),
        ("qwen2.5-7b", "v5e:2x2", 16e6, 1.05, True),
        ("llama-3-8b", "v5e:2x2", 17.5e6, 1.1, True),
        ("qwen2.5-72b", "v5p:2x2x2", 14e6, 1.15, False),
        ("llama-3-8b", "v6e:4x4", 10e6, 1.15, False),
        ("llama-3-8b", "tpu7x:2x2x1", 10e6, 1.15, True),
        ("llama-3-8b", "v4:2x2x2", 10e6, None, False),  # a quarter of the others' VMEM; no estimate
    ],
)
def test_programs_are_small_write_in_place_and_are_near_the_roofline(
    tmp_path, model, slice_name, most_code_bytes, most_times_roofline, hides_sums
):
    path = tmp_path / "programs.jsonl"
    words = ["--models", model, "--slices", slice_name, "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "scripts.compile_slices", *words]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    programs = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(programs) == 3
    for program in programs:
        assert program["problem"] == ""
        assert program["code_bytes"] <= most_code_bytes
        assert program["alias_bytes"] >= program["state_bytes"]  # the pool's, and the sampling state's
        assert program["largest_copy_bytes"] < 33e6  # no layer's weights or pool; the logits of 256 rows
        assert program["temp_bytes"] < 400e6  # nor of what a tpu7x has its sparse cores copy
        assert set(program["collectives"]) <= {"all-reduce", "all-gather"}
    fewest_rows, _, prefill = programs
    if most_times_roofline is not None:
        assert fewest_rows["estimate_s"] <= most_times_roofline * fewest_rows["roofline_s"]
    if hides_sums:
        assert len(prefill["sum_gaps_s"]) == 4  # two of each half, of a layer
        assert min(prefill["sum_gaps_s"]) > 20e-6
        assert prefill["estimate_s"] <= 1.35 * prefill["roofline_s"]
