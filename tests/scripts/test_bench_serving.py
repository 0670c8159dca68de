"""The serving benchmark's figures, and the benchmark itself against a server with the fake engine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from jaxserve.utils import find_free_port
from scripts.bench_serving import is_good, parse_arguments, percentile, report_level, summarise
from scripts.serving_client import Outcome, note_event
from tests.source_tree import ROOT

READY_TIMEOUT_S = 120
STEP_MS = 5
MAX_PROMPT_TOKENS = 400  # of the server; a token is a byte


def make_outcome(ttft_s: float, gaps_s: list[float], begin_s: float = 100.0) -> Outcome:
    last_s = begin_s + ttft_s + sum(gaps_s)
    return Outcome(
        begin_s=begin_s,
        first_s=begin_s + ttft_s,
        last_s=last_s,
        end_s=last_s,
        gaps_s=gaps_s,
        num_prompt_tokens=10,
        num_output_tokens=len(gaps_s) + 1,
    )


def test_percentiles_lie_between_ranks():
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([7.0], 0.99) == 7.0
    assert summarise([]) is None
    assert summarise([0.001, 0.003]) == {"p50": 2.0, "p90": 2.8, "p99": 2.98, "mean": 2.0}


def test_a_failed_request_is_counted_by_its_kind_and_in_no_latency():
    slow = make_outcome(9.0, [9.0])
    slow.error = "cut_off"
    fine = [make_outcome(0.1, [0.02, 0.04]), make_outcome(0.3, [0.02])]
    lost = [Outcome(begin_s=0.0, error="http_429"), Outcome(begin_s=0.0, error="cancelled")]
    level = report_level(4.0, [*fine, slow, *lost], elapsed_s=2.0, limits_s={})
    assert (level["num_requests"], level["num_completed"], level["num_failed"]) == (5, 2, 2)
    assert level["num_cancelled"] == 1
    assert level["errors"] == {"cut_off": 1, "http_429": 1}
    assert (level["requests_per_s"], level["output_tokens_per_s"], level["goodput"]) == (1.0, 2.5, None)
    assert level["ttft_ms"]["p50"] == pytest.approx(200)
    assert level["itl_ms"]["p50"] == pytest.approx(20)


def test_goodput_counts_replies_that_kept_every_limit():
    quick, late, halting = make_outcome(0.1, [0.01] * 4), make_outcome(0.9, [0.01]), make_outcome(0.1, [0.5])
    limits_s = {"ttft": 0.5, "itl": 0.05}
    assert [is_good(outcome, limits_s) for outcome in (quick, late, halting)] == [True, False, False]
    level = report_level(math.inf, [quick, late, halting], elapsed_s=0.5, limits_s=limits_s)
    assert (level["request_rate"], level["goodput"]) == (None, 2.0)


def test_the_server_counts_tokens_and_events_without_text_are_no_tokens():
    outcome = Outcome(begin_s=0.0)
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "two words"}}]},
        {"choices": [{"delta": {"content": "!"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
    ]
    for order, chunk in enumerate(chunks):
        note_event(chunk, outcome, float(order))
    assert (outcome.ttft_s, outcome.gaps_s) == (1.0, [1.0])
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (7, 3)


def test_a_limit_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--goodput", "ttft=500"])
    assert "ttft=500" in capsys.readouterr().err


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose engine takes four requests at a time."""
    port = find_free_port("127.0.0.1")
    flags = ["--step-ms", str(STEP_MS), "--max-rows", "4", "--config", "tiny.yaml", "--port", str(port)]
    limits = ["--max-prompt-tokens", str(MAX_PROMPT_TOKENS), "--log-level", "warning"]
    command = [sys.executable, str(ROOT / "scripts/fake_engine.py"), *flags, *limits]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_healthy(port):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def is_healthy(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    return False


def start_bench(url: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/bench_serving.py"), "--base-url", url, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_report(bench: subprocess.Popen[str]) -> dict:
    output, _ = bench.communicate(timeout=60)
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("route", ["completions", "chat", "generate"])
def test_each_rate_is_a_level_of_the_last_line(url, route):
    flags = ["--num-requests", "6", "--input-tokens", "10", "--output-tokens", "5", "--goodput", "e2e:60000"]
    report = read_report(start_bench(url, "--route", route, "--request-rates", "20", "40", *flags))
    assert [level["request_rate"] for level in report["levels"]] == [20, 40]
    for level in report["levels"]:
        assert (level["num_completed"], level["num_failed"]) == (6, 0)
        assert level["goodput"] == level["requests_per_s"]
        assert level["output_tokens_per_s"] == pytest.approx(5 * level["requests_per_s"], rel=0.01)
        assert {"p50", "p90", "p99"} <= set(level["ttft_ms"]) & set(level["itl_ms"]) & set(level["e2e_ms"])


def test_what_the_server_refuses_shows_in_the_report(url):
    flags = ["--num-requests", "20", "--input-tokens", "150", "--spread", "0.9", "--output-tokens", "2"]
    [level] = read_report(start_bench(url, *flags))["levels"]
    assert level["num_completed"] + level["num_failed"] == 20
    assert 0 < level["errors"]["http_400"] == level["num_failed"] < 20


def test_an_interrupt_ends_with_what_was_measured(url):
    flags = ["--num-requests", "500", "--input-tokens", "10", "--output-tokens", "2"]
    bench = start_bench(url, "--request-rates", "4", *flags)
    assert bench.stdout is not None
    while not bench.stdout.readline().startswith("|---"):
        assert bench.poll() is None
    time.sleep(1.5)
    bench.send_signal(signal.SIGINT)
    report = read_report(bench)
    [level] = report["levels"]
    assert report["interrupted"] is True
    assert level["num_completed"] >= 1
    assert level["num_failed"] == 0
    assert level["num_completed"] + level["num_cancelled"] == 500


def test_a_wrong_address_is_a_sentence(url):
    bench = start_bench(f"{url}/nowhere")
    output, _ = bench.communicate(timeout=60)
    assert bench.returncode != 0
    assert "http_404. Check --base-url" in output
