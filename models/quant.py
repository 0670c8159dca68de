"""Quantised matrices: int8 weights with a float32 scale a row, and the products that read them.

`matmul` is the only way a model multiplies by a weight, so a family file reads the same whatever the
weight's type. int8 is W8A8: activations are quantised per row on the fly and the product accumulates in
int32, because on the CPU XLA converts an int8 weight in the graph at a tenth of the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8Matrix(NamedTuple):
    """A [output, input] matrix as int8 values and one float32 scale an output row (absmax / 127)."""

    q_FD: jax.Array
    scale_F: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q_FD.shape


Matrix = jax.Array | Int8Matrix


def matmul(x_TD: jax.Array, w_FD: Matrix) -> jax.Array:
    """x @ w.T in float32: [T, D] times [F, D] gives [T, F] float32, whatever the weight's dtype.

    bf16 operands accumulate in float32 (asked for explicitly: without it XLA's CPU backend converts the
    whole weight). int8: x is quantised per row (absmax / 127, round to nearest).
    """
    contract_last = (((1,), (1,)), ((), ()))
    if isinstance(w_FD, Int8Matrix):
        x_TD = x_TD.astype(jnp.float32)
        absmax_T1 = jnp.max(jnp.abs(x_TD), axis=1, keepdims=True)
        scale_T1 = jnp.maximum(absmax_T1, 1e-12) / 127.0
        q_TD = jnp.round(x_TD / scale_T1).astype(jnp.int8)
        y_TF = jax.lax.dot_general(q_TD, w_FD.q_FD, contract_last, preferred_element_type=jnp.int32)
        return y_TF.astype(jnp.float32) * scale_T1 * w_FD.scale_F[None, :]
    return jax.lax.dot_general(
        x_TD.astype(w_FD.dtype), w_FD, contract_last, preferred_element_type=jnp.float32
    )


def embed(token_ids_T: jax.Array, w_VD: Matrix) -> jax.Array:
    """Rows of an embedding matrix: [T] int32 to [T, D] float32."""
    if isinstance(w_VD, Int8Matrix):
        return w_VD.q_FD[token_ids_T].astype(jnp.float32) * w_VD.scale_F[token_ids_T][:, None]
    return w_VD[token_ids_T].astype(jnp.float32)
