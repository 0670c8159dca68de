"""What every benchmark of tokens per second shares: the batches asked for, and the figures of their arrivals.

Used by bench_offline.py, bench_peers.py and their workers. A worker is a process that holds one loaded model
and answers batches over its standard input and output, one JSON object a line: it gets token ids and tells
when each new token came, so that all figures are worked out here, alike for everybody. Standard library only:
the workers of peers run under interpreters that have neither jaxserve nor jax.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Arrival = tuple[float, int, int]  # seconds since the batch was submitted, sequence, number of new tokens

FEWEST_STEPS = 4  # of all sequences at once, for a rate of decoding


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences submitted at once, decoded greedily; a sequence ends early at one of `stop_ids`."""

    prompts: list[list[int]]
    num_new_tokens: list[int]  # by sequence, at most
    stop_ids: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    num_sequences: int
    num_prompt_tokens: int
    num_new_tokens: int

    @property
    def warm_up(self) -> Workload:
        """As many sequences, and hardly any tokens."""
        return Workload(num_sequences=self.num_sequences, num_prompt_tokens=16, num_new_tokens=4)

    def make_batch(self, vocab_size: int, seed: int) -> Batch:
        """Random prompts, the same for everybody who gives the same seed; no end of text."""
        rng = random.Random(f"{seed}-{self.num_sequences}-{self.num_prompt_tokens}")
        ids = range(vocab_size // 2)  # the upper half holds special tokens, and rare ones
        prompts = [rng.choices(ids, k=self.num_prompt_tokens) for _ in range(self.num_sequences)]
        return Batch(prompts=prompts, num_new_tokens=[self.num_new_tokens] * self.num_sequences)


def add_workload_flags(
    parser: argparse.ArgumentParser, *, sequences: list[int], prompt_tokens: list[int]
) -> None:
    parser.add_argument("--sequences", type=int, nargs="+", default=sequences, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=prompt_tokens, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--most-prompt-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="of a run; larger runs are left out [%(default)s]",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSON lines of real prompts, instead of random ones",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


def list_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Every length and number that is not too much together."""
    return [
        Workload(
            num_sequences=num_sequences,
            num_prompt_tokens=num_prompt_tokens,
            num_new_tokens=arguments.new_tokens,
        )
        for num_prompt_tokens in arguments.prompt_tokens
        for num_sequences in arguments.sequences
        if num_sequences * num_prompt_tokens <= arguments.most_prompt_tokens
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Tokens per second over all sequences of a batch.

    `prefill_tps` counts prompt tokens until the last sequence has its first token, `decode_tps` new tokens
    while every sequence is decoding (None: they never were, for long enough), `job_tps` all new tokens over
    all of the time.
    """

    prefill_tps: float
    decode_tps: float | None
    job_tps: float


def read_figures(arrivals: Sequence[Arrival], num_prompt_tokens: int) -> Figures:
    """The figures of one batch; `num_prompt_tokens` are those of all its prompts.

    |-- prefill --|------ decode ------|-- tail --|
    0        last first            first last    end

    Where some sequence ends before another has begun, or nearly so, decoding counts to the end of all.
    """
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    for at_s, sequence, _ in arrivals:
        first_s.setdefault(sequence, at_s)
        last_s[sequence] = at_s
    begin_s, end_s = max(first_s.values()), max(last_s.values())
    num_tokens = sum(count for _, _, count in arrivals)
    decode_tps = None
    for until_s in (min(last_s.values()), end_s):
        num_decoded = sum(count for at_s, _, count in arrivals if begin_s < at_s <= until_s)
        if num_decoded >= FEWEST_STEPS * len(first_s):
            decode_tps = num_decoded / (until_s - begin_s)
            break
    return Figures(prefill_tps=num_prompt_tokens / begin_s, decode_tps=decode_tps, job_tps=num_tokens / end_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KindOfPrompt:
    """Prompts of one kind decoded one at a time: what came after each first token, and how long it took."""

    num_prompts: int
    num_tokens: int
    decode_s: float

    @property
    def decode_tps(self) -> float:
        return self.num_tokens / self.decode_s if self.decode_s else 0.0


def read_kinds(kinds: Sequence[str], arrivals: Sequence[Sequence[Arrival]]) -> dict[str, KindOfPrompt]:
    """By kind, in order of appearance, and last for "all": every token counts the same."""
    found: dict[str, KindOfPrompt] = {}
    for kind, came in zip(kinds, arrivals, strict=True):
        for name in (kind, "all"):
            before = found.get(name, KindOfPrompt(num_prompts=0, num_tokens=0, decode_s=0.0))
            found[name] = KindOfPrompt(
                num_prompts=before.num_prompts + 1,
                num_tokens=before.num_tokens + sum(count for _, _, count in came[1:]),
                decode_s=before.decode_s + came[-1][0] - came[0][0],
            )
    found["all"] = found.pop("all")
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RealPrompt:
    """A line of a file of prompts: {"kind": "chat", "messages": [...]}, or with a "prompt" that is text."""

    kind: str
    messages: list[dict[str, Any]]  # empty if it is text
    text: str


def read_prompts(paths: Iterable[Path]) -> list[RealPrompt]:
    """Raises ValueError, naming the line, for one that is neither form."""
    prompts = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            entry = json.loads(line)
            messages, text = entry.get("messages", []), entry.get("prompt", "")
            if bool(messages) == bool(text):
                raise ValueError(f"{path}, line {number}: give either messages or prompt.")
            kind = entry.get("kind", path.stem)
            prompts.append(RealPrompt(kind=kind, messages=messages, text=text))
    return prompts


def median(values: Iterable[float | None]) -> float | None:
    """Of the values that are there."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def encode_post(port: int, path: str, body: object) -> bytes:
    """A POST of JSON as it goes over the wire, to a server of this machine that closes the connection."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In Markdown."""
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def list_processes(pid: int) -> list[int]:
    """A process and all below it (Linux's own list of children); one that ends meanwhile is left out."""
    found = [pid]
    for one in found:  # grows while it is walked
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def describe_machine(packages: Sequence[str]) -> dict[str, str]:
    """What a reader needs to place the figures; versions are those of this interpreter."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model or platform.processor(),
        "cores": str(os.cpu_count()),
        "instructions": " ".join(flag for flag in ("avx2", "avx512f", "amx_int8", "neon") if flag in flags),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": ask_git("describe", "--always", "--dirty", "--exclude", "*"),
        "date": time.strftime("%Y-%m-%d"),
    }


def ask_git(*words: str) -> str:
    """Of this clone; nothing where there is no git, or a copy of the files alone."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


class Worker:
    """A worker process and the line to it. Start several before waiting: they load side by side."""

    def __init__(self, command: Sequence[str]):
        self._script = Path(command[1]).name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def wait_ready(self) -> dict[str, Any]:
        """What it tells of itself once the model is loaded. Raises RuntimeError if it ends instead."""
        return self._read()

    def run(self, batch: Batch) -> list[Arrival]:
        return [tuple(arrival) for arrival in self._ask(dataclasses.asdict(batch))["arrivals"]]

    def close(self) -> dict[str, Any]:
        """Let it end; what it has to say at last."""
        last_words = self._ask({})
        self._process.wait(timeout=60)
        return last_words

    def kill(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ({self._script}) ended with exit status {self._process.wait()}")
        return json.loads(line)


def answer_batches(
    ready: dict[str, Any],
    run_batch: Callable[[Batch], list[Arrival]],
    tell_last: Callable[[], dict[str, Any]] = dict,
) -> None:
    """The worker's end: say that it is ready, run batches until told to end.

    What libraries print goes to standard error meanwhile: standard output is the line.
    """
    line = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        line.write(json.dumps(message) + "\n")
        line.flush()

    tell(ready)
    for words in sys.stdin:
        question = json.loads(words)
        if not question:
            tell(tell_last())
            return
        tell({"arrivals": run_batch(Batch(**question))})
