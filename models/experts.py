"""Mixture of experts: which experts a token goes to, and the MLPs of those that are chosen.

A token goes to some of the E experts, in a copy each. The copies are sorted by expert, and each expert's are
filled up to whole tiles of rows, so that a tile is one MLP. Only tiles that are there are run: what nobody
chose is neither read nor multiplied by. A kernel multiplies all tiles by the matrices of their experts at
once (kernels_pallas/grouped_matmul). Where there is none, a loop runs one tile behind the other; on a GPU
each of its turns waits for the host.

    copies by expert    e0: a b c | e1: none | e2: d
    rows, in tiles of 2     a b | c - | d -

Letters beside the usual ones: K experts of a token, P copies (T x K), I tiles, M rows of all tiles, R of one.
The matrices of all experts lie below each other: they are loaded, cut and quantised like any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.grouped_matmul.limits import ExpertShape
from jaxserve.kernels_pallas.grouped_matmul.ref import GroupedForm
from jaxserve.models.quant import (
    GroupedMatrix,
    Int4Matrix,
    Matrix,
    QuantizedMatrix,
    gated_mlp,
    make_operand,
)

MOST_TILE_ROWS = 64  # of the loop's; more of them are filled up in vain


class Tiles(NamedTuple):
    """Where copies go, and whose the tiles are; those from `num_tiles` on hold nothing."""

    row_P: jax.Array  # int32, in M
    expert_I: jax.Array  # int32
    num_tiles: jax.Array  # int32


def describe_experts(cfg: Any, *, dtype: str, quantization: str) -> ExpertShape | None:
    """What kernels must know of one device's experts; None for a model without."""
    if not hasattr(cfg, "expert_width"):
        return None
    weights = dtype if quantization == "none" else quantization
    return ExpertShape(width=cfg.width, expert_width=cfg.expert_width, weights=weights)


def choose_experts(logits_TE: jax.Array, num_chosen: int, normalizes: bool) -> tuple[jax.Array, jax.Array]:
    """The likeliest experts of each token, int32 [T, K], and their shares, float32 [T, K]: of all experts'
    probability, or of their own where `normalizes`."""
    probability_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    share_TK, expert_TK = jax.lax.top_k(probability_TE, num_chosen)
    if normalizes:
        share_TK = share_TK / share_TK.sum(axis=-1, keepdims=True)
    return expert_TK, share_TK


