"""bench_h200.py's plumbing: parts that crash, hang or go well, what is kept of them, and the goals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_h200 import PARTS, Part, Report, print_report, run_part, split_command
from scripts.bench_workload import ask_git
from scripts.h200_goals import GOALS, Goal, find_figure
from scripts.kernel_bench_decode import DECODE_BENCHES
from scripts.kernel_bench_prefill import PREFILL_BENCHES
from scripts.kernel_bench_sampling import SAMPLING_BENCHES

ROOT = Path(__file__).parents[2]
PART = Part(name="one", question="what", limit_s=1, commands=(), dry=(), columns=("us",))


def run_python(report: Report, *programs: str, limit_s: float = 30) -> str:
    return run_part(PART, [[sys.executable, "-c", program] for program in programs], limit_s, report)


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "h200.json").read_text())["parts"]["one"]["rows"]


def test_what_a_part_told_before_it_crashed_is_kept(tmp_path):
    report = Report(tmp_path, {})
    program = """print('{"us": 3}'); print("{no json"); raise SystemExit(7)"""
    assert run_python(report, program) == "ended with 7"
    assert read_rows(tmp_path) == [{"us": 3}]
    assert "{no json" in (tmp_path / "h200.log").read_text()


def test_a_part_that_hangs_is_cut_off_and_one_beside_it_is_not(tmp_path):
    report = Report(tmp_path, {})
    hang = """import time; print('{"us": 1}', flush=True); time.sleep(60)"""
    assert run_python(report, hang, """print('{"us": 2}')""", limit_s=3) == "cut off after 3 s"
    assert sorted(row["us"] for row in read_rows(tmp_path)) == [1, 2]


def test_packages_that_are_carried_in_a_folder_are_found_by_the_parts(tmp_path, monkeypatch):
    """On the lent machine nothing is installed: PYTHONPATH names the folder of the carried wheels."""
    monkeypatch.setenv("PYTHONPATH", "/carried")
    program = """import json, sys; print(json.dumps({"us": 1, "paths": sys.path}))"""
    assert run_python(Report(tmp_path, {}), program) == "done"
    (row,) = read_rows(tmp_path)
    places = [row["paths"].index(path) for path in (str(ROOT), "/carried")]
    assert places == sorted(places)


def test_the_last_words_of_a_part_that_failed_are_told(tmp_path, capsys):
    report = Report(tmp_path, {})
    run_python(report, """print('{"us": 3}'); raise ValueError("of its own making")""")
    print_report(report, [PART], [])
    assert "ValueError: of its own making" in capsys.readouterr().out
    assert json.loads((tmp_path / "h200.json").read_text())["parts"]["one"]["last_words"]


def test_where_there_is_no_git_the_commit_is_unknown(monkeypatch):
    assert ask_git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert ask_git("rev-parse", "HEAD") == ""


@pytest.mark.parametrize(("figure", "ours", "ratio"), [("us", 50, 0.8), ("tps", 200, 4)])
def test_a_goal_against_peers_is_about_the_best_of_them(figure, ours, ratio):
    goal = Goal(
        name="", part="one", row={"case": "a"}, figure=figure, peers=(("two", {"case": "a"}, figure),)
    )
    own = {"one": {"rows": [{"case": "a", figure: ours}]}}
    assert find_figure(goal, own) is None
    others = [{"case": "a", "failed": "no"}, {"case": "b", figure: 1e9}]
    others += [{"case": "a", figure: value} for value in (40, 50)]
    assert find_figure(goal, {**own, "two": {"rows": others}}) == ratio


def test_the_report_ends_with_the_goals(tmp_path, capsys):
    report = Report(tmp_path, {})
    run_python(report, """print('{"us": 12.345, "case": "a"}')""")
    goal = Goal(name="fast", part="one", row={"case": "a"}, figure="us", at_most=15)
    other = Goal(name="wide", part="two", row={}, figure="us", at_least=1)
    print_report(report, [PART], [goal, other])
    *_, met, waits = capsys.readouterr().out.splitlines()
    assert met.split("|")[1].strip() == "fast"
    assert met.split("|")[4].strip() == "met"
    assert waits.split("|")[4].strip() == "waits"
    assert find_figure(goal, report.parts) == 12.345


def test_every_goal_is_about_something_that_is_measured():
    benches: list[Any] = [*DECODE_BENCHES[:4], *PREFILL_BENCHES[:4], *SAMPLING_BENCHES[:4]]
    names = {bench.name for bench in benches}
    for goal in GOALS:
        figures = [(goal.part, goal.figure), *((part, figure) for part, _, figure in goal.peers)]
        for name, figure in figures:
            (part,) = [part for part in PARTS if part.name == name]
            assert figure in part.columns
        assert goal.row.get("case") is None or goal.row["case"] in names
        assert (goal.at_least is None) != (goal.at_most is None)


def test_every_part_is_a_script_that_is_there_and_quoted_words_stay_together():
    for part in PARTS:
        for words in (*part.commands, *part.dry):
            assert (ROOT / split_command(words, "python")[1]).is_file()
    assert split_command("a.py --groups 'rope write' x", "python")[2:] == ["--groups", "rope write", "x"]
    assert split_command("peer_torch.py", "torch/bin/python")[0] == "torch/bin/python"


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/bench_h200.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_dry_run_measures_tiny_shapes(tmp_path):
    done = run_script("--dry-run", "--parts", "rates", "torch", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "h200.json").read_text())
    assert report["dry_run"] is True
    assert report["parts"]["rates"]["state"] == "done"
    assert report["parts"]["rates"]["rows"][0]["matmul_flops"] > 0
    assert report["parts"]["torch"]["state"] == "left out"


def test_without_a_gpu_it_says_so(tmp_path):
    done = run_script("--out", str(tmp_path))
    assert done.returncode == 1
    assert "There is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())
