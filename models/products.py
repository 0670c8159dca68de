"""A layer's products, with the adds and norms before them: in few launches where rows are few and a kernel
reads matrices where they lie in the stack of all layers, and one operation behind the other elsewhere.

Called by the families' layers. Knows no kernels by name; of attention, that a whole block may be one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels_pallas.attention_block.ref import BlockWeights
from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.kernels_pallas.stacked_matmul.ref import StackedForm
from jaxserve.models.interface import KVLayer, StepBatch
from jaxserve.models.quant import Matrix, QuantizedMatrix, gated_mlp, matmul, operand_dtype


class AttentionParams(Protocol):
    """What a layer's attention block has."""

    attn_norm_D: nnx.Param
    w_qkv_FD: nnx.Param
    b_qkv_F: nnx.Param | None
    w_o_DF: nnx.Param
    q_norm_H: nnx.Param | None
    k_norm_H: nnx.Param | None


@dataclass(frozen=True, slots=True)
class LayerProducts:
    """The products of one layer. Its parameters are those of the layer alone where `layer` is None, else
    stacks of all layers', with an axis in front, of which `layer`, an int32, is meant."""

    kernels: KernelSet
    layer: jax.Array | None
    eps: float  # of the norms

    def pick(self, param: nnx.Param) -> Any:
        """The layer's own value of a parameter: XLA's operations read it where it lies."""
        value = param.get_value()
        return value if self.layer is None else jax.tree.map(partial(_take, layer=self.layer), value)

    def leave_in_stack(self, param: nnx.Param) -> Matrix:
        """A matrix for a kernel that reads the layer's where it lies, as what is cut out for one is copied.
        Its scales are the layer's own, which are few."""
        value = param.get_value()
        if self.layer is None or not isinstance(value, QuantizedMatrix):
            return value
        return replace(value, scale_F=_take(value.scale_F, self.layer))

    def multiply(self, x_TD: jax.Array, w_FD: nnx.Param) -> jax.Array:
        """x @ w.T, as `matmul`, of the last product of a block: [T, F] float32, or what devices add up. x may
        be several arrays whose sum it is, [C, T, D]."""
        form, value = self._find_form(x_TD, w_FD), w_FD.get_value()
        if form is None:
            return matmul(x_TD if x_TD.ndim == 2 else jnp.sum(x_TD, axis=0), self.pick(w_FD))
        dtype = self.kernels.shards.output_dtype(x_TD.shape[-2], value.shape[-2])
        return form.multiply(x_TD, value, self.layer, dtype=dtype)

    def add_norm(
        self, x_TD: jax.Array, y_TD: jax.Array | None, norm_D: nnx.Param, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """x + y, or x where y is None, and its norm, which products round to `dtype`: [T, D] both."""
        norm = norm_D.get_value()
        return self.kernels.add_norm(x_TD, y_TD, norm, self.layer, eps=self.eps, dtype=dtype)

    def norm_multiply(
        self,
        x_TD: jax.Array,
        y_TD: jax.Array | None,
        norm_D: nnx.Param,
        w_FD: nnx.Param,
        b_F: nnx.Param | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """x + y, and the product of its norm, with the bias if there is one: float32 [T, D] and [T, F]."""
        form = self._find_form(x_TD, w_FD)
        if form is not None and y_TD is not None:
            norm_LD, w_LFD = norm_D.get_value(), w_FD.get_value()
            b_LF = None if b_F is None else b_F.get_value()
            return form.norm_multiply(x_TD, y_TD, norm_LD, w_LFD, b_LF, self.layer, eps=self.eps)
        x_TD, h_TD = self.add_norm(x_TD, y_TD, norm_D, operand_dtype(w_FD.get_value()))
        y_TF = matmul(h_TD, self.pick(w_FD))
        return x_TD, keep_channels(y_TF) if b_F is None else y_TF + self.pick(b_F)

    def norm_mlp(
        self,
        x_TD: jax.Array,
        y_TD: jax.Array | None,
        norm_D: nnx.Param,
        w_gate_up_FD: nnx.Param,
        w_down_DF: nnx.Param,
    ) -> tuple[jax.Array, jax.Array]:
        """x + y, float32, and the gated MLP of its norm, in the dtype of `multiply`: [T, D] both."""
        form = self._find_form(x_TD, w_gate_up_FD, num_parts=2)
        if form is not None and y_TD is not None and self._find_form(x_TD, w_down_DF) is not None:
            values = [param.get_value() for param in (norm_D, w_gate_up_FD, w_down_DF)]
            dtype = self.kernels.shards.output_dtype(*x_TD.shape)
            return form.norm_mlp(x_TD, y_TD, *values, self.layer, eps=self.eps, dtype=dtype)
        x_TD, h_TD = self.add_norm(x_TD, y_TD, norm_D, operand_dtype(w_gate_up_FD.get_value()))
        return x_TD, gated_mlp(h_TD, self.pick(w_gate_up_FD), self.pick(w_down_DF))

    def find_block(
        self, x_TD: jax.Array, y_TD: jax.Array | None, layer: AttentionParams, kv: KVLayer, batch: StepBatch
    ) -> Callable[..., tuple[jax.Array, jax.Array, KVLayer]] | None:
        """The whole attention block as one launch, if there is one for the rows of this step: given
        `num_heads` and `scale` it does all from `norm_multiply` to `multiply`."""
        form, work = self.kernels.attention_block, batch.work
        params = (
            layer.attn_norm_D,
            layer.w_qkv_FD,
            layer.b_qkv_F,
            layer.w_o_DF,
            layer.q_norm_H,
            layer.k_norm_H,
        )
        weights = BlockWeights(*(None if param is None else param.get_value() for param in params))
        matrices = weights.w_qkv_LFD, weights.w_o_LDF
        if form is None or y_TD is None or work is None or self.layer is None:
            return None
        if len(batch.chunk_slot_C) or not all(isinstance(w_LFD, jax.Array) for w_LFD in matrices):
            return None
        if not form.serves(len(x_TD), *matrices, kv):
            return None
        rows = batch.rope, batch.write_index_T, work.begin_at(batch.first_page).decode
        dtype = self.kernels.shards.output_dtype(*x_TD.shape)
        return partial(form.attend, x_TD, y_TD, weights, self.layer, kv, *rows, eps=self.eps, dtype=dtype)

    def _find_form(self, x_TD: jax.Array, w_FD: nnx.Param, num_parts: int = 1) -> StackedForm | None:
        """The form that reads the matrix in its stack, where there is one that serves these rows."""
        form, value = self.kernels.stacked, w_FD.get_value()
        if form is None or self.layer is None or not isinstance(value, jax.Array):
            return None
        return form if form.serves(x_TD.shape[-2], value, num_parts) else None


def _take(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def keep_channels(y_TF: jax.Array) -> jax.Array:
    """The same, of a product whose channels become heads with nothing between: XLA for TPUs would give the
    weight their shape instead, and copy it out of its stack for that."""
    return jax.lax.platform_dependent(y_TF, tpu=jax.lax.optimization_barrier, default=lambda y_TF: y_TF)
