"""Compile the decode and prefill programs of models for TPU slices; print what came out as a Markdown table.

    pip install libtpu
    python -m scripts.compile_slices                                  # all, into benchmarks/tpu.md by hand
    python -m scripts.compile_slices --models qwen2.5-7b --slices v5e:2x2

No TPU is needed and none is used. Of slices that differ in nothing a program depends on (as many devices
share a layer), the first is compiled and names the others. Where bf16 weights do not fit, int8 are tried.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import sys
from collections.abc import Iterator

from jaxserve.planning.options import PlanOptions, keep_to_cpu

MODELS = ("qwen2.5-0.5b", "qwen2.5-7b", "llama-3-8b", "qwen2.5-72b", "llama-3-70b")
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "v6e:4x4", "tpu7x:2x2x1")
COLUMNS = (
    "model",
    "slices",
    "weights",
    "devices a copy",
    "program",
    "compile, s",
    "code, MB",
    "aliased, pool and state, MB",
    "temporaries, MB",
    "largest copy, KB",
    "collectives",
    "estimate, ms",
    "roofline, ms",
    "ratio",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--slices", nargs="+", default=SLICES, metavar="SLICE")
    parser.add_argument("--json", metavar="FILE", help="append what was read of each program, one a line")
    options = parser.parse_args(argv)
    keep_to_cpu()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{versions}\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"| {' | '.join('---' for _ in COLUMNS)} |")
    for row in list_rows(options.models, options.slices, options.json):
        print(f"| {' | '.join(row)} |", flush=True)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nMost memory of this process: {peak_bytes / 2**30:.1f} GiB.")


def list_rows(models: list[str], slices: list[str], json_path: str | None = None) -> Iterator[list[str]]:
    """A row for each program; compiled only when it is asked for."""
    from jaxserve.planning.compilers import choose_programs, compile_programs

    for model in models:
        for fit, names, problem in _list_fits(model, slices):
            head = [model, ", ".join(names), fit.sketch.precision.served_as]
            if problem:
                yield [*head, problem, *["-"] * (len(COLUMNS) - len(head) - 1)]
                continue
            for report in compile_programs(fit.blueprint, fit.where, choose_programs(fit.blueprint)):
                if json_path:
                    with open(json_path, "a", encoding="utf-8") as file:
                        print(json.dumps(_describe(model, names, fit, report)), file=file)
                yield [*head, str(fit.sketch.tp_size), *_tell(fit, report)]


def _list_fits(model: str, slices: list[str]) -> Iterator[tuple]:
    """What fits, the slices of which that is told, and why nothing does."""
    from jaxserve.config import ServerConfig
    from jaxserve.planning.fit import fit_slice
    from jaxserve.planning.shapes import find_model
    from jaxserve.planning.slices import list_slices

    groups: dict[tuple, tuple] = {}
    context = PlanOptions(topologies=()).context
    for where in list_slices(slices):
        for quantization in ("auto", "int8"):
            config = ServerConfig(model_path=model, quantization=quantization)
            fit = fit_slice(config, find_model(config), where, context)
            if fit.fits:
                break
        missing = f"does not fit: {fit.missing_bytes / 2**30:.1f} GiB short a device"
        key = (where.chip.name, where if not fit.fits else (fit.sketch.tp_size, quantization))
        group = groups.setdefault(key, (fit, [], "" if fit.fits else missing))
        group[1].append(str(where))
    yield from groups.values()


def _tell(fit, report) -> list[str]:
    cells = [str(report.shape), f"{report.compile_s:.1f}", f"{report.code_bytes / 1e6:.1f}"]
    cells.append(f"{report.alias_bytes / 1e6:,.0f} of {report.state_bytes / 1e6:,.0f}")
    cells += [f"{report.temp_bytes / 1e6:.1f}", f"{report.largest_copy_bytes / 1e3:,.0f}"]
    cells.append(", ".join(f"{count} {name}" for name, count in report.collectives.items()) or "none")
    estimate_s, roofline_s = _compare(fit, report)
    if report.problem or estimate_s is None:
        return [*cells, report.problem or "-", "-", "-"]
    return [*cells, f"{estimate_s * 1e3:.2f}", f"{roofline_s * 1e3:.2f}", f"{estimate_s / roofline_s:.2f}"]


def _compare(fit, report) -> tuple[float | None, float]:
    """Seconds of the decode program of fewest rows, at one sequence, and of that of prefill, a whole chunk.

    The estimate of its operations (estimate.py) with the roofline's of what attention reads or multiplies and
    of sums that are waited for; and the roofline of all.
    """
    from jaxserve.planning.compilers import choose_programs
    from jaxserve.planning.roofline import bound_step
    from jaxserve.planning.traffic import StepWork, count_traffic

    fewest_rows, most_rows, *_ = choose_programs(fit.blueprint)
    if report.estimate_s is None or isinstance(report.shape, str) or report.shape == most_rows:
        return None, 0.0
    work = StepWork(num_rows=1, context=fit.context)
    if report.shape != fewest_rows:
        work = StepWork(num_rows=0, context=0, num_chunk_tokens=report.shape.num_tokens)
    traffic = count_traffic(fit.sketch, work)
    attention_s = traffic.kv_bytes / fit.where.chip.hbm_bytes_per_s
    if work.num_chunk_tokens:
        attention_s = traffic.attention_flops / fit.where.chip.bf16_flops
    bound = bound_step(fit.sketch, fit.where, work)
    waits_s = _wait_for_sums(fit, traffic, report.sum_gaps_s)
    return max(report.estimate_s + attention_s + waits_s, bound.sums_s), bound.step_s


def _wait_for_sums(fit, traffic, gaps_s: tuple[float, ...]) -> float:
    """Those of a layer, two or what they are cut into, last longer than what goes on beside them; and the
    step's others."""
    from jaxserve.planning.roofline import bound_sum
    from jaxserve.planning.traffic import SUMS_PER_LAYER

    num_others = traffic.num_sums - SUMS_PER_LAYER * fit.sketch.cfg.num_layers
    others_s = num_others * bound_sum(traffic.sum_bytes, fit.sketch.tp_size, fit.where)
    if not gaps_s:
        return others_s
    part_bytes = traffic.sum_bytes * SUMS_PER_LAYER / len(gaps_s)
    sum_s = bound_sum(part_bytes, fit.sketch.tp_size, fit.where)
    return others_s + fit.sketch.cfg.num_layers * sum(max(0.0, sum_s - gap_s) for gap_s in gaps_s)


def _describe(model: str, names: list[str], fit, report) -> dict:
    estimate_s, roofline_s = _compare(fit, report)
    return {
        "model": model,
        "slices": names,
        "weights": fit.sketch.precision.served_as,
        "tp_size": fit.sketch.tp_size,
        "program": str(report.shape),
        "compile_s": report.compile_s,
        "code_bytes": report.code_bytes,
        "alias_bytes": report.alias_bytes,
        "state_bytes": report.state_bytes,
        "temp_bytes": report.temp_bytes,
        "largest_copy_bytes": report.largest_copy_bytes,
        "collectives": report.collectives,
        "sum_gaps_s": report.sum_gaps_s,
        "estimate_s": estimate_s,
        "roofline_s": roofline_s,
        "problem": report.problem,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
