"""bench_kernels.py on the reference forms, which run anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--calls", "1", "--copy-mib", "8", "--matmul-width", "128"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/bench_kernels.py", *words, *SMALL]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_kernel_is_timed_and_its_bytes_are_those_of_the_shape():
    done = run("--form", "xla", "--groups", "sampling", "--only", "1 row")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    (row,) = report["kernels"]
    assert row["case"] == "top-k 50, top-p 0.9, 1 row"
    assert abs(row["tb_per_s"] * row["us"] * 1e6 - 4 * 151936) < 1  # one read of the logits
    assert report["form"] == "xla"


def test_without_a_gpu_it_says_so():
    done = run("--groups", "sampling")
    assert done.returncode == 1
    assert "There is no GPU here" in done.stderr
