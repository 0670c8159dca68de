"""Which of several slices is the cheapest that meets the targets.

No prices: they differ by region, contract and day. Cheapest is the fewest chips, and of as many the least
memory bandwidth in all, which chips of one maker are priced by, more or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.planning.fit import SliceFit
from jaxserve.planning.options import PlanOptions
from jaxserve.planning.roofline import ServingBound, bound_serving, count_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A slice that meets the targets, and at which load; times are the bound over the efficiency."""

    fit: SliceFit
    sequences: int
    itl_s: float
    tokens_per_s: float


def choose_cheapest(fits: Sequence[SliceFit], options: PlanOptions) -> Candidate | None:
    """The first slice by price that meets all targets at some number of sequences, or None."""
    for fit in sorted(fits, key=price_rank):
        candidate = meet_targets(fit, options)
        if candidate is not None:
            return candidate
    return None


def choose_arrangement(fits: Sequence[SliceFit], options: PlanOptions) -> SliceFit:
    """Of the arrangements of one slice the one that meets the targets best, or the first where none does: the
    soonest with each token where a throughput is asked for, else the one with the most tokens."""
    candidates = [meet_targets(fit, options) for fit in fits]
    found = [candidate for candidate in candidates if candidate is not None]

    def rank(candidate: Candidate) -> float:
        return candidate.tokens_per_s if options.target_throughput is None else -candidate.itl_s

    return max(found, key=rank).fit if found else fits[0]


def meet_targets(fit: SliceFit, options: PlanOptions) -> Candidate | None:
    """The most sequences whose tokens come fast enough, if they are tokens enough."""
    blueprint = fit.blueprint
    if blueprint is None or not fit.fits:
        return None
    most = count_sequences(blueprint, options.context)
    best: Candidate | None = None
    for rows in _row_counts(most):
        bound = bound_serving(blueprint, fit.where, rows * fit.num_copies, options.context)
        candidate = _judge(fit, bound, options.efficiency)
        if options.target_itl_ms is not None and candidate.itl_s * 1e3 > options.target_itl_ms:
            break
        best = candidate
        if options.target_throughput is not None and candidate.tokens_per_s >= options.target_throughput:
            return candidate
    return best if options.target_throughput is None else None


def price_rank(fit: SliceFit) -> tuple[float, float]:
    chip = fit.where.chip
    return fit.where.num_chips, chip.hbm_bytes_per_s * chip.devices_per_chip


def _judge(fit: SliceFit, bound: ServingBound, efficiency: float) -> Candidate:
    return Candidate(
        fit=fit,
        sequences=bound.sequences,
        itl_s=bound.itl_s / efficiency,
        tokens_per_s=bound.tokens_per_s * efficiency,
    )


def _row_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    counts = [1 << power for power in range(most.bit_length())]
    return [*counts, most] if most not in counts else counts
