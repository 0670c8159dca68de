"""Pictures of results: what is read from them, where labels go, and that there is a picture."""

from __future__ import annotations

import json

import pytest

from scripts import plot_bench
from scripts.plot_bench import kind_of, read_latency, read_report, read_throughput, spread


def run(num_sequences: int, decode_tps: float | None) -> dict:
    figures = {"decode_tps": decode_tps, "prefill_tps": 10.0 * num_sequences}
    return {"num_sequences": num_sequences, "num_prompt_tokens": 128, **figures}


MACHINE = {"cpu": "A CPU", "cores": "2", "jax": "0.12", "commit": "abc1234", "date": "2026-11-22"}
PEERS = {
    "machine": MACHINE,
    "model": "some/model.gguf",
    "workers": {"jaxserve int8": {"ready": {}}, "llama.cpp Q8_0": {"ready": {"version": "0.3"}}},
    "runs": {
        "jaxserve int8": [run(8, 90.0), run(1, 10.0), run(1, 30.0), run(8, 100.0), run(32, None)],
        "llama.cpp Q8_0": [run(1, 40.0), run(8, 40.0)],
    },
}
OFFLINE = {"machine": MACHINE, "model": "m", "precisions": {"int8": {"runs": [run(1, 10.0)]}}}
SERVING = {
    "machine": MACHINE,
    "model": "m",
    "levels": [
        {
            "request_rate": rate,
            "ttft_ms": {"p50": 100 * rate, "p99": 300 * rate},
            "itl_ms": {"p50": 40 + rate, "p99": 60 + rate},
            "goodput": min(rate, 1.5),
        }
        for rate in (2.0, 1.0)
    ]
    + [{"request_rate": None, "ttft_ms": {"p50": 9.0, "p99": 9.0}, "goodput": None}],  # all at once
}


def test_throughput_is_medians_in_order_of_sequences():
    series = read_throughput(PEERS, 128, "decode_tps")
    assert series["jaxserve int8"] == [(1.0, 20.0), (8.0, 95.0)]  # 32 was not measured
    assert read_throughput(PEERS, 512, "decode_tps") == {}
    assert read_throughput(OFFLINE, 128, "decode_tps") == {"jaxserve int8": [(1.0, 10.0)]}


def test_latency_is_in_order_of_load():
    assert read_latency(SERVING, "ttft_ms", "p99") == [(1.0, 300.0), (2.0, 600.0)]
    assert read_latency(SERVING, "goodput", "") == [(1.0, 1.0), (2.0, 1.5)]
    assert read_latency(SERVING, "e2e_ms", "p50") == []


def test_labels_move_apart_and_no_further():
    assert spread([10, 50, 90], 11) == [10, 50, 90]
    assert spread([20, 20, 100], 10) == [15, 25, 100]
    assert spread([100, 21, 20, 19], 10) == [100, 30, 20, 10]


def test_only_results_are_drawn(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text("| a table |\n" + json.dumps(SERVING) + "\n", encoding="utf-8")
    assert kind_of(read_report(path)) == "latency"
    path.write_text("| a table |\n", encoding="utf-8")
    with pytest.raises(ValueError, match="last line"):
        read_report(path)
    with pytest.raises(ValueError, match="neither"):
        kind_of({"rows": []})
    with pytest.raises(ValueError, match="draw them apart"):
        plot_bench.check_kinds([PEERS, SERVING])


def test_results_without_a_machine_say_what_was_asked_for():
    assert "A CPU, 2 cores" in plot_bench.describe(PEERS)
    assert "llama.cpp 0.3, commit abc1234" in plot_bench.describe(PEERS)
    assert plot_bench.describe({"levels": [], "settings": {"workload": "random"}}) == "workload random"


@pytest.mark.parametrize(
    "reports", [{"a": PEERS}, {"a": PEERS, "b": OFFLINE}, {"a": SERVING}, {"x": SERVING, "y": SERVING}]
)
def test_a_picture_is_written(reports, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'jaxserve[bench]'")
    output = tmp_path / "picture.png"
    plot_bench.draw(reports, output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.stat().st_size > 20_000
