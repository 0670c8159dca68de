"""How a batch of logits is divided among the blocks of the sampling kernels, and what they read of its rows.

A row is lines of 128 logits, one for each thread of a warpgroup; sixteen lines are a slab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.kernels_pallas import mosaic

LINE = 128  # logits of a line
LOG2_E = np.float32(np.log2(np.e))
SLAB_LINES = 16  # lines of the scan's unit of work: four for each warp
SLABS_ALIGNED = 8  # slabs of a row come in multiples of this, so that line statistics fill whole vectors
LINES_TO_SHARE = 128  # of a row: fewer are left to one warpgroup
WANTED_BLOCKS = 8 * mosaic.H200_NUM_SMS  # of the scan: enough bytes in flight to saturate the memory


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one batch of logits is divided."""

    num_rows: int
    num_lines: int
    slabs_per_block: int
    num_teams: int  # warpgroups that share a row in the second kernel

    @property
    def num_slabs(self) -> int:
        """Of a row; the last ones may only repeat lines, which do not count again."""
        slabs = -(-self.num_lines // SLAB_LINES)
        return -(-slabs // SLABS_ALIGNED) * SLABS_ALIGNED

    @property
    def num_blocks(self) -> int:
        return self.num_slabs // self.slabs_per_block

    @property
    def num_slots(self) -> int:
        return self.num_slabs * SLAB_LINES


class Rows(NamedTuple):
    """What the kernels read of each row's parameters, arrays of B."""

    temperature: jax.Array  # 1 for greedy rows
    top_k: jax.Array
    top_p: jax.Array
    log_min_p: jax.Array
    is_greedy: jax.Array  # int32
    is_cut: jax.Array  # int32: whether top-k, top-p or min-p cut anything
    key_0: jax.Array  # uint32
    key_1: jax.Array


def plan(
    num_rows: int, vocab_size: int, *, slabs_per_block: int | None = None, num_teams: int | None = None
) -> Geometry:
    """The division for logits [num_rows, vocab_size]: blocks enough to fill the card, and no more.

    `slabs_per_block` (1, 2, 4 or 8) and `num_teams` (1, 2, 4 or 8) override what would be chosen.
    """
    num_lines = max(-(-vocab_size // LINE), SLAB_LINES)
    if num_teams is None:
        num_teams = 1 if num_lines < LINES_TO_SHARE else 2 if num_rows > mosaic.H200_NUM_SMS else 4
    for count in (slabs_per_block,) if slabs_per_block else (8, 4, 2, 1):
        geometry = Geometry(num_rows, num_lines, count, num_teams)
        if num_rows * geometry.num_blocks >= WANTED_BLOCKS:
            break
    return geometry
