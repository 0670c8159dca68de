"""A core's blocks of a layer's matrix, on their way from the stack of all layers while others are multiplied:
the part that launches with products of few rows share.

Letters as in tpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.stacked_matmul.blocks import LANES, Blocks

MOST_UNDER_WAY = 16
DIMS = (((1,), (1,)), ((), ()))


def list_stream_scratch(cuts: list[Blocks], buffer_bytes: int) -> dict[str, list[Any]]:
    """Room for the blocks under way of each matrix, and their semaphores, by fields of Stream."""
    scratch: dict[str, list[Any]] = {"arriving": [], "arrived": []}
    for blocks, depth in zip(cuts, _choose_depths(cuts, buffer_bytes), strict=True):
        block = (depth, blocks.num_parts, blocks.block_outputs, blocks.block_inputs)
        scratch["arriving"].append(pltpu.VMEM(block, jnp.bfloat16))
        scratch["arrived"].append(pltpu.SemaphoreType.DMA((depth,)))
    return scratch


def _choose_depths(cuts: list[Blocks], buffer_bytes: int) -> list[int]:
    """Blocks of each matrix under way: no more than a core has, nor than the matrix before made room for."""
    depths, most = [], MOST_UNDER_WAY
    for blocks in cuts:
        most = min(most, max(buffer_bytes // blocks.block_bytes, 2), blocks.least_steps)
        depths.append(most)
    return depths


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One core's blocks of one matrix, in their order."""

    blocks: Blocks
    layer: Any
    first_visit: Any
    num_visits: Any
    w_LPFD: Any
    arriving_SPRK: Any
    arrived_S: Any

    @property
    def depth(self) -> int:
        return self.arrived_S.shape[0]

    @property
    def num_steps(self) -> Any:
        return self.num_visits * self.blocks.steps_per_visit

    def find_outputs(self, visit: Any) -> Any:
        """The outputs of a visit, as a slice of a part."""
        count = self.blocks.block_outputs
        if self.blocks.num_visits == 1:  # of no whole lanes, perhaps
            return pl.ds(0, count)
        return pl.ds(pl.multiple_of((self.first_visit + visit) * count, LANES), count)

    def _copy(self, step: Any) -> Any:
        count, num_steps = self.blocks.block_inputs, self.blocks.steps_per_visit
        first = 0 if num_steps == 1 else pl.multiple_of(jax.lax.rem(step, num_steps) * count, LANES)
        inputs = pl.ds(first, count)
        outputs = self.find_outputs(step // num_steps)
        slot = jax.lax.rem(step, self.depth)
        return pltpu.make_async_copy(
            self.w_LPFD.at[self.layer, :, outputs, inputs],
            self.arriving_SPRK.at[slot],
            self.arrived_S.at[slot],
        )

    def start(self, step: Any) -> None:
        self._copy(step).start()

    def wait(self, step: Any) -> Any:
        """The block [P, R, K] of a step, once it is there."""
        self._copy(step).wait()
        return self.arriving_SPRK.at[jax.lax.rem(step, self.depth)]


def begin_stream(
    blocks: Blocks, core: Any, layer: Any, w_LPFD: Any, arriving_SPRK: Any, arrived_S: Any
) -> Stream:
    """A core's stream of a matrix."""
    first_visit = core * blocks.core_visits
    return Stream(
        blocks=blocks,
        layer=layer,
        first_visit=first_visit,
        num_visits=jnp.minimum(blocks.core_visits, blocks.num_visits - first_visit),
        w_LPFD=w_LPFD,
        arriving_SPRK=arriving_SPRK,
        arrived_S=arrived_S,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The products [T, F] of a stream, which leave for HBM visit by visit."""

    stream: Stream
    leaving_VTR: Any
    left: Any
    out_TF: Any

    def send(self, visit: Any, value_TR: jax.Array) -> None:
        self.leaving_VTR[visit] = value_TR.astype(self.out_TF.dtype)
        self._copy(visit).start()

    def wait(self) -> None:
        """For all that were sent."""
        repeat(self.stream.num_visits, lambda visit: self._copy(visit).wait())

    def _copy(self, visit: Any) -> Any:
        target = self.out_TF.at[:, self.stream.find_outputs(visit)]
        return pltpu.make_async_copy(self.leaving_VTR.at[visit], target, self.left)


def repeat(count: Any, run: Callable[[Any], None]) -> None:
    def run_next(i: Any, carry: Any) -> Any:
        run(i)
        return carry

    jax.lax.fori_loop(0, count, run_next, jnp.int32(0))


def multiply_stream(
    stream: Stream, x_TD: Any, finish: Callable[[Any, list[jax.Array]], None], following: Stream | None
) -> None:
    """`finish(visit, sums)` of each visit, with [T, R] of each part. The room of a block is given to the next
    one that is not under way, of the following matrix once there is none of this."""
    blocks = stream.blocks

    def visit_next(visit: Any, carry: Any) -> Any:
        sums = [jnp.zeros((x_TD.shape[0], blocks.block_outputs), jnp.float32)] * blocks.num_parts
        for i in range(blocks.steps_per_visit):
            step = visit * blocks.steps_per_visit + i
            w_PRK = stream.wait(step)
            x_TK = x_TD[:, i * blocks.block_inputs : (i + 1) * blocks.block_inputs]
            for part in range(blocks.num_parts):
                sums[part] += jax.lax.dot_general(x_TK, w_PRK[part], DIMS, preferred_element_type=jnp.float32)
            later = step + stream.depth
            pl.when(later < stream.num_steps)(partial(stream.start, later))
            if following is not None:
                other = later - stream.num_steps
                pl.when((other >= 0) & (other < following.depth))(partial(following.start, other))
        finish(visit, sums)
        return carry

    jax.lax.fori_loop(0, stream.num_visits, visit_next, jnp.int32(0))
