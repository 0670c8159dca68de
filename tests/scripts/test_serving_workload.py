"""What the serving benchmark asks: drawn from a seed, at the rate that was asked for, or as recorded."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from scripts.serving_workload import (
    Request,
    arrive_at_random,
    make_random,
    make_shared_prefix,
    rate_of,
    read_trace,
    stretch,
    write_tiny_trace,
)
from tests.source_tree import ROOT

TINY_TRACE = ROOT / "benchmarks" / "traces" / "tiny.jsonl"


def test_a_seed_gives_the_same_requests_and_another_one_others():
    lengths = {"input_tokens": 40, "output_tokens": 20, "spread": 0.5}
    first, again, other = (make_random(50, **lengths, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert not {request.prompt for request in first} & {request.prompt for request in other}
    assert {len(request.prompt.split()) for request in first} <= set(range(20, 41))
    assert {request.num_output_tokens for request in first} <= set(range(10, 21))


def test_arrivals_are_a_poisson_process_of_the_rate():
    requests = [Request(prompt="x", num_output_tokens=1)] * 4001
    timed = arrive_at_random(requests, 5.0, seed=1)
    gaps_s = [later.due_s - earlier.due_s for earlier, later in pairwise(timed)]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
    assert timed[0].due_s == 0
    assert mean_s == pytest.approx(0.2, rel=0.05)
    assert math.sqrt(variance) == pytest.approx(mean_s, rel=0.05)  # as of an exponential distribution
    assert {request.due_s for request in arrive_at_random(requests, math.inf, seed=1)} == {0.0}


def test_requests_of_a_group_share_their_beginning_and_nothing_else():
    requests = make_shared_prefix(
        40, num_groups=3, prefix_tokens=100, input_tokens=10, output_tokens=5, spread=0.0, seed=3
    )
    parts = [request.prompt.split("\n") for request in requests]
    assert {len(prefix.split()) for prefix, _ in parts} == {100}
    assert len({prefix for prefix, _ in parts}) == 3
    assert len({question for _, question in parts}) == 40


def test_a_recording_is_read_in_order_of_arrival_and_may_be_played_faster(tmp_path):
    lines = [
        {"arrival_s": 12.0, "prompt_tokens": 30, "output_tokens": 4},
        {"arrival_s": 10.0, "prompt": "as it was", "output_tokens": 8},
        {"arrival_s": 14.0, "prompt_tokens": 5, "output_tokens": 2},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    requests = read_trace(path, seed=0)
    assert [(request.due_s, request.num_output_tokens) for request in requests] == [(0, 8), (2, 4), (4, 2)]
    assert requests[0].prompt == "as it was"
    assert len(requests[1].prompt.split()) == 30
    assert rate_of(requests) == 0.5
    assert [request.due_s for request in stretch(requests, 2.0)] == [0, 0.5, 1]


def test_a_line_that_is_no_request_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 0, "prompt_tokens": 3, "output_tokens": 4}\n{"arrival_s": 1}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*trace\.jsonl"):
        read_trace(path, seed=0)


def test_the_bundled_trace_is_what_the_script_writes():
    written: list[str] = []
    write_tiny_trace(written.append)
    assert TINY_TRACE.read_text().splitlines() == written
    assert len(read_trace(TINY_TRACE, seed=0)) == 60
