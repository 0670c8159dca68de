"""Products by 4-bit matrices: the cases that every form must get right, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.int4_matmul.ref import HALF, RUN, Int4Matrix


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int
    num_outputs: int
    num_inputs: int
    group_size: int
    num_shares: int = 1


CASES = [
    Case("one token", 1, 64, 128, 128),
    Case("two groups in a run", 3, 64, 256, 64),
    Case("a group over two runs, shares", 9, 128, 512, 256, num_shares=2),
    Case("shares of unequal length, more runs than places", 16, 64, 11 * 128, 128, num_shares=2),
]


def make_matrix(case: Case) -> tuple[Int4Matrix, np.ndarray]:
    """Random values, and the matrix in float64."""
    rng = np.random.default_rng(case.num_inputs)
    q_FRD = rng.integers(0, 16, (case.num_outputs, case.num_inputs // RUN, RUN))
    byte_FRH = (q_FRD[:, :, :HALF] | ((q_FRD[:, :, HALF:] - 8) & 15) << 4).astype(np.uint8)
    num_groups = case.num_inputs // case.group_size
    scale_GF = rng.uniform(0.01, 0.03, (num_groups, case.num_outputs)).astype(np.float16)
    zero_GF = rng.integers(0, 16, (num_groups, case.num_outputs)).astype(np.int8)
    group_D = np.arange(case.num_inputs) // case.group_size
    q_FD = q_FRD.reshape(case.num_outputs, -1)
    w_FD = scale_GF.astype(np.float64)[group_D].T * (q_FD - zero_GF[group_D].T)
    q_FC = byte_FRH.reshape(case.num_outputs, -1).view(np.int8)
    return Int4Matrix(jnp.asarray(q_FC), jnp.asarray(scale_GF), jnp.asarray(zero_GF)), w_FD


def make_tokens(case: Case) -> jax.Array:
    x_TD = np.random.default_rng(1).standard_normal((case.num_tokens, case.num_inputs), np.float32)
    return jnp.asarray(x_TD, jnp.bfloat16)  # from the start: what differs then is the product
