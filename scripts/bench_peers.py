"""jaxserve and its peers on one model file, in one run, in turn: tokens per second, and the ratios.

    python scripts/bench_peers.py --llama-python OTHER/bin/python --torch-python THIRD/bin/python

Every peer is a process of its own that loads the model once and then waits for its turns: the first workload
goes to each of them, then the second, and all of that several times, so that a machine whose speed drifts
is unfair to nobody. All get the same token ids, decode greedily on all cores, and are timed by the same
code. llama.cpp serves the file itself, and what its own quantiser makes of it in Q8_0 and BF16; transformers
serves it in bfloat16. A peer that is not installed is named and left out. With --prompts, real prompts are
decoded one at a time, as many tokens as jaxserve's reply has. Prints Markdown tables of medians; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench_workload import (
    Arrival,
    Batch,
    Worker,
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

OURS = "jaxserve"
HTTP = ", HTTP"
HERE = Path(__file__).resolve().parent
FIGURES = {"decode_tps": "decode", "prefill_tps": "prefill", "job_tps": "job"}
# The commonest of GGUF's general.file_type; llama.cpp calls them so.
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 15: "Q4_K_M", 17: "Q5_K_M", 18: "Q6_K"}
INSTALL = {
    "llama.cpp": "pip install llama-cpp-python (CMAKE_ARGS=-DGGML_NATIVE=ON) and point --llama-python at it",
    "transformers": "pip install torch transformers gguf accelerate and point --torch-python at it",
}
Run = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How to start one. `prepare` writes what it serves, if that is not there yet, and tells what is special:
    more words for the command, and a sentence for the reader."""

    name: str
    command: list[str]
    prepare: Callable[[], tuple[list[str], str]] = lambda: ([], "")

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def list_peers(arguments: argparse.Namespace, gguf_path: Path) -> tuple[list[Peer], dict[str, str]]:
    """Those that can run, ours first, and for each one that cannot the reason."""
    peers = list_ours(arguments)
    skipped: dict[str, str] = {}
    if is_importable(arguments.llama_python, "llama_cpp", "numpy"):
        peers += list_llama_cpp(arguments, gguf_path)
    else:
        skipped["llama.cpp"] = f"not installed: {INSTALL['llama.cpp']}"
    if is_importable(arguments.torch_python, "torch", "transformers", "gguf"):
        cache = cache_folder(arguments, gguf_path) / "transformers-bf16"
        script = [arguments.torch_python, str(HERE / "peer_transformers.py")]
        peers.append(
            Peer(
                name="transformers bf16", command=[*script, "--model", str(gguf_path), "--cache", str(cache)]
            )
        )
    else:
        skipped["transformers"] = f"not installed: {INSTALL['transformers']}"
    wanted = [word.strip() for word in arguments.peers.split(",")]
    return [peer for peer in peers if any(word in peer.name for word in wanted)], skipped


def list_ours(arguments: argparse.Namespace) -> list[Peer]:
    settings = default_settings(arguments) + arguments.settings
    flags = [word for setting in settings for word in ("--set", setting)]
    flags += ["--model-path", arguments.model_path]
    peers = []
    for precision in arguments.precisions.split(","):
        command = [sys.executable, str(HERE / "bench_engine.py"), *flags, "--precision", precision]
        peers.append(Peer(name=f"{OURS} {precision}", command=command))
    if arguments.http:
        precision = arguments.precisions.split(",")[-1]
        command = [sys.executable, str(HERE / "bench_http.py"), *flags, "--precision", precision]
        peers.append(Peer(name=f"{OURS} {precision}{HTTP}", command=command))
    return peers


def default_settings(arguments: argparse.Namespace) -> list[str]:
    """A pool for the largest workload: what is left of the memory belongs to the peers."""
    works = list_workloads(arguments)
    most_tokens = max(
        work.num_sequences * (work.num_prompt_tokens + work.num_new_tokens + 256) for work in works
    )
    return [
        f"max_running_requests={max(arguments.sequences)}",
        "context_length=4096",
        f"max_total_tokens={max(most_tokens, 16384)}",
    ]


def list_llama_cpp(arguments: argparse.Namespace, gguf_path: Path) -> list[Peer]:
    from jaxserve.weights.gguf import read_gguf_metadata

    script = [arguments.llama_python, str(HERE / "peer_llama_cpp.py")]
    own_type = FILE_TYPES.get(read_gguf_metadata(gguf_path).get("general.file_type"), "as it is")  # type: ignore[arg-type]
    paths = {own_type: gguf_path}
    for type_name in ("Q8_0", "BF16"):
        paths.setdefault(type_name, cache_folder(arguments, gguf_path) / f"{type_name}.gguf")
    return [
        Peer(
            name=f"llama.cpp {type_name}",
            command=[*script, "--model", str(path)],
            prepare=partial(prepare_llama_cpp, script, gguf_path, type_name, path),
        )
        for type_name, path in paths.items()
    ]


