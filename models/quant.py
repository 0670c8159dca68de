"""Quantised matrices: int8 weights with a float32 scale a row, and the products that read them.

`matmul` is the only way a model multiplies by a weight, so a family file reads the same whatever the
weight's type. Activations of an int8 product are int8 too, because on the CPU XLA converts an int8 weight in
the graph at a tenth of the speed; two int8 terms an activation, because one loses too much (see `matmul`).
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
    whole weight).

    int8: x is the sum of two int8 terms, its rounding to 1/127 of the row's absmax and the rounding of what
    that leaves, and both go through one product as twice the rows, accumulated in int32. A single term
    costs SmolLM2 135M 6.4 % of perplexity and Qwen2.5 0.5B 3.3 %, two cost 0.3 % and 0.5 %, as much as
    float32 activations do. Decode reads the weight once either way; one row becomes the two that the CPU
    wants at least.
    """
    contract_last = (((1,), (1,)), ((), ()))
    if isinstance(w_FD, Int8Matrix):
        num_tokens = x_TD.shape[0]
        coarse_TD, coarse_scale_T1 = _quantize_rows(x_TD.astype(jnp.float32))
        rest_TD, rest_scale_T1 = _quantize_rows(x_TD - coarse_TD.astype(jnp.float32) * coarse_scale_T1)
        both_UD = jnp.concatenate([coarse_TD, rest_TD])  # U = 2 T
        y_UF = jax.lax.dot_general(both_UD, w_FD.q_FD, contract_last, preferred_element_type=jnp.int32)
        y_TF = y_UF[:num_tokens] * coarse_scale_T1 + y_UF[num_tokens:] * rest_scale_T1
        return y_TF * w_FD.scale_F[None, :]
    # Float32 weights mean float32 products: TPUs and GPUs would round the operands unless told so.
    precision = jax.lax.Precision.HIGHEST if w_FD.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x_TD.astype(w_FD.dtype),
        w_FD,
        contract_last,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _quantize_rows(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 values and one float32 scale a row: absmax / 127, round to nearest."""
    scale_T1 = jnp.maximum(jnp.max(jnp.abs(x_TD), axis=1, keepdims=True), 1e-12) / 127.0
    return jnp.round(x_TD / scale_T1).astype(jnp.int8), scale_T1


def embed(token_ids_T: jax.Array, w_VD: Matrix) -> jax.Array:
    """Rows of an embedding matrix: [T] int32 to [T, D] float32."""
    if isinstance(w_VD, Int8Matrix):
        return w_VD.q_FD[token_ids_T].astype(jnp.float32) * w_VD.scale_F[token_ids_T][:, None]
    return w_VD[token_ids_T].astype(jnp.float32)
