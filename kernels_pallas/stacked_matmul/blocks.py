"""How stacks of matrices are cut into the blocks that a TPU's products of few rows bring; which are served.

No size was ever timed on a TPU. Knows nothing of how blocks are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxserve.kernels_pallas.add_norm.tpu import MOST_NUMBERS

LANES = 128
SUBLANES = 8
MOST_ROWS = 64  # of 64, multiplying takes less time than a matrix takes to arrive, by the compiler's schedule
# On a chip of one core. XLA's products of larger ones take about the time of their bytes, by the compiler's
# estimate; where two cores share a matrix they take a tenth more and longer.
MOST_MATRIX_BYTES = 48 << 20
BLOCK_BYTES = 512 << 10
MOST_BLOCK_BYTES = 2 << 20  # where nothing smaller cuts both axes evenly
SHORTEST_RUN = 512  # inputs of a block, a kilobyte of each of its rows
MOST_IDLE = 1.25  # times the outputs of a core, were they cut evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a stack of matrices is cut."""

    num_parts: int  # P
    num_outputs: int  # of a part
    num_inputs: int
    block_outputs: int  # R
    block_inputs: int  # K
    num_cores: int

    @property
    def num_visits(self) -> int:
        return self.num_outputs // self.block_outputs

    @property
    def steps_per_visit(self) -> int:
        return self.num_inputs // self.block_inputs

    @property
    def core_visits(self) -> int:
        """Of the core that has the most."""
        return -(-self.num_visits // self.num_cores)

    @property
    def block_bytes(self) -> int:
        return 2 * self.num_parts * self.block_outputs * self.block_inputs

    @property
    def least_steps(self) -> int:
        return self.num_visits // self.num_cores * self.steps_per_visit

    @property
    def declared_bytes(self) -> int:
        """What the time of the product is that of: the blocks of the core with the most, for each core, and
        the first once more, as nothing is multiplied while it arrives."""
        return self.num_cores * self.block_bytes * (self.core_visits * self.steps_per_visit + 1)


def choose_blocks(num_outputs: int, num_inputs: int, num_parts: int, num_cores: int) -> Blocks | None:
    """The blocks of a matrix of `num_parts` times `num_outputs` rows; None where cores would idle.

    Whole lanes of outputs and inputs, or all of them: as many inputs as fit, for long runs of bytes.
    """
    found = [
        Blocks(
            num_parts=num_parts,
            num_outputs=num_outputs,
            num_inputs=num_inputs,
            block_outputs=block_outputs,
            block_inputs=block_inputs,
            num_cores=num_cores,
        )
        for block_outputs in _list_parts(num_outputs)
        for block_inputs in _list_parts(num_inputs)
    ]

    def count_idle(blocks: Blocks) -> float:
        return blocks.core_visits * num_cores / blocks.num_visits

    def rank(blocks: Blocks) -> tuple:
        excess_bytes = max(blocks.block_bytes - BLOCK_BYTES, 0)
        return -count_idle(blocks), -excess_bytes, blocks.block_inputs, blocks.block_outputs

    shortest = min(SHORTEST_RUN, num_inputs)
    found = [blocks for blocks in found if blocks.block_inputs >= shortest and blocks.least_steps]
    found = [blocks for blocks in found if blocks.block_bytes <= MOST_BLOCK_BYTES]
    return max((blocks for blocks in found if count_idle(blocks) <= MOST_IDLE), key=rank, default=None)


def _list_parts(length: int) -> list[int]:
    return sorted({*(part for part in range(LANES, length, LANES) if length % part == 0), length})


def serves(num_rows: int, w_LFD: Any, num_parts: int = 1, *, num_cores: int = 1) -> bool:
    """Whether the products serve rows of such a stack of matrices."""
    num_outputs, num_inputs = w_LFD.shape[1] // num_parts, w_LFD.shape[2]
    matrix_bytes = 2 * w_LFD.shape[1] * num_inputs
    return (
        w_LFD.dtype == jnp.bfloat16
        and (matrix_bytes <= MOST_MATRIX_BYTES or num_cores > 1)
        and num_rows <= MOST_ROWS
        and num_rows * max(num_inputs, num_outputs) <= MOST_NUMBERS
        and num_outputs % (2 * SUBLANES) == 0
        and num_inputs % LANES == 0  # or XLA would copy the stack into whole lanes
        and choose_blocks(num_outputs, num_inputs, num_parts, num_cores) is not None
    )
