"""Seconds from `jaxserve launch` to the first token over HTTP, cold and warm, and where they go.

    python scripts/bench_start.py --model-path model.gguf --repeats 3
    python scripts/bench_start.py --config smollm2.yaml --model-path smollm2.gguf --background

Cold: the folder of compiled programs is empty. Warm: a second start with the same folder. The model's files
are local and have been read once, so that neither network nor disk is part of it. The clock starts with the
process; the server is polled until it is healthy, then gets one chat request. The phases are the moments at
which the server's log tells of them: several go on at once, so they do not add up.

--background keeps one stream open after a cold start until all programs are compiled, and for some seconds
after: what compiling in the background costs a running request, and the seconds a program takes.
Prints Markdown tables; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_workload import describe_machine, list_processes, print_table

from jaxserve.utils import find_free_port

POLL_S = 0.02
START_TIMEOUT_S = 600.0
CHAT = {
    "model": "default",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
    "stream": True,
}
STREAM = {
    "text": "The history of the railway begins",
    "sampling_params": {"max_new_tokens": 128, "ignore_eos": True, "temperature": 0},
    "stream": True,
}
# What the log says at the end of each phase, in the order in which the phases are told.
PHASES = {
    "HTTP process imported": re.compile(r"server_args="),
    "engine process imported": re.compile(r"Load weight begin"),
    "tokenizer built": re.compile(r"The tokenizer is ready"),
    "weights loaded": re.compile(r"Load weight end"),
    "decode program ready": re.compile(r"compiled the step of \d+ rows? in"),
    "prefill program ready": re.compile(r"compiled the step of \d+ tokens in"),
    "engine ready": re.compile(r"max_total_num_tokens="),
    "warm-up request done": re.compile(r"Ready after"),
}
COMPILED = re.compile(r"compiled the step of (.+) in ([\d.]+) s")
ALL_READY = re.compile(r"All \d+ programs are ready")


class Server:
    """A `jaxserve launch` of our own, on loopback; its log lines with the seconds at which they came."""

    def __init__(self, flags: list[str]):
        self.port = find_free_port("127.0.0.1")
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level-http", "warning"]
        self._started_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "launch", *flags, *where],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        """End it by its own process id, and wait until it is gone."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append((self.elapsed_s(), line.rstrip()))

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s

    def cpu_s(self) -> float:
        """Processor seconds of the HTTP process and the engine so far (Linux). A busy machine slows the start
        and leaves these as they are."""
        total_ticks = 0
        for pid in list_processes(self._process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total_ticks += int(fields[11]) + int(fields[12])  # user and system time
        return total_ticks / os.sysconf("SC_CLK_TCK")

    def find(self, pattern: re.Pattern[str]) -> float | None:
        """When the log first told of it."""
        return next((at_s for at_s, line in self.log if pattern.search(line)), None)

    def wait_until_healthy(self) -> None:
        while self.elapsed_s() < START_TIMEOUT_S:
            if self._process.poll() is not None:
                break
            try:
                if self.request("GET", "/health").status == 200:
                    return
            except OSError:
                pass
            time.sleep(POLL_S)
        sys.exit("The server did not start:\n" + "\n".join(line for _, line in self.log[-20:]))

    def request(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_TIMEOUT_S)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        return connection.getresponse()

    def stream(self, path: str, body: object) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer as they come."""
        response = self.request("POST", path, body)
        if response.status != 200:
            sys.exit(f"{path} answered {response.status}: {response.read().decode()}")
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield json.loads(data)


def start_once(flags: list[str], background_s: float | None) -> dict[str, Any]:
    """One start: seconds to the first token, the phases, and on request the time after it."""
    with Server(flags) as server:
        server.wait_until_healthy()
        result: dict[str, Any] = {"healthy": server.elapsed_s()}
        for event in server.stream("/v1/chat/completions", CHAT):
            if any(choice["delta"].get("content") for choice in event["choices"]):
                result.setdefault("first token", server.elapsed_s())
                result.setdefault("processor", server.cpu_s())
        if background_s is not None:
            result["background"] = watch_background(server, background_s)
        phases = {name: server.find(pattern) for name, pattern in PHASES.items()}
        result["phases"] = {name: at_s for name, at_s in phases.items() if at_s is not None}
        found = [COMPILED.search(line) for _, line in list(server.log)]
        result["programs"] = {match[1]: float(match[2]) for match in found if match}
    return result


def watch_background(server: Server, window_s: float) -> dict[str, float]:
    """Inter-token seconds of one stream while programs compile, and after that."""
    during: list[float] = []
    after: list[float] = []
    while True:
        ready_s = server.find(ALL_READY)
        if ready_s is not None and server.elapsed_s() > ready_s + window_s:
            break
        last_s: float | None = None
        for _ in server.stream("/generate", STREAM):
            now_s = server.elapsed_s()
            if last_s is not None:
                (during if server.find(ALL_READY) is None else after).append(now_s - last_s)
            last_s = now_s
    return {
        "compiled after": server.find(ALL_READY) or 0.0,
        "during mean": statistics.fmean(during) if during else 0.0,
        "during median": statistics.median(during) if during else 0.0,
        "after mean": statistics.fmean(after),
        "after median": statistics.median(after),
        "mean ratio": statistics.fmean(during) / statistics.fmean(after) if during else 1.0,
        "longest during": max(during, default=0.0),
        "longest after": max(after),
    }


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Cold and warm starts in turn, each pair with a folder of its own."""
    with open(arguments.model_path, "rb") as file:  # into the disk cache
        while file.read(1 << 24):
            pass
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory(prefix="jaxserve-programs-") as folder:
            flags = ["--model-path", arguments.model_path, "--compilation-cache-dir", folder]
            if arguments.config:
                flags += ["--config", arguments.config]
            flags += arguments.flag
            for kind in runs:
                window_s = arguments.window_s if arguments.background else None
                runs[kind].append(start_once(flags, window_s))
                print(f"{kind}: {runs[kind][-1]['first token']:.1f} s", file=sys.stderr)
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats."""
    summary: dict[str, Any] = {}
    for kind, starts in runs.items():
        summary[kind] = {
            "first_token_s": statistics.median(start["first token"] for start in starts),
            "first_token_range_s": [
                min(start["first token"] for start in starts),
                max(start["first token"] for start in starts),
            ],
            "processor_s": statistics.median(start["processor"] for start in starts),
            "phases_s": _medians([start["phases"] for start in starts]),
            "programs_s": _medians([start["programs"] for start in starts]),
        }
        if "background" in starts[0]:
            summary[kind]["background"] = _medians([start["background"] for start in starts])
    return summary


def _medians(tables: list[dict[str, float]]) -> dict[str, float]:
    names = list(dict.fromkeys(name for table in tables for name in table))
    return {
        name: round(statistics.median(table[name] for table in tables if name in table), 4) for name in names
    }


def print_tables(summary: dict[str, Any]) -> None:
    kinds = list(summary)
    firsts = [f"**{summary[kind]['first_token_s']:.1f}**" for kind in kinds]
    seconds = [f"{summary[kind]['processor_s']:.1f}" for kind in kinds]
    rows = _list_rows([summary[kind]["phases_s"] for kind in kinds], digits=1)
    rows += [["**first token**", *firsts], ["processor seconds until then", *seconds]]
    print_table(["seconds after the start, medians", *kinds], rows)
    print()
    print_table(
        ["seconds a program takes", *kinds],
        _list_rows([summary[kind]["programs_s"] for kind in kinds], digits=1),
    )
    if "background" in summary[kinds[0]]:
        print()
        print_table(
            ["one stream while programs compile", *kinds],
            _list_rows([summary[kind]["background"] for kind in kinds], digits=3),
        )


def _list_rows(tables: list[dict[str, float]], *, digits: int) -> list[list[str]]:
    """A row for each name, a column for each table; empty where it does not have the name."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [
        [name, *(f"{table[name]:.{digits}f}" if name in table else "" for table in tables)] for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="a local .gguf file")
    parser.add_argument("--config", help="a config that ships with jaxserve, or a file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--background", action="store_true", help="measure what compiling later costs")
    parser.add_argument("--window-s", type=float, default=10.0, help="to measure after the last program")
    parser.add_argument("--flag", action="append", default=[], help="one more word for jaxserve launch")
    arguments = parser.parse_args()
    summary = summarize(measure(arguments))
    print_tables(summary)
    machine = describe_machine(["jax", "jaxlib"])
    print(json.dumps({"machine": machine, "model": Path(arguments.model_path).name, **summary}))


if __name__ == "__main__":
    main()