def prepare_llama_cpp(script: list[str], source: Path, type_name: str, path: Path) -> tuple[list[str], str]:
    """Quantise, and try whether its kernels for this CPU work.

    GCC of before 2024 miscompiles those for AMX (its PR 114098): they end in an illegal instruction.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        words = ["--model", str(source), "--quantize-to", str(unfinished), "--type", type_name]
        subprocess.run([*script, *words], check=True)
        unfinished.rename(path)
    probe = subprocess.run([*script, "--model", str(path), "--probe"], capture_output=True)
    if probe.returncode >= 0:
        return [], ""
    crash = signal.strsignal(-probe.returncode) or f"signal {-probe.returncode}"
    return ["--plain-buffers"], (
        f"llama.cpp crashed ({crash}) in its own kernels for this CPU and ran without them: its figures "
        "are too low. Build it with GCC 14 or later, or Clang."
    )


def cache_folder(arguments: argparse.Namespace, gguf_path: Path) -> Path:
    """Where the files made of this one are kept; another file gets another folder."""
    facts = gguf_path.stat()
    name = f"{gguf_path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    return arguments.cache / f"{gguf_path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def is_importable(python: str, *modules: str) -> bool:
    command = [python, "-c", f"import {', '.join(modules)}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def start_workers(peers: Sequence[Peer]) -> Iterator[tuple[str, Worker, dict[str, Any]]]:
    """One after another, so that each loads with the machine to itself."""
    for peer in peers:
        print(f"starting {peer.name}", file=sys.stderr)
        words, note = peer.prepare()
        worker = Worker([*peer.command, *words])
        yield peer.name, worker, {**worker.wait_ready(), "note": note}


def run_workloads(
    workers: dict[str, Worker], works: Sequence[Workload], vocab_size: int, repeats: int
) -> dict[str, list[Run]]:
    """In turn, after a warm-up of each that is not counted."""
    for work in works:
        for worker in workers.values():
            worker.run(work.warm_up.make_batch(vocab_size, seed=-1))
    runs: dict[str, list[Run]] = {name: [] for name in workers}
    for repeat in range(repeats):
        for work in works:
            for name, worker in workers.items():
                arrivals = worker.run(work.make_batch(vocab_size, seed=repeat))
                figures = read_figures(arrivals, work.num_sequences * work.num_prompt_tokens)
                runs[name].append(
                    {"repeat": repeat, **dataclasses.asdict(work), **dataclasses.asdict(figures)}
                )
                told = (
                    f"round {repeat + 1} of {repeats}: {work.num_sequences} x {work.num_prompt_tokens} tokens"
                )
                print(f"{told}, {name}: {figures}", file=sys.stderr)
    return runs


def run_prompts(
    workers: dict[str, Worker], arguments: argparse.Namespace, repeats: int
) -> dict[str, list[Run]]:
    """Replies of one length for everybody: that of the first worker's, which ends at its end of text."""
    from bench_engine import make_config, tokenize

    prompts = read_prompts(arguments.prompts)
    ids, stop_ids = tokenize(make_config(arguments.model_path, "int8", arguments.settings, {}), prompts)
    kinds = [prompt.kind for prompt in prompts]
    first = next(iter(workers.values()))
    counts = [
        sum(count for _, _, count in first.run(batch))
        for prompt in ids
        for batch in [Batch(prompts=[prompt], num_new_tokens=[arguments.new_tokens], stop_ids=stop_ids)]
    ]
    runs: dict[str, list[Run]] = {name: [] for name in workers}
    for repeat in range(repeats):
        arrivals: dict[str, list[list[Arrival]]] = {name: [] for name in workers}
        for prompt, count in zip(ids, counts, strict=True):
            for name, worker in workers.items():
                arrivals[name].append(worker.run(Batch(prompts=[prompt], num_new_tokens=[count])))
        for name, came in arrivals.items():
            for kind, found in read_kinds(kinds, came).items():
                runs[name].append({"repeat": repeat, "kind": kind, "decode_tps": found.decode_tps})
    return runs


def compare(runs: dict[str, list[Run]], cell: dict[str, Any], figure: str) -> dict[str, Any] | None:
    """One of our figures against the best peer's: the median of the ratios round by round.

    None if one side has no such figure.
    """
    medians = {name: median(run[figure] for run in select(found, cell)) for name, found in runs.items()}
    peers = {name: value for name, value in medians.items() if value and not name.startswith(OURS)}
    ours = {name: value for name, value in medians.items() if value and name.startswith(OURS)}
    if not peers or not ours:
        return None
    best_peer, best_ours = max(peers, key=lambda name: peers[name]), next(iter(ours))
    ratio = compare_pair(runs[best_ours], runs[best_peer], cell, figure)
    return {**cell, "figure": figure, "ours": best_ours, "best_peer": best_peer, "ratio": ratio}


