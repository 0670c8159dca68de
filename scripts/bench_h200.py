"""Everything that only hardware can answer, in one command of under eight minutes on an H200.

    OUT=results python scripts/bench_h200.py
    python scripts/bench_h200.py --parts check kernels           # some of it
    python scripts/bench_h200.py --dry-run                       # tiny shapes on a CPU, to test the plumbing

Parts run one after the other, what matters most first, each in processes of its own with a time limit, so
that one that crashes or hangs loses only itself. What a part has told is written to $OUT/h200.json at once
(`out` beside this folder where OUT is not set), and all that was printed to $OUT/h200.log. The table comes
last. A part that would begin after --budget-s is left out. The parts are the scripts named below.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_workload import ask_git, print_table, show
from h200_goals import GOALS, Goal, find_figure

ROOT = Path(__file__).resolve().parents[1]
SHAPE_7B = "benchmarks/shapes/qwen2.5-7b"
TINY = "configs/tiny"
# Two processes share the card where a part checks, and none may take all of its memory at once.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Commands that run side by side. Words of `dry` are what they become on a CPU."""

    name: str
    question: str
    limit_s: float
    commands: tuple[str, ...]
    dry: tuple[str, ...]
    columns: tuple[str, ...]  # of its rows, in the table


TINY_RATES = "--copy-mib 8 --matmul-width 128"
TINY_STEP = f"--model-path {TINY} --dtype float32 {TINY_RATES} --rows 1"
KERNEL_COLUMNS = ("kernel", "case", "us", "net_us", "tb_per_s", "copy_share", "tflops", "matmul_share")
KERNEL_COLUMNS += ("error", "failed")
STEP_COLUMNS = (
    "shape",
    "step_ms",
    "launch_ms",
    "tokens_per_s",
    "copy_share",
    "matmul_share",
    "compile_s",
    "failed",
)
PARTS = [
    Part(
        name="rates",
        question="what the card can do at most",
        limit_s=60,
        commands=("device_rates.py",),
        dry=(f"device_rates.py {TINY_RATES}",),
        columns=("device", "copy_bytes_per_s", "matmul_flops"),
    ),
    Part(
        name="check",
        question="are the kernels right",
        limit_s=120,
        commands=tuple(
            f"check_kernels.py --groups {group}"
            for group in ("decode", "prefill", "'rope write'", "sampling", "int4", "experts")
        ),
        dry=("check_kernels.py --form xla --first 2 --groups decode 'rope write'",),
        columns=("kernel", "case", "error", "tolerance", "right", "failed"),
    ),
    Part(
        name="decode",
        question="is decode attention fast",
        limit_s=60,
        commands=("bench_kernels.py --first 4 --groups decode",),
        dry=(),
        columns=KERNEL_COLUMNS,
    ),
    Part(
        name="prefill",
        question="is prefill attention fast",
        limit_s=90,
        commands=("bench_kernels.py --first 4 --groups prefill",),
        dry=(),
        columns=(*KERNEL_COLUMNS, "cudnn_us"),
    ),
    Part(
        name="kernels",
        question="are the other kernels fast",
        limit_s=120,
        commands=("bench_kernels.py --first 4 --groups sampling 'rope write' int4 experts",),
        dry=(f"bench_kernels.py --form xla --groups sampling --only 'top-p 0.95, 1 flat row' {TINY_RATES}",),
        columns=KERNEL_COLUMNS,
    ),
    Part(
        name="step",
        question="is the whole step, of Qwen2.5-7B's shape",
        limit_s=200,
        commands=(f"bench_step.py --model-path {SHAPE_7B} --rows 1 64 256 8 --prefill 8192 1024 32768",),
        dry=(f"bench_step.py {TINY_STEP} --context 70 --prefill 64",),
        columns=STEP_COLUMNS,
    ),
    Part(
        name="int4",
        question="and with its matrices in 4 bits",
        limit_s=120,
        commands=(
            f"bench_step.py --model-path {SHAPE_7B} --quantization int4 --rows 1 64 8 256 --prefill 2048",
        ),
        dry=(),  # the tiny model is too narrow
        columns=STEP_COLUMNS,
    ),
    Part(
        name="peers",
        question="what others' kernels take",
        limit_s=75,
        commands=("kernel_peers.py",),
        dry=("kernel_peers.py --tiny",),
        columns=("peer", "case", "us", "tb_per_s", "tflops", "num_splits", "failed"),
    ),
    Part(
        name="torch",
        question="what torch's take",
        limit_s=60,
        commands=("peer_torch.py",),
        dry=(),
        columns=("peer", "case", "us", "tb_per_s", "tflops", "failed"),
    ),
    Part(
        name="generation",
        question="what transformers' generation gives",
        limit_s=90,
        commands=(f"peer_generation.py --model-path {SHAPE_7B}",),
        dry=(f"peer_generation.py --model-path {TINY} --sequences 2 --prompt-tokens 8 --new-tokens 4",),
        columns=("peer", "sequences", "prefill_tps", "decode_tps", "job_tps", "failed"),
    ),
    Part(
        name="flags",
        question="does a setting of XLA's make the step faster",
        limit_s=200,
        commands=(f"bench_step.py --model-path {SHAPE_7B} --rows 64 --prefill --try-xla-flags",),
        dry=(f"bench_step.py {TINY_STEP} --context 9 --prefill",),
        columns=("shape", "xla_flags", "step_ms", "launch_ms", "copy_share", "compile_s", "failed"),
    ),
]
TORCH_SCRIPTS = ("peer_torch.py", "peer_generation.py")


