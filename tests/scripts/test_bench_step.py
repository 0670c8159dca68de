"""bench_step.py on a tiny model: it measures what it was asked for, and counts the work as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxserve.runner.xla_flags import untried_settings
from scripts.bench_step import FailedStep, run_all

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny"


def test_each_program_is_measured_and_its_work_counted():
    command = [sys.executable, "scripts/bench_step.py", "--model-path", str(TINY), "--dtype", "float32"]
    command += ["--rows", "1", "3", "--context", "70", "--prefill", "64"]
    command += ["--kv-cache-dtype", "float32", "--copy-mib", "8", "--matmul-width", "128"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    one, three, prefill = report["steps"]
    assert [step["shape"] for step in report["steps"]] == ["1 row", "3 rows", "64 tokens"]
    assert all(step["step_ms"] > 0 and step["copy_share"] > 0 for step in report["steps"])
    hf = json.loads((TINY / "config.json").read_text())
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    kv_bytes = 2 * 4 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * head_dim
    assert three["bytes"] - one["bytes"] == 2 * 70 * kv_bytes
    # Rows share the weights' bytes, not their FLOPs; a prefill computes the head for one token only.
    assert three["flops"] == 3 * one["flops"]
    assert 16 < prefill["flops"] / one["flops"] < 64


def test_a_setting_that_is_refused_costs_no_other():
    """Of XLA's settings each is new to a card; the next ones are measured all the same."""
    bench: Any = SimpleNamespace(
        tried_options={}, describe_options=lambda: next(iter(bench.tried_options), "")
    )

    def run_decode(num_rows: int, ceilings: Any) -> str:
        if bench.tried_options == untried_settings()[0].options:
            raise RuntimeError("no such flag")
        return bench.describe_options()

    bench.run_decode = run_decode
    arguments = Namespace(rows=[1], prefill=[], try_xla_flags=True)
    plain, refused, *others = run_all(bench, arguments, ceilings=None)  # type: ignore[arg-type]
    assert plain == ""
    assert isinstance(refused, FailedStep)
    assert refused.failed == "RuntimeError: no such flag"
    assert others == [next(iter(setting.options)) for setting in untried_settings()[1:]]