def compare_pair(ours: list[Run], theirs: list[Run], cell: dict[str, Any], figure: str) -> float | None:
    """The median of the ratios round by round, of the rounds that both have."""
    by_round = {run["repeat"]: run[figure] for run in select(theirs, cell)}
    return median(
        run[figure] / by_round[run["repeat"]]
        for run in select(ours, cell)
        if run[figure] and by_round.get(run["repeat"])
    )


def select(runs: Sequence[Run], cell: dict[str, Any]) -> list[Run]:
    return [run for run in runs if all(run[name] == value for name, value in cell.items())]


def print_report(
    runs: dict[str, list[Run]], columns: Sequence[tuple[str, dict[str, Any], str]]
) -> list[dict[str, Any]]:
    """A row for each peer and one of ratios; a column is (head, cell, figure). Returns the ratios."""
    rows = [
        [name, *(show(median(run[figure] for run in select(found, cell)), 1) for _, cell, figure in columns)]
        for name, found in runs.items()
    ]
    ratios = [compare(runs, cell, figure) for _, cell, figure in columns]
    if any(ratios):
        cells = [f"{ratio['ratio']:.2f} ({ratio['best_peer']})" if ratio else "–" for ratio in ratios]
        rows.append([f"**{OURS} / best peer**", *cells])
    over_http = next((name for name in runs if name.endswith(HTTP)), None)
    if over_http is not None:
        pairs = [
            compare_pair(runs[over_http], runs.get(over_http.removesuffix(HTTP), []), cell, figure)
            for _, cell, figure in columns
        ]
        rows.append([f"**{over_http} / without**", *(show(pair, 2) for pair in pairs)])
    print_table(["tokens/s", *(head for head, _, _ in columns)], rows)
    return [ratio for ratio in ratios if ratio]


def print_reports(runs: dict[str, list[Run]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.prompts:
        print(f"\nDecode of real prompts, one at a time, up to {arguments.new_tokens} new tokens.\n")
        kinds = dict.fromkeys(run["kind"] for run in next(iter(runs.values())))
        return print_report(runs, [(kind, {"kind": kind}, "decode_tps") for kind in kinds])
    ratios = []
    works = list_workloads(arguments)
    for length in arguments.prompt_tokens:
        print(f"\nPrompts of {length} tokens, {arguments.new_tokens} new.\n")
        columns = [
            (f"{label} {work.num_sequences} seq", dataclasses.asdict(work), figure)
            for figure, label in FIGURES.items()
            for work in works
            if work.num_prompt_tokens == length
        ]
        ratios += print_report(runs, columns)
    return ratios


def parse_arguments() -> argparse.Namespace:
    from bench_engine import add_engine_flags

    from jaxserve.weights.cache import cache_dir

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    parser.add_argument("--precisions", default="int8", help="of jaxserve; comma-separated")
    parser.add_argument("--http", action="store_true", help="jaxserve over HTTP too")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch, transformers")
    parser.add_argument(
        "--peers", default=f"{OURS},llama.cpp,transformers", help="those whose name holds one of these words"
    )
    parser.add_argument("--cache", type=Path, default=cache_dir() / "bench", help="for converted weights")
    add_workload_flags(parser, sequences=[1, 8, 32], prompt_tokens=[128, 512])
    return parser.parse_args()


def main() -> None:
    from jaxserve.weights.resolve import resolve_model

    arguments = parse_arguments()
    files = resolve_model(arguments.model_path, on_progress=lambda *_: None)
    gguf_path = Path(files.files[0])
    if gguf_path.suffix != ".gguf":
        raise SystemExit(f"--model-path must come to one .gguf file, which peers can read; got {gguf_path}.")
    peers, skipped = list_peers(arguments, gguf_path)
    if not peers:
        raise SystemExit(f"Nothing to run: {skipped or 'no name holds a word of --peers'}.")
    workers: dict[str, Worker] = {}
    ready: dict[str, Any] = {}
    try:
        for name, worker, words in start_workers(peers):
            workers[name], ready[name] = worker, words
        if arguments.prompts:
            runs = run_prompts(workers, arguments, arguments.repeats)
        else:
            vocab_size = files.hf_config["vocab_size"]
            runs = run_workloads(workers, list_workloads(arguments), vocab_size, arguments.repeats)
        last = {name: worker.close() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    ratios = print_reports(runs, arguments)
    for name, reason in skipped.items():
        print(f"\n{name} was left out, {reason}.")
    for name, words in ready.items():
        if words["note"]:
            print(f"\n{name}: {words['note']}")
    report = {
        "machine": describe_machine(["jax", "jaxlib"]),
        "model": arguments.model_path,
        "settings": arguments.settings,
        "workers": {name: {"ready": ready[name], "last": last[name]} for name in workers},
        "runs": runs,
        "ratios": ratios,
        "skipped": skipped,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
