"""A plan as plain data, and that as tables for a person. Both say what is an estimate.

Units: bytes and seconds in the data; GiB, milliseconds and MB in the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxserve.planning.candidates import Candidate
from jaxserve.planning.chips import GIB
from jaxserve.planning.compilers import ProgramReport
from jaxserve.planning.fit import SliceFit
from jaxserve.planning.options import PlanOptions
from jaxserve.planning.roofline import ServingBound, bound_serving, bound_ttft, count_sequences

MB = 1e6
NOTES = (
    "Nothing was run. Memory is counted from shapes, by the code that a launch decides by.",
    "ITL, TTFT and tokens/s are roofline estimates: the least time that bytes, products and sums over "
    "devices can take at the chip's peaks. A server is slower.",
)
COMPILER_NOTE = (
    "The compiler's time is its estimate of a step in which nobody samples or asks for scores, without the "
    "kernels and the sums over devices; it has one for TPUs."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """All that is known of a model on one slice."""

    fit: SliceFit
    programs: tuple[ProgramReport, ...]
    not_compiled: str  # why there are no programs; empty if there are
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether there is room, what compiled programs compute with included."""
        return self.fit.fits and self.free_bytes >= 0 and not any(one.problem for one in self.programs)

    @property
    def free_bytes(self) -> int:
        """Of a device, while the program that takes most runs."""
        return self.fit.free_bytes - max(
            (one.temp_bytes + one.code_bytes for one in self.programs), default=0
        )


def describe_plan(
    model: str, plans: Sequence[SlicePlan], options: PlanOptions, cheapest: Candidate | None
) -> dict[str, Any]:
    """Everything as JSON takes it."""
    described: dict[str, Any] = {
        "model": model,
        "notes": list_notes(plans),
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "slices": [_describe_slice(plan, options) for plan in plans],
    }
    if options.has_targets:
        described["targets"] = {
            "itl_ms": options.target_itl_ms,
            "tokens_per_s": options.target_throughput,
            "efficiency": options.efficiency,
        }
        described["cheapest"] = cheapest and {
            "topology": str(cheapest.fit.where),
            "num_chips": cheapest.fit.where.num_chips,
            "tp_size": cheapest.fit.sketch.tp_size,
            "num_copies": cheapest.fit.num_copies,
            "sequences": cheapest.sequences,
            "itl_s": cheapest.itl_s,
            "tokens_per_s": cheapest.tokens_per_s,
        }
    return described


def list_notes(plans: Sequence[SlicePlan]) -> list[str]:
    notes: list[str] = [*NOTES]
    if any(plan.programs for plan in plans):
        notes.append(COMPILER_NOTE)
    notes += dict.fromkeys(
        f"Nothing was compiled for {plan.fit.where.chip.name}: {plan.not_compiled}."
        for plan in plans
        if plan.not_compiled
    )
    return notes


def list_bounds(fit: SliceFit, options: PlanOptions) -> list[ServingBound]:
    """At each number of sequences that was asked for, and for which there are pages."""
    if fit.blueprint is None or not fit.fits:
        return []
    bounds = [bound_serving(fit.blueprint, fit.where, count, options.context) for count in options.sequences]
    return [bound for bound in bounds if bound.fits_pool]


def _describe_slice(plan: SlicePlan, options: PlanOptions) -> dict[str, Any]:
    fit, blueprint = plan.fit, plan.fit.blueprint
    precision = fit.sketch.precision
    described: dict[str, Any] = {
        "topology": str(fit.where),
        "num_chips": fit.where.num_chips,
        "num_devices": fit.where.num_devices,
        "tp_size": fit.sketch.tp_size,
        "num_copies": fit.num_copies,
        "fits": plan.fits,
        "missing_bytes_per_device": fit.missing_bytes,
        "remedies": list(plan.remedies),
        **dataclasses.asdict(precision),
        "kernels": fit.sketch.checkpoint.kernels.name,
        "hbm_bytes_per_device": fit.where.chip.hbm_bytes,
        "weight_bytes_per_device": fit.sketch.param_bytes,
        "free_bytes_per_device": plan.free_bytes,
        "not_compiled": plan.not_compiled,
        "programs": [{**dataclasses.asdict(one), "shape": str(one.shape)} for one in plan.programs],
    }
    if blueprint is not None:
        described |= {
            "kv_bytes_per_device": blueprint.kv_bytes,
            "slot_bytes_per_device": blueprint.slots_bytes,
            "kv_tokens": fit.num_copies * blueprint.sizes.num_tokens,
            "largest_context": fit.largest_context,
            "max_sequences": fit.num_copies * count_sequences(blueprint, options.context),
            "page_size": blueprint.sizes.page_size,
            "chunk_tokens": blueprint.sizes.chunk_tokens,
        }
    bounds = list_bounds(fit, options)
    if bounds and blueprint is not None:
        described["roofline"] = {
            "ttft_s": bound_ttft(blueprint, fit.where, options.prompt_tokens),
            "decode": [dataclasses.asdict(bound) for bound in bounds],
        }
    return described


