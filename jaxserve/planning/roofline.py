"""The least time that a step can take on a chip, from its traffic and the chip's peaks: estimates.

A step takes at least as long as its bytes at the peak of the memory, and as its products at the peak of the
arithmetic, whichever is longer; sums over devices come on top. A step that goes through the layers in halves
(models/layer_loop.py) may hide them, and takes at least as long as they do. Programs do not reach peaks: what
is printed is a bound, and no promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxserve.blueprint import Blueprint, ModelSketch
from jaxserve.planning.slices import Slice, count_copies
from jaxserve.planning.traffic import StepWork, count_traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBound:
    """Seconds of one step, at the least."""

    memory_s: float
    compute_s: float
    sums_s: float
    may_hide_sums: bool = False

    @property
    def step_s(self) -> float:
        if self.may_hide_sums:
            return max(self.memory_s, self.compute_s, self.sums_s)
        return max(self.memory_s, self.compute_s) + self.sums_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingBound:
    """A slice that decodes `sequences` at once, over all copies of the model."""

    sequences: int
    rows_per_copy: int
    itl_s: float
    tokens_per_s: float
    limit: str  # "memory", "arithmetic" or "links": what takes most of the time
    fits_pool: bool  # whether so many sequences of that context have pages


def bound_step(sketch: ModelSketch, where: Slice, work: StepWork) -> StepBound:
    """The bound of one step on a slice, whose devices the sketch's `tp_size` share a layer."""
    traffic = count_traffic(sketch, work)
    chip = where.chip
    matmul_peak = chip.int8_flops if sketch.precision.quantization == "int8" else chip.bf16_flops
    return StepBound(
        memory_s=traffic.num_bytes / chip.hbm_bytes_per_s,
        compute_s=traffic.matmul_flops / matmul_peak + traffic.attention_flops / chip.bf16_flops,
        sums_s=traffic.num_sums * bound_sum(traffic.sum_bytes, sketch.tp_size, where),
        may_hide_sums=sketch.checkpoint.kernels.halves(work.num_chunk_tokens),
    )


def bound_ttft(blueprint: Blueprint, where: Slice, prompt_tokens: int) -> float:
    """Seconds from a prompt to its first token on a server that is idle: its chunks, one by one."""
    chunk_tokens = blueprint.sizes.chunk_tokens
    total_s = 0.0
    for start in range(0, prompt_tokens, chunk_tokens):
        num_tokens = min(chunk_tokens, prompt_tokens - start)
        work = StepWork(num_rows=0, context=start, num_chunk_tokens=num_tokens)
        total_s += bound_step(blueprint.sketch, where, work).step_s
    return total_s


def bound_serving(blueprint: Blueprint, where: Slice, sequences: int, context: int) -> ServingBound:
    """Decoding at a steady number of sequences, each of `context` tokens."""
    sketch = blueprint.sketch
    num_copies = count_copies(where.num_devices, sketch.tp_size, sketch.config.dp_size)
    rows = math.ceil(sequences / num_copies)
    bound = bound_step(blueprint.sketch, where, StepWork(num_rows=rows, context=context))
    shares = {"memory": bound.memory_s, "arithmetic": bound.compute_s, "links": bound.sums_s}
    return ServingBound(
        sequences=sequences,
        rows_per_copy=rows,
        itl_s=bound.step_s,
        tokens_per_s=sequences / bound.step_s,
        limit=max(shares, key=lambda name: shares[name]),
        fits_pool=rows <= count_sequences(blueprint, context),
    )


def count_sequences(blueprint: Blueprint, context: int) -> int:
    """How many sequences of `context` tokens one copy of the model holds at once."""
    pages = math.ceil(context / blueprint.sizes.page_size)
    return min(blueprint.sizes.max_rows, (blueprint.sizes.num_pages - 1) // pages)


def bound_sum(num_bytes: float, tp_size: int, where: Slice) -> float:
    """Seconds of one sum over the devices that share a layer. It sends twice (n - 1) / n of its bytes over
    the links of a device, and crosses the grid twice.

    Links are those of the device with the fewest: on each axis of the group's grid one, or two where it is a
    ring.
    """
    if tp_size == 1:
        return 0.0
    part = where.find_part(tp_size)
    chip, num_links, hops = part.chip, 1, 1
    if not chip.is_switched:
        axes = [(n, dim) for n, dim in zip(part.find_group(tp_size), part.dims, strict=True) if n > 1]
        rings = [n == dim and chip.wraps(dim, part.dims) for n, dim in axes]
        num_links = max(1, sum(2 if is_ring else 1 for is_ring in rings))
        hops = max(1, sum(n // 2 if ring else n - 1 for (n, _), ring in zip(axes, rings, strict=True)))
    sent_bytes = 2 * (tp_size - 1) / tp_size * num_bytes
    return sent_bytes / (num_links * chip.link_bytes_per_s) + 2 * hops * chip.hop_s