class Report:
    """What is known so far: rows and states of parts, in a file that is whole at every moment."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "h200.json"
        self.log = (folder / "h200.log").open("w", encoding="utf-8")
        self.facts = facts
        self.parts: dict[str, dict[str, Any]] = {}
        self._last_words: dict[str, str] = {}  # of each part, that are no row
        self._lock = threading.Lock()

    def hear(self, part: str, line: str) -> None:
        """A line that a part printed: JSON objects are its rows."""
        with self._lock:
            print(line, file=self.log, flush=True)
            row = None
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
            if row is not None:
                self.parts[part]["rows"].append(row)
                self._write()
            elif line.strip():
                self._last_words[part] = line

    def set_state(self, part: str, state: str, seconds: float) -> None:
        with self._lock:
            known = self.parts.setdefault(part, {"rows": []})
            known |= {"state": state, "seconds": round(seconds, 1)}
            if state not in ("running", "done"):
                known["last_words"] = self._last_words.get(part, "")
            self._write()

    def _write(self) -> None:
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**self.facts, "parts": self.parts}, indent=1), encoding="utf-8")
        unfinished.replace(self._path)


def run_part(part: Part, commands: Sequence[list[str]], limit_s: float, report: Report) -> str:
    """ "done", or what went wrong. Whatever it told until then is in the report."""
    start_s = time.monotonic()
    report.set_state(part.name, "running", 0)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # packages may lie in a folder of their own
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for command in commands
    ]
    listeners = [
        threading.Thread(target=_listen, args=(process, part.name, report), daemon=True)
        for process in processes
    ]
    for listener in listeners:
        listener.start()
    states = []
    for process in processes:
        left_s = max(limit_s - (time.monotonic() - start_s), 0.1)
        try:
            code = process.wait(left_s)
            states.append("done" if code == 0 else f"ended with {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            states.append(f"cut off after {limit_s:.0f} s")
    for listener in listeners:
        listener.join(timeout=5)
    state = next((state for state in states if state != "done"), "done")
    report.set_state(part.name, state, time.monotonic() - start_s)
    return state


def _listen(process: subprocess.Popen[str], part: str, report: Report) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        report.hear(part, line.rstrip("\n"))


def split_command(words: str, torch_python: str) -> list[str]:
    """The words of a command, where '...' is one word, behind the interpreter that it wants."""
    pieces = words.split("'")
    found = [word for i, piece in enumerate(pieces) for word in ([piece] if i % 2 else piece.split())]
    python = torch_python if found[0] in TORCH_SCRIPTS else sys.executable
    return [python, f"scripts/{found[0]}", *found[1:]]


def explain_no_gpu() -> str:
    """Nothing where jax can use one. Asked in a process of its own, as this one must not hold the card."""
    question = "import jax; print(jax.default_backend())"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=120)
    if answer.stdout.strip().endswith("gpu"):
        return ""
    reason = "\n".join(answer.stderr.splitlines()[-5:])
    return (
        f"There is no GPU here that jax could use; --dry-run tests the plumbing on a CPU.\n{reason}".strip()
    )


def print_report(report: Report, parts: Sequence[Part], goals: Sequence[Goal]) -> None:
    for part in parts:
        known = report.parts.get(part.name)
        if known is None:
            continue
        print(f"\n## {part.name}: {part.question} ({known['state']}, {known['seconds']:.0f} s)\n")
        rows = [row for row in known["rows"] if part.columns[0] in row]
        if known.get("last_words"):
            print(f"Its last words: {known['last_words']}\n")
        used = [name for name in part.columns if any(row.get(name) not in (None, "") for row in rows)]
        if rows:
            print_table(used, [[_show(row.get(name)) for name in used] for row in rows])
    if not goals:
        return
    print("\n## goals\n")
    rows = []
    for goal in goals:
        figure = find_figure(goal, report.parts)
        verdict = "waits" if figure is None else "met" if goal.is_met(figure) else "missed"
        rows.append([goal.name, goal.wanted, show(figure, 3), verdict])
    print_table(["on an H200", "goal", "measured", ""], rows)


def _show(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:.4g}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--budget-s", type=float, default=460, help="for all parts together [%(default)s]")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="that has torch")
    parser.add_argument("--commit", metavar="ID", help="of these files, where git does not know it")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out"))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    start_s = time.monotonic()
    if not arguments.dry_run and (reason := explain_no_gpu()):
        raise SystemExit(reason)
    facts = {
        "commit": arguments.commit or ask_git("rev-parse", "HEAD") or None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "dry_run": arguments.dry_run,
    }
    report = Report(arguments.out, facts)
    parts = [part for part in PARTS if part.name in arguments.parts]
    for part in parts:
        words = part.dry if arguments.dry_run else part.commands
        left_s = arguments.budget_s - (time.monotonic() - start_s)
        if not words or left_s <= 0:
            report.set_state(part.name, "left out", 0)
            continue
        commands = [split_command(command, arguments.torch_python) for command in words]
        state = run_part(part, commands, min(part.limit_s, left_s), report)
        print(f"{part.name}: {state}, {report.parts[part.name]['seconds']:.0f} s", flush=True)
    print_report(report, parts, [] if arguments.dry_run else GOALS)


if __name__ == "__main__":
    main()
