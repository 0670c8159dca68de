"""Tokens per second of the engine without HTTP: prefill and decode, by precision, prompt and sequences.

    python scripts/bench_offline.py --precisions int8 --prompt-tokens 128 512
    python scripts/bench_offline.py --precisions int8 --prompts FILE --set speculative_algorithm=ngram

Each precision runs in a process of its own. A run submits n prompts at once, greedy, ignoring the end of
text. Prefill counts prompt tokens until every sequence has its first token, decode the new tokens while
every sequence is decoding, job all new tokens over all of the time. Prompts are random and never in the
prefix cache. With --prompts, real prompts are decoded one at a time to their end of text instead. Prints
Markdown tables of medians, and of where the time of a step goes; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from typing import Any

from bench_workload import (
    Batch,
    Workload,
    add_workload_flags,
    describe_machine,
    list_workloads,
    median,
    print_table,
    read_figures,
    read_kinds,
    read_prompts,
    show,
)

FEWEST_STEPS = 3  # of a program, for a row; the JSON object has them all
FIGURES = ("prefill_tps", "decode_tps", "job_tps")


def run_precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one precision, in this process."""
    from bench_engine import OfflineEngine, make_config

    defaults = {
        "max_running_requests": max(arguments.sequences),
        "context_length": 4096,
        "load_format": arguments.load_format,
    }
    config = make_config(arguments.model_path, arguments.precision, arguments.settings, defaults)
    engine = OfflineEngine(config, has_clock=True)
    results: dict[str, Any] = {}
    if arguments.prompts:
        results["prompts"] = run_prompts(engine, config, arguments)
    else:
        results |= run_workloads(engine, arguments)
    results |= engine.totals()
    engine.close()
    return results


def run_workloads(engine: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from bench_steps import summarize

    runs, steps = [], []
    for work in list_workloads(arguments):
        engine.run(work.warm_up.make_batch(engine.info.vocab_size, seed=-1))
        found = []
        for repeat in range(arguments.repeats):
            engine.clock.start()
            arrivals = engine.run(work.make_batch(engine.info.vocab_size, seed=repeat))
            found += engine.clock.stop()
            figures = read_figures(arrivals, work.num_sequences * work.num_prompt_tokens)
            runs.append({**dataclasses.asdict(work), **dataclasses.asdict(figures)})
        for row in summarize(found):
            steps.append({"num_prompt_tokens": work.num_prompt_tokens, **row})
    return {"runs": runs, "steps": steps}


def run_prompts(engine: Any, config: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """By repeat: kind of prompt -> what came after the first token."""
    from bench_engine import tokenize

    prompts = read_prompts(arguments.prompts)
    ids, stop_ids = tokenize(config, prompts)
    found = []
    for _ in range(arguments.repeats):
        arrivals = [
            engine.run(Batch(prompts=[prompt], num_new_tokens=[arguments.new_tokens], stop_ids=stop_ids))
            for prompt in ids
        ]
        kinds = read_kinds([prompt.kind for prompt in prompts], arrivals)
        found.append(
            {
                name: {**dataclasses.asdict(kind), "decode_tps": kind.decode_tps}
                for name, kind in kinds.items()
            }
        )
    return found


def print_runs(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """One table a prompt length: a row for each number of sequences."""
    precisions = report["precisions"]
    names = {"prefill_tps": "prefill", "decode_tps": "decode", "job_tps": "job"}
    for length in arguments.prompt_tokens:
        print(f"\nPrompts of {length} tokens, {arguments.new_tokens} new; tokens/s, medians.\n")
        heads = [f"{precision} {names[figure]}" for precision in precisions for figure in FIGURES]
        rows = []
        for work in list_workloads(arguments):
            if work.num_prompt_tokens != length:
                continue
            cells = [
                show(median(run[figure] for run in results["runs"] if is_of(run, work)))
                for results in precisions.values()
                for figure in FIGURES
            ]
            rows.append([str(work.num_sequences), *cells])
        print_table(["sequences", *heads], rows)


def is_of(run: dict[str, Any], work: Workload) -> bool:
    return all(run[name] == value for name, value in dataclasses.asdict(work).items())


def print_steps(report: dict[str, Any]) -> None:
    """Where a step's milliseconds go, program by program."""
    for precision, results in report["precisions"].items():
        print(f"\nOne step of {precision}, milliseconds, medians; the host works while the device does.\n")
        host = list(results["steps"][0]["host_ms"]) if results["steps"] else []
        rows = []
        for row in results["steps"]:
            if row["num_steps"] < FEWEST_STEPS:
                continue
            cells = [show(row[name], 2) for name in ("step_ms", "device_ms", "gap_ms")]
            cells += [f"{row['gap_share']:.1%}", show(sum(row["host_ms"].values()), 2)]
            cells += [show(row["host_ms"][part], 2) for part in host]
            live = f"{row['num_live_rows']:.0f}"
            rows.append([row["program"], live, str(row["num_prompt_tokens"]), str(row["num_steps"]), *cells])
        heads = ["program", "live rows", "prompt", "steps", "step", "device", "gap", "gap share", "host"]
        print_table([*heads, *(f"host: {part}" for part in host)], rows)


def print_prompts(report: dict[str, Any]) -> None:
    precisions = report["precisions"]
    kinds = list(next(iter(precisions.values()))["prompts"][0])
    rows = [
        [
            kind,
            *(
                show(median(run[kind]["decode_tps"] for run in results["prompts"]), 1)
                for results in precisions.values()
            ),
        ]
        for kind in kinds
    ]
    print("\nDecode of real prompts, one at a time; tokens/s, medians.\n")
    print_table(["kind", *precisions], rows)


def parse_arguments() -> argparse.Namespace:
    from bench_engine import PRECISIONS, add_engine_flags

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights"
    )
    parser.add_argument("--precisions", default="bf16,int8", help="comma-separated, of f32, bf16, int8, fp8")
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)  # a child process
    add_workload_flags(parser, sequences=[1, 2, 4, 8, 16, 32, 64], prompt_tokens=[128, 512, 2048])
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.precision:
        print(json.dumps(run_precision(arguments)))
        return
    report: dict[str, Any] = {
        "machine": describe_machine(["jax", "jaxlib"]),
        "model": arguments.model_path,
        "settings": arguments.settings,
        "precisions": {},
    }
    for precision in arguments.precisions.split(","):
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--precision", precision],
            stdout=subprocess.PIPE,
            text=True,
        )
        if child.returncode != 0:
            raise SystemExit(f"{precision} could not be measured; what it said is above.")
        report["precisions"][precision] = json.loads(child.stdout.splitlines()[-1])
    if arguments.prompts:
        print_prompts(report)
    else:
        print_runs(report, arguments)
        print_steps(report)
    totals = [
        [
            precision,
            show(results["ready_s"], 1),
            show(results["warm_s"], 1),
            str(results["num_late_compiles"]),
        ]
        for precision, results in report["precisions"].items()
    ]
    print()
    print_table(["", "ready, s", "every program ready, s", "late compiles"], totals)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
