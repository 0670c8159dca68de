"""Quantised matrices and the products that read them: int8 or fp8 with a float32 scale an output row, and
4-bit values in groups (kernels_pallas/int4_matmul).

`matmul` is the only way a model multiplies by a weight, so a family file reads the same whatever the
weight's type. fp8 is of weights only and meant for GPUs, where it halves what bf16 weights take. Activations
of an int8 product are int8 too, because on the CPU XLA converts an int8 weight in the graph at a tenth of the
speed.

Both operands of an int8 product are rotated, run by run of channels (kernels_pallas/round_rows says why):
weights while they are loaded, activations where they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.kernels_pallas.int4_matmul.ref import (
    Int4Matrix as Int4Matrix,
)  # what a loader makes of 4-bit values
from jaxserve.kernels_pallas.round_rows import ref as round_rows_ref
from jaxserve.kernels_pallas.round_rows.ref import RoundRows, hadamard, quantize, rotate
from jaxserve.kernels_pallas.rounding import to_bf16
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards

# Measured on the CPU (2 cores, AMX). Of more tokens, reading a product across its rows takes longer than is
# won, and so does an MLP that stays transposed.
MOST_TRANSPOSED_TOKENS = 16
MOST_TRANSPOSED_MLP_TOKENS = 64

# XLA's code for TPUs of looking up rows of bf16 grows with the rows, and takes a second to compile for 256.
LOOKED_UP_TOKENS = 32


@partial(jax.tree_util.register_dataclass, data_fields=["q_FD", "scale_F"], meta_fields=["round_rows"])
@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A [output, input] matrix as values of one byte and one float32 scale an output row.

    int8: rotated, scale = absmax / 127; with the form in which activations are rotated and rounded for it.
    float8_e4m3fn: not rotated, scale = absmax / 448.
    """

    q_FD: jax.Array
    scale_F: jax.Array
    round_rows: RoundRows = round_rows_ref.round_rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q_FD.shape

    @property
    def is_int8(self) -> bool:
        return self.q_FD.dtype == jnp.int8


@partial(jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["multiply"])
@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """A [output, input] matrix of 4-bit values, with the form of the product that was chosen at start."""

    packed: Int4Matrix
    multiply: Callable[[jax.Array, Int4Matrix], jax.Array]


Matrix = jax.Array | QuantizedMatrix | GroupedMatrix


def bind_kernels(params: Mapping[str, Any], kernels: KernelSet) -> dict[str, Any]:
    """Loaded parameters, or what describes them, as a model takes them: 4-bit matrices know their product,
    and those of int8 how activations are rounded for them."""

    def bind(w: Any) -> Any:
        if isinstance(w, Int4Matrix):
            return GroupedMatrix(w, kernels.int4_matmul)
        is_int8 = isinstance(w, QuantizedMatrix) and w.is_int8
        return replace(w, round_rows=kernels.round_rows) if is_int8 else w

    return {path: bind(w) for path, w in params.items()}


def matmul(x_TD: jax.Array, w_FD: Matrix) -> jax.Array:
    """x @ w.T in float32: [T, D] times [F, D] gives [T, F] float32, whatever the weight's dtype.

    bf16 operands accumulate in float32 (asked for explicitly: without it XLA's CPU backend converts the
    whole weight). int8: x is rotated and rounded to 1/127 of its row's absmax; sums are int32. fp8: only the
    weight is; it is converted to bf16 within the product on GPUs, and before it on the CPU. 4 bits: only the
    weight; x is rounded to bf16.
    """
    x_TD, scale_T1 = make_operand(x_TD, w_FD)
    if isinstance(w_FD, GroupedMatrix):
        return w_FD.multiply(x_TD, w_FD.packed)
    if not isinstance(w_FD, QuantizedMatrix):
        return _product(x_TD, w_FD, jnp.float32)
    if scale_T1 is not None:
        y_TF = _product(x_TD, w_FD.q_FD, jnp.int32) * scale_T1
    else:
        y_TF = _product(x_TD, w_FD.q_FD.astype(jnp.bfloat16), jnp.float32)
    return y_TF * w_FD.scale_F[None, :]


def operand_dtype(w_FD: Matrix) -> jnp.dtype:
    """What rows are rounded to before a product by that matrix."""
    return jnp.dtype(jnp.bfloat16) if isinstance(w_FD, QuantizedMatrix | GroupedMatrix) else w_FD.dtype


def make_operand(x_TD: jax.Array, w_FD: Matrix) -> tuple[jax.Array, jax.Array | None]:
    """x as a product by that matrix takes it, and what its rows of int8 are to be multiplied by behind."""
    if isinstance(w_FD, QuantizedMatrix) and w_FD.is_int8:
        return w_FD.round_rows(x_TD)
    x_TD, dtype = x_TD.astype(jnp.float32), operand_dtype(w_FD)
    return to_bf16(x_TD) if dtype == jnp.bfloat16 else x_TD.astype(dtype), None


