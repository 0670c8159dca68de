"""Products by the matrices of experts, a tile of rows by the matrix of one: the specification.

The rows are those of tiles of R, one behind another; each tile is of one expert, and tiles from `num_tiles`
on hold nothing. No server runs this form: models/experts.py has a loop of its own, of whole MLPs.

    rows, in tiles of 2     a b | c - | d - | - -       expert_I  0 0 2 any      num_tiles  3

Letters beside the usual ones: E experts, I tiles, R rows of a tile, M rows of all (I x R). Knows nothing of
how tokens come to their experts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.int4_matmul.ref import Int4Matrix, dequantize


class Multiply(Protocol):
    """`grouped_matmul`, in whatever form."""

    def __call__(
        self,
        x_MD: jax.Array,
        w_EFD: jax.Array | Int4Matrix,
        expert_I: jax.Array,
        num_tiles: jax.Array,
        scale_EF: jax.Array | None = None,
        /,
    ) -> jax.Array: ...


class GroupedForm(NamedTuple):
    """A form of the product, and the tiles that it takes: powers of two of rows, within these."""

    multiply: Multiply
    least_rows: int
    most_rows: int


def grouped_matmul(
    x_MD: jax.Array,
    w_EFD: jax.Array | Int4Matrix,
    expert_I: jax.Array,
    num_tiles: jax.Array,
    scale_EF: jax.Array | None = None,
) -> jax.Array:
    """Each tile of x times the transpose of its expert's matrix: [M, F] float32.

    Of bf16 by bf16 or float8_e4m3fn, summed in float32, or of int8 by int8, summed in int32. `scale_EF`
    float32 is what each output is multiplied by. `expert_I` int32, those from `num_tiles` (int32) on within
    E. Where the matrices are those of several layers, the scales may be of one of them: expert e has those
    of e modulo their number. Or of bf16 by 4 bits, which are made bf16: an Int4Matrix whose three arrays have
    an axis of experts in front of that of outputs. Rows of absent tiles may hold anything.
    """
    x_IRD = x_MD.reshape(len(expert_I), -1, x_MD.shape[1])
    sum_dtype = jnp.int32 if x_MD.dtype == jnp.int8 else jnp.float32

    def take(expert: jax.Array) -> jax.Array:
        if not isinstance(w_EFD, Int4Matrix):
            return w_EFD[expert].astype(x_MD.dtype)
        q_EFC, scale_GEF, zero_GEF = w_EFD
        own = Int4Matrix(q_EFC[expert], scale_GEF[:, expert], zero_GEF[:, expert])
        return dequantize(own).astype(x_MD.dtype)

    def run_tile(index: jax.Array, y_IRF: jax.Array) -> jax.Array:
        w_FD = take(expert_I[index])
        y_RF = jax.lax.dot_general(
            x_IRD[index], w_FD, (((1,), (1,)), ((), ())), preferred_element_type=sum_dtype
        ).astype(jnp.float32)
        if scale_EF is not None:
            y_RF *= scale_EF[expert_I[index] % len(scale_EF)]
        return y_IRF.at[index].set(y_RF)

    num_outputs = jax.tree.leaves(w_EFD)[0].shape[1]
    y_IRF = jnp.zeros((*x_IRD.shape[:2], num_outputs), jnp.float32)
    return jax.lax.fori_loop(jnp.int32(0), num_tiles, run_tile, y_IRF).reshape(len(x_MD), -1)