def print_plan(
    model: str, plans: Sequence[SlicePlan], options: PlanOptions, cheapest: Candidate | None, console: Console
) -> None:
    precision = plans[0].fit.sketch.precision
    console.print(f"{model}, weights {precision.served_as}, cache {precision.kv_dtype}")
    console.print(_memory_table(plans, options))
    if any(plan.programs for plan in plans):
        console.print(_program_table(plans))
    if any(list_bounds(plan.fit, options) for plan in plans):
        console.print(_speed_table(plans, options))
    for plan in plans:
        _print_problems(plan, console)
    if options.has_targets:
        console.print(_describe_choice(cheapest, options))
    for note in list_notes(plans):
        console.print(note, style="dim")


def _memory_table(plans: Sequence[SlicePlan], options: PlanOptions) -> Table:
    table = _table("Memory of a device, GiB", "slice", "copies", "fits")
    for title in ("HBM", "weights", "pool", "free", "KV\ntokens", "context", f"seqs of\n{options.context}"):
        table.add_column(title, justify="right", no_wrap=True)
    for plan in plans:
        fit, blueprint = plan.fit, plan.fit.blueprint
        row = [str(fit.where), f"{fit.num_copies} on {fit.sketch.tp_size}"]
        row += ["yes" if plan.fits else "no", gib(fit.where.chip.hbm_bytes), gib(fit.sketch.param_bytes)]
        if blueprint is None:
            row += ["-", gib(-fit.missing_bytes), "-", "-", "-"]
        else:
            row += [gib(blueprint.kv_bytes), gib(plan.free_bytes)]
            row += [_shorten(fit.num_copies * blueprint.sizes.num_tokens), f"{fit.largest_context:,}"]
            row.append(f"{fit.num_copies * count_sequences(blueprint, options.context):,}")
        table.add_row(*row)
    return table


def _program_table(plans: Sequence[SlicePlan]) -> Table:
    units = "compile in s, code and temporaries in MB, the compiler's time in ms"
    table = _table(f"Programs, compiled here: {units}", "slice")
    table.add_column("program")
    for title in ("compile", "code", "temps", "in\nplace", "collectives", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for plan in plans:
        for one in plan.programs:
            if one.problem:
                table.add_row(str(plan.fit.where), str(one.shape), f"{one.compile_s:.1f}", "failed")
                continue
            table.add_row(
                str(plan.fit.where),
                str(one.shape),
                f"{one.compile_s:.1f}",
                f"{one.code_bytes / MB:.1f}",
                f"{one.temp_bytes / MB:.0f}",
                "yes" if one.alias_bytes >= one.state_bytes else "no",
                "\n".join(f"{count} {name}" for name, count in one.collectives.items()) or "none",
                "-" if one.estimate_s is None else f"{one.estimate_s * 1e3:.2f}",
            )
    return table


def _speed_table(plans: Sequence[SlicePlan], options: PlanOptions) -> Table:
    title = f"Roofline, context {options.context}"
    table = _table(title, "slice")
    for name in (f"TTFT of {options.prompt_tokens}, ms", "sequences", "ITL, ms", "tokens/s", "limited by"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        blueprint = plan.fit.blueprint
        for place, bound in enumerate(list_bounds(plan.fit, options)):
            assert blueprint is not None, "there are bounds of what fits only"
            ttft_s = bound_ttft(blueprint, plan.fit.where, options.prompt_tokens)
            table.add_row(
                "" if place else str(plan.fit.where),
                "" if place else f"{ttft_s * 1e3:.1f}",
                str(bound.sequences),
                f"{bound.itl_s * 1e3:.2f}",
                f"{bound.tokens_per_s:,.0f}",
                bound.limit,
            )
    return table


def _print_problems(plan: SlicePlan, console: Console) -> None:
    where = plan.fit.where
    if plan.fit.missing_bytes:
        console.print(f"{where} lacks {gib(plan.fit.missing_bytes)} GiB a device.")
    elif not plan.fit.fits:
        console.print(f"{where} holds {plan.fit.largest_context:,} tokens of one sequence, and no more.")
    elif plan.free_bytes < 0:
        console.print(f"{where} lacks {gib(-plan.free_bytes)} GiB a device for what programs compute with.")
    for one in plan.programs:
        if one.problem:
            console.print(f"{where}, {one.shape}: {one.problem}", markup=False)
    for remedy in plan.remedies:
        console.print(f"  would help: {remedy}", markup=False)


def _describe_choice(cheapest: Candidate | None, options: PlanOptions) -> str:
    if cheapest is None:
        return "None of these slices meets the targets."
    where, fit = cheapest.fit.where, cheapest.fit
    copies = f"one copy on {_count(fit.sketch.tp_size, 'device')}"
    if fit.num_copies > 1:
        copies = f"{fit.num_copies} copies on {_count(fit.sketch.tp_size, 'device')} each"
    return (
        f"Cheapest that meets the targets at {options.efficiency:.0%} of the roofline: {where} "
        f"({_count(where.num_chips, 'chip')}, {copies}), with {_count(cheapest.sequences, 'sequence')} at "
        f"{cheapest.itl_s * 1e3:.1f} ms a token, {cheapest.tokens_per_s:,.0f} tokens/s. Cheapest is the "
        "fewest chips: no prices are known."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _shorten(count: int) -> str:
    """12,345 as 12.3k, 1,234,567 as 1.23M: three digits at least."""
    for least, size, letter in ((10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if count >= least:
            digits = max(0, 2 - int(math.log10(count / size)))
            return f"{count / size:,.{digits}f}{letter}"
    return f"{count:,}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"
