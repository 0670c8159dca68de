"""The benchmark of images beside text: its ratios, and a short run against a server that sees."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scripts.bench_images import MIXED, TEXT, compare
from scripts.serving_client import Target
from scripts.serving_workload import Request
from tests import tiny_vl
from tests.e2e.served import serve
from tests.source_tree import ROOT


def test_a_request_with_images_is_a_message_of_parts():
    target = Target(base_url="", route="chat")
    text, image = (
        target.make_body(Request(prompt="Hi", num_output_tokens=3, image_urls=urls))["messages"][0]["content"]
        for urls in ((), ("data:x",))
    )
    assert text == "Hi"
    assert image == [
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "text", "text": "Hi"},
    ]


def test_ratios_are_medians_of_those_of_the_rounds():
    def figures(*times_ms: float) -> list[dict[str, float]]:
        return [dict.fromkeys(("itl_mean_ms", "itl_p50_ms", "itl_p99_ms"), time_ms) for time_ms in times_ms]

    assert set(compare({TEXT: figures(10, 20, 10), MIXED: figures(11, 30, 20)}).values()) == {1.5}


@pytest.mark.slow
def test_it_measures_a_server(tmp_path):
    folder = tiny_vl.write_tiny_vl_checkpoint(tmp_path / "vl")
    flags = ("--dtype", "float32", "--max-total-tokens", "8k", "--max-running-requests", "8")
    with serve("--model-path", str(folder), *flags, "--max-image-pixels", "50176") as server:
        command = [sys.executable, str(ROOT / "scripts" / "bench_images.py"), "--base-url", server.url]
        sizes = ["--streams", "6", "--image-streams", "2", "--image-side", "112", "--output-tokens", "8"]
        done = subprocess.run(
            [*command, *sizes, "--seconds", "2", "--repeats", "2"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [len(report["runs"][name]) for name in (TEXT, MIXED)] == [2, 2]
    mixed = report["runs"][MIXED][0]
    assert mixed["images_per_s"] > 0
    assert mixed["itl_p50_ms"] > 0
    assert mixed["image_prompt_tokens"] > 16  # 112 pixels are 16 tokens
