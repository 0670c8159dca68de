"""`jaxserve plan` as a person runs it: tables, JSON, mistakes told in a line. Nothing is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxserve.cli import main
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.planning.command import plan
from jaxserve.planning.options import PlanOptions, read_plan_options


@pytest.fixture(autouse=True)
def _unchanged_environment(monkeypatch: pytest.MonkeyPatch):
    """The command keeps jax to the CPU through the environment."""
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "1")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    argv = ["plan", *words, "--no-compile", "--log-level", "warning"]
    assert main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_tables_say_what_fits_what_would_help_and_what_is_estimate(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "--config", "qwen2.5-7b.yaml", "--topology", "v5e:1x1", "v5e:2x2")
    memory, speed = out.partition("Roofline")[::2]
    rows = {line.split()[0]: line.split() for line in memory.splitlines() if line.strip().startswith("v5e:")}
    assert rows["v5e:1x1"][4] == "no"
    assert rows["v5e:2x2"][4] == "yes"
    assert rows["v5e:2x2"][-3] == "767k"  # KV tokens
    assert max(map(len, memory.splitlines())) <= 80  # of a terminal: nothing is cut off
    assert "v5e:2x2" in speed
    assert "v5e:1x1 lacks 0.7 GiB a device." in out
    assert "would help: --quantization int8: " in out
    assert "Nothing was run." in out
    assert "roofline estimates" in out


def test_json_holds_the_same_and_more(capsys: pytest.CaptureFixture[str]):
    words = ["--model-path", "llama-3-8b", "--topology", "h200:1", "--target-itl-ms", "50", "--json"]
    described = json.loads(run(capsys, *words))
    (found,) = described["slices"]
    assert found["fits"]
    assert found["programs"] == []
    assert found["not_compiled"] == "--no-compile was given"
    total_bytes = sum(found[f"{name}_bytes_per_device"] for name in ("weight", "kv", "slot", "free"))
    assert total_bytes == found["hbm_bytes_per_device"]
    assert [bound["sequences"] for bound in found["roofline"]["decode"]] == [1, 8, 32, 128]
    assert described["cheapest"]["topology"] == "h200:1"


def test_json_beside_the_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "plan.json"
    words = ["--model-path", "qwen2.5-0.5b", "--topology", "v6e:1x1", "--sequences", "4", "--json", str(path)]
    assert "v6e:1x1" in run(capsys, *words)
    (found,) = json.loads(path.read_text())["slices"]
    assert [bound["sequences"] for bound in found["roofline"]["decode"]] == [4]


def test_flags_of_a_launch_count(capsys: pytest.CaptureFixture[str]):
    words = ["--model-path", "llama-3-8b", "--topology", "v5e:1x1", "--json", "--quantization", "int8"]
    (found,) = json.loads(run(capsys, *words))["slices"]
    assert (found["fits"], found["quantization"]) == (True, "int8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "No slice is named: give --topology, such as v5e:2x2"),
        (
            ["--topology", "v5e:1x1", "--efficiency", "2"],
            "efficiency must be above 0 and at most 1, got 2.0.",
        ),
        (
            ["--topology", "v5e:1x1", "--sequences", "0"],
            "--sequences: invalid whole number above 0 value: '0'.",
        ),
        (["--topology", "v5e:1x1", "--target-itl-ms", "-1"], "target_itl_ms must be above 0, got -1."),
    ],
)
def test_mistakes_are_told_in_a_line(words: list[str], sentence: str):
    with pytest.raises(ConfigError) as caught:
        read_plan_options(words)
    assert sentence in str(caught.value)


def test_where_no_compiler_is_installed_the_arithmetic_is_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    console = Console(width=110, record=True)
    config = ServerConfig(model_path="qwen2.5-0.5b")
    (made,) = plan(config, PlanOptions(topologies=("v5e:1x1",)), console)
    assert made.fits
    assert made.programs == ()
    text = " ".join(console.export_text().split())
    assert "Nothing was compiled for v5e: libtpu is not installed (pip install libtpu)." in text
