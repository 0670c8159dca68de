"""Ratios against the best peer, and peers that are not there."""

from __future__ import annotations

import argparse
import sys

import pytest

from scripts.bench_engine import make_config
from scripts.bench_peers import compare, list_peers, list_workloads, print_report

CELL = {"num_sequences": 8, "num_prompt_tokens": 128}


def runs_of(*decode_tps: float | None) -> list[dict]:
    return [{**CELL, "repeat": repeat, "decode_tps": value} for repeat, value in enumerate(decode_tps)]


def test_the_ratio_is_the_median_of_rounds_against_the_best_peer():
    runs = {
        "jaxserve int8": runs_of(20.0, 60.0, 90.0),
        "llama.cpp Q8_0": runs_of(10.0, 20.0, 90.0),  # the machine grew faster from round to round
        "transformers bf16": runs_of(30.0, 5.0, 5.0),
    }
    ratio = compare(runs, CELL, "decode_tps")
    assert ratio is not None
    assert (ratio["best_peer"], ratio["ours"]) == ("llama.cpp Q8_0", "jaxserve int8")
    assert ratio["ratio"] == 2.0  # of 2, 3 and 1


@pytest.mark.parametrize("missing", ["jaxserve int8", "llama.cpp Q8_0"])
def test_without_one_side_there_is_no_ratio(missing):
    runs = {"jaxserve int8": runs_of(20.0), "llama.cpp Q8_0": runs_of(10.0)} | {missing: runs_of(None)}
    assert compare(runs, CELL, "decode_tps") is None


def test_the_table_ends_with_ratios(capsys):
    runs = {"jaxserve int8": runs_of(20.0), "llama.cpp Q8_0": runs_of(10.0)}
    ratios = print_report(runs, [("decode 8 seq", CELL, "decode_tps")])
    assert capsys.readouterr().out.splitlines() == [
        "| tokens/s | decode 8 seq |",
        "|---|---|",
        "| jaxserve int8 | 20.0 |",
        "| llama.cpp Q8_0 | 10.0 |",
        "| **jaxserve / best peer** | 2.00 (llama.cpp Q8_0) |",
    ]
    assert [ratio["ratio"] for ratio in ratios] == [2.0]


def test_http_is_compared_with_the_engine_without_it(capsys):
    runs = {"jaxserve int8": runs_of(20.0, 40.0), "jaxserve int8, HTTP": runs_of(19.0, 39.0)}
    assert print_report(runs, [("decode 8 seq", CELL, "decode_tps")]) == []
    assert capsys.readouterr().out.splitlines()[-1] == "| **jaxserve int8, HTTP / without** | 0.96 |"


def make_arguments(tmp_path, **others) -> argparse.Namespace:
    values = {
        "model_path": "model.gguf",
        "settings": [],
        "precisions": "int8",
        "http": False,
        "llama_python": str(tmp_path / "no-such-python"),
        "torch_python": str(tmp_path / "no-such-python"),
        "peers": "jaxserve,llama.cpp,transformers",
        "cache": tmp_path,
        "sequences": [1, 32],
        "prompt_tokens": [128, 2048],
        "new_tokens": 64,
        "most_prompt_tokens": 16384,
    }
    return argparse.Namespace(**values | others)


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_install_it(tmp_path):
    peers, skipped = list_peers(make_arguments(tmp_path), tmp_path / "model.gguf")
    assert [peer.name for peer in peers] == ["jaxserve int8"]
    assert "pip install llama-cpp-python" in skipped["llama.cpp"]
    assert "--torch-python" in skipped["transformers"]


def test_ours_runs_in_this_interpreter_with_a_pool_for_the_largest_workload(tmp_path):
    arguments = make_arguments(tmp_path, http=True, settings=["page_size=32"])
    peers, _ = list_peers(arguments, tmp_path / "model.gguf")
    assert [peer.name for peer in peers] == ["jaxserve int8", "jaxserve int8, HTTP"]
    assert peers[0].command[0] == sys.executable
    assert "page_size=32" in peers[0].command
    assert f"max_total_tokens={max(2048 + 320, 32 * (128 + 320))}" not in peers[0].command
    assert "max_total_tokens=16384" in peers[0].command


def test_workloads_that_are_too_much_are_left_out(tmp_path):
    works = list_workloads(make_arguments(tmp_path))
    assert [(work.num_sequences, work.num_prompt_tokens) for work in works] == [
        (1, 128),
        (32, 128),
        (1, 2048),
    ]


def test_any_setting_of_the_server_can_be_set():
    config = make_config("m", "bf16", ["page-size=32", "max_total_tokens=8k"], {"context_length": 512})
    assert (config.page_size, config.max_total_tokens, config.context_length) == (32, 8192, 512)
    assert (config.dtype, config.quantization) == ("bfloat16", "none")
    assert make_config("m", "int8", ["quantization=none"], {}).quantization == "none"


@pytest.mark.parametrize("word", ["page_size", "pages=3"])
def test_what_is_no_setting_is_refused(word):
    with pytest.raises(ValueError, match=f"--set takes KEY=VALUE .* got '{word}'"):
        make_config("m", "int8", [word], {})
