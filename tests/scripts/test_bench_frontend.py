"""The benchmark of the HTTP side alone, in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs /proc for the server's CPU time")
def test_every_stream_gets_all_its_tokens_and_the_server_is_charged_for_them():
    command = [sys.executable, str(ROOT / "scripts/bench_frontend.py"), "--config", "tiny.yaml"]
    flags = ["--streams", "4", "--tokens", "30", "--step-ms", "5", "--route", "chat"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    bench = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=120)
    assert bench.returncode == 0, bench.stderr
    report = json.loads(bench.stdout.splitlines()[-1])
    [run] = report["runs"]
    assert (run["failed"], run["offered_tokens_per_s"]) == (0, 800)
    assert run["tokens_per_s"] > 0
    assert 0 < run["events_per_token"] <= 33 / 30  # the role, the finish and the usage are events too
    assert run["us_per_token"] * run["tokens_per_cpu_s"] == pytest.approx(1e6, rel=0.01)