def run_experts(
    h_TD: jax.Array,
    expert_TK: jax.Array,
    share_TK: jax.Array,
    w_gate_up_FD: Matrix,
    w_down_DF: Matrix,
    num_experts: int,
    form: GroupedForm | None = None,
    first_expert: jax.Array | int = 0,
) -> jax.Array:
    """The sum of what each token's experts make of it, by their shares: [T, D] float32.

    `form` is the kernel's, if there is one; the matrices may then be stacks of all layers', with an axis in
    front, in which the layer's experts begin at `first_expert`. Their scales are always the layer's.

    Of each expert the rows of gate stand before those of up, and those of the next behind.
    """
    num_tokens, num_chosen = expert_TK.shape
    num_copies = num_tokens * num_chosen
    bounds = (1, MOST_TILE_ROWS) if form is None else (form.least_rows, form.most_rows)
    tile_rows = choose_tile_rows(num_copies, num_experts, *bounds)
    tiles = plan_tiles(expert_TK.reshape(-1), num_experts, tile_rows)
    num_rows = len(tiles.expert_I) * tile_rows
    token_M = jnp.full(num_rows, num_tokens, jnp.int32)  # behind the last: a row of zeros
    token_M = token_M.at[tiles.row_P].set(jnp.arange(num_copies, dtype=jnp.int32) // num_chosen)

    def copy_rows(x_TD: jax.Array) -> jax.Array:
        return x_TD.at[token_M].get(mode="fill", fill_value=0)

    matrices = (w_gate_up_FD, w_down_DF)
    if form is None:
        y_MD = _run_one_by_one(copy_rows(h_TD), tiles, matrices, num_experts)
    else:
        tiles = tiles._replace(expert_I=tiles.expert_I + first_expert)
        rounded = jax.tree.map(copy_rows, make_operand(h_TD, w_gate_up_FD))  # once for all copies of a token
        y_MD = _run_at_once(rounded, tiles, matrices, num_experts, form)
    y_TKD = y_MD[tiles.row_P].reshape(num_tokens, num_chosen, -1)
    return (y_TKD * share_TK[:, :, None]).sum(axis=1)


def _run_at_once(
    rounded: tuple[jax.Array, jax.Array | None],
    tiles: Tiles,
    matrices: tuple[Matrix, Matrix],
    num_experts: int,
    form: GroupedForm,
) -> jax.Array:
    """The MLP of each row, [M, D] float32, in two products; anything in the rows of absent tiles. `rounded`
    are the rows as `make_operand` gives them."""

    def multiply(rounded: tuple[jax.Array, jax.Array | None], w_FD: Matrix) -> jax.Array:
        x_MD, scale_M1 = rounded
        w_EFD, scale_EF = _split_by_expert(w_FD, num_experts)
        y_MF = form.multiply(x_MD, w_EFD, tiles.expert_I, tiles.num_tiles, scale_EF)
        return y_MF if scale_M1 is None else y_MF * scale_M1

    w_gate_up_FD, w_down_DF = matrices
    gate_MF, up_MF = jnp.split(multiply(rounded, w_gate_up_FD), 2, axis=1)
    return multiply(make_operand(jax.nn.silu(gate_MF) * up_MF, w_down_DF), w_down_DF)


def _split_by_expert(w_FD: Matrix, num_experts: int) -> tuple[jax.Array | Int4Matrix, jax.Array | None]:
    """The matrices of experts side by side, those of all layers if it is a stack; and their scales."""
    if isinstance(w_FD, GroupedMatrix):
        q_FC, scale_GF, zero_GF = w_FD.packed
        num_groups, num_bytes = len(scale_GF), q_FC.shape[1]
        scale_GEF, zero_GEF = (x_GF.reshape(num_groups, num_experts, -1) for x_GF in (scale_GF, zero_GF))
        return Int4Matrix(q_FC.reshape(num_experts, -1, num_bytes), scale_GEF, zero_GEF), None
    q_FD, scale_EF = w_FD, None
    if isinstance(w_FD, QuantizedMatrix):
        q_FD, scale_EF = w_FD.q_FD, w_FD.scale_F.reshape(num_experts, -1)
    *_, num_rows, num_inputs = q_FD.shape
    return q_FD.reshape(-1, num_rows // num_experts, num_inputs), scale_EF


def _run_one_by_one(
    x_MD: jax.Array, tiles: Tiles, matrices: tuple[Matrix, Matrix], num_experts: int
) -> jax.Array:
    """The same in a loop, tile by tile; zeros in the rows of absent tiles."""
    tile_rows = len(x_MD) // len(tiles.expert_I)

    def run_tile(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        expert, first = tiles.expert_I[index], index * tile_rows
        own = (take_part(w, expert, num_experts) for w in matrices)
        rows_RD = gated_mlp(jax.lax.dynamic_slice_in_dim(x_MD, first, tile_rows), *own)
        return jax.lax.dynamic_update_slice_in_dim(y_MD, rows_RD, first, 0)

    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    return jax.lax.fori_loop(jnp.int32(0), tiles.num_tiles, run_tile, y_MD)


def choose_tile_rows(num_copies: int, num_experts: int, least_rows: int, most_rows: int) -> int:
    """About what an expert gets: a power of two."""
    return min(max(1 << (-(-num_copies // num_experts) - 1).bit_length(), least_rows), most_rows)


def plan_tiles(expert_P: jax.Array, num_experts: int, tile_rows: int) -> Tiles:
    """The tiles of copies by their experts; as many as may be needed at most."""
    num_copies = len(expert_P)
    is_of_PE = expert_P[:, None] == jnp.arange(num_experts, dtype=jnp.int32)
    rank_P = jnp.take_along_axis(jnp.cumsum(is_of_PE, axis=0, dtype=jnp.int32), expert_P[:, None], axis=1)
    tiles_E = -(-is_of_PE.sum(axis=0, dtype=jnp.int32) // tile_rows)
    end_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    row_P = (end_E - tiles_E)[expert_P] * tile_rows + rank_P[:, 0] - 1
    most_tiles = min(num_copies, num_experts + num_copies // tile_rows)
    expert_I = (end_E <= jnp.arange(most_tiles, dtype=jnp.int32)[:, None]).sum(axis=1, dtype=jnp.int32)
    return Tiles(row_P, expert_I, end_E[-1])


def take_part(w_FD: Matrix, index: jax.Array, count: int) -> Matrix:
    """One of `count` equal parts of a matrix's rows, of any type."""

    def take(x: jax.Array, axis: int = 0) -> jax.Array:
        size = x.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

    if isinstance(w_FD, GroupedMatrix):
        q_FC, scale_GF, zero_GF = w_FD.packed
        return GroupedMatrix(Int4Matrix(take(q_FC), take(scale_GF, 1), take(zero_GF, 1)), w_FD.multiply)
    if isinstance(w_FD, QuantizedMatrix):
        return replace(w_FD, q_FD=take(w_FD.q_FD), scale_F=take(w_FD.scale_F))
    return take(w_FD)