def _product(x_TD: jax.Array, w_FD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[T, F], summed in `dtype`."""
    multiply = partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        # Float32 weights mean float32 products: TPUs and GPUs would round the operands unless told so.
        precision=jax.lax.Precision.HIGHEST if w_FD.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )
    if x_TD.shape[0] > MOST_TRANSPOSED_TOKENS:
        return multiply(x_TD, w_FD)
    return jax.lax.platform_dependent(
        x_TD, w_FD, cpu=partial(_multiply_weight_first, multiply), default=multiply
    )


def _multiply_weight_first(multiply: Callable[..., jax.Array], x_TD: jax.Array, w_FD: jax.Array) -> jax.Array:
    """XLA's CPU backend copies the right operand of a product into another order first, which for a weight
    takes as long as reading it. And one row of int8 or bf16 takes it twenty times as long as two."""
    num_tokens = x_TD.shape[0]
    if num_tokens == 1 and w_FD.dtype != jnp.float32:
        x_TD = jnp.pad(x_TD, ((0, 1), (0, 0)))
    # Behind a barrier, for XLA would turn the transpose of a product into the product that is avoided here.
    y_FT = jax.lax.optimization_barrier(multiply(w_FD, x_TD))
    return y_FT[:, :num_tokens].T


def gated_mlp(x_TD: jax.Array, w_gate_up_FD: Matrix, w_down_DF: Matrix) -> jax.Array:
    """(silu(x gate^T) * (x up^T)) down^T: [T, D] float32. The rows of gate stand before those of up."""
    is_int8 = all(isinstance(w, QuantizedMatrix) and w.is_int8 for w in (w_gate_up_FD, w_down_DF))
    if not is_int8 or not MOST_TRANSPOSED_TOKENS < x_TD.shape[0] <= MOST_TRANSPOSED_MLP_TOKENS:
        return _gated_mlp(x_TD, w_gate_up_FD, w_down_DF)
    return jax.lax.platform_dependent(
        x_TD, w_gate_up_FD, w_down_DF, cpu=_transposed_gated_mlp, default=_gated_mlp
    )


def _gated_mlp(x_TD: jax.Array, w_gate_up_FD: Matrix, w_down_DF: Matrix) -> jax.Array:
    gate_TF, up_TF = jnp.split(matmul(x_TD, w_gate_up_FD), 2, axis=1)
    return matmul(jax.nn.silu(gate_TF) * up_TF, w_down_DF)


def _transposed_gated_mlp(
    x_TD: jax.Array, w_gate_up_FD: QuantizedMatrix, w_down_DF: QuantizedMatrix
) -> jax.Array:
    """The same with the weights as left operands (see `_multiply_weight_first`), tokens last in between."""
    multiply = partial(jax.lax.dot_general, preferred_element_type=jnp.int32)
    q_TD, scale_T1 = w_gate_up_FD.round_rows(x_TD)
    y_FT = multiply(w_gate_up_FD.q_FD, q_TD, (((1,), (1,)), ((), ())))
    y_FT = jax.lax.optimization_barrier(y_FT) * scale_T1.T * w_gate_up_FD.scale_F[:, None]
    gate_FT, up_FT = jnp.split(y_FT, 2, axis=0)
    h_FT = jax.nn.silu(gate_FT) * up_FT
    h_HH = jnp.asarray(hadamard(h_FT.shape[0]), jnp.bfloat16)
    h_RHT = to_bf16(h_FT).reshape(-1, h_HH.shape[0], h_FT.shape[1])
    h_RHT = jnp.einsum("gh,rht->rgt", h_HH, h_RHT, preferred_element_type=jnp.float32)
    q_FT, scale_1T = quantize(h_RHT.reshape(h_FT.shape), axis=0)
    y_DT = jax.lax.optimization_barrier(multiply(w_down_DF.q_FD, q_FT, (((1,), (0,)), ((), ()))))
    return (y_DT * scale_1T * w_down_DF.scale_F[:, None]).T


def embed(token_ids_T: jax.Array, w_VD: Matrix, shards: Shards = ONE_DEVICE) -> jax.Array:
    """Rows of an embedding matrix: [T] int32 to [T, D] float32. Each of `shards` has some of the rows."""
    assert not isinstance(w_VD, GroupedMatrix), "rows of 4-bit values are not looked up"

    def look_up(row_T: jax.Array) -> jax.Array:
        if not isinstance(w_VD, QuantizedMatrix):
            return _take(w_VD, row_T)
        return _take(w_VD.q_FD, row_T) * _take(w_VD.scale_F, row_T)[..., None]

    def look_up_in_turns(row_T: jax.Array) -> jax.Array:
        return jax.lax.map(look_up, row_T, batch_size=LOOKED_UP_TOKENS)

    row_T = shards.find_own(token_ids_T, w_VD.shape[0])
    if row_T.shape[0] <= LOOKED_UP_TOKENS:
        x_TD = look_up(row_T)
    else:
        x_TD = jax.lax.platform_dependent(row_T, tpu=look_up_in_turns, default=look_up)
    x_TD = shards.add_outputs(x_TD).astype(jnp.float32)  # exact for rows of bf16, to which others add zeros
    is_rotated = isinstance(w_VD, QuantizedMatrix) and w_VD.is_int8
    return rotate(x_TD) if is_rotated else x_TD


def _take(w_VD: jax.Array, row_T: jax.Array) -> jax.Array:
    """Rows as float32, zeros for one behind the last."""
    return w_VD.at[row_T].get(mode="fill", fill_value=0).astype(jnp.float32)
