"""Mixtures of experts: the sum that the definition gives, whatever the tiles, and nothing read in vain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.grouped_matmul.ref import GroupedForm, grouped_matmul
from jaxserve.kernels_pallas.int4_matmul.ref import int4_matmul
from jaxserve.models.experts import choose_experts, choose_tile_rows, plan_tiles, run_experts, take_part
from jaxserve.models.quant import GroupedMatrix, Int4Matrix, QuantizedMatrix
from tests.models.test_quant import make_weight

NUM_EXPERTS, NUM_CHOSEN, WIDTH, EXPERT_WIDTH = 5, 2, 14, 6


def make_experts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gate and up of each expert, and down: [E, 2F, D] and [E, D, F]."""
    return (
        rng.standard_normal((NUM_EXPERTS, 2 * EXPERT_WIDTH, WIDTH), np.float32),
        rng.standard_normal((NUM_EXPERTS, WIDTH, EXPERT_WIDTH), np.float32),
    )


def run_exactly(h_TD, expert_TK, share_TK, gate_up_EFD, down_EDF) -> np.ndarray:
    out_TD = np.zeros(h_TD.shape)
    for t, k in np.ndindex(expert_TK.shape):
        gate_F, up_F = np.split(gate_up_EFD[expert_TK[t, k]].astype(np.float64) @ h_TD[t], 2)
        out_TD[t] += share_TK[t, k] * (down_EDF[expert_TK[t, k]] @ (gate_F / (1 + np.exp(-gate_F)) * up_F))
    return out_TD


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("choice", ["any", "the same", "no first"])
def test_a_token_gets_the_sum_of_its_experts(num_tokens, choice):
    rng = np.random.default_rng(num_tokens)
    h_TD = rng.standard_normal((num_tokens, WIDTH), np.float32)
    matrices = make_experts(rng)
    logits_TE = rng.standard_normal((num_tokens, NUM_EXPERTS), np.float32)
    if choice == "the same":
        logits_TE[:] = logits_TE[0]
    elif choice == "no first":
        logits_TE[:, 0] = -100
    expert_TK, share_TK = choose_experts(jnp.asarray(logits_TE), NUM_CHOSEN, True)
    np.testing.assert_allclose(share_TK.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(expert_TK, np.argsort(-logits_TE, axis=1)[:, :NUM_CHOSEN])
    flat = [jnp.asarray(w.reshape(-1, w.shape[2])) for w in matrices]
    run = jax.jit(run_experts, static_argnames="num_experts")
    got = run(jnp.asarray(h_TD), expert_TK, share_TK, *flat, num_experts=NUM_EXPERTS)
    want = run_exactly(h_TD, np.asarray(expert_TK), np.asarray(share_TK), *matrices)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_a_form_of_the_product_gives_the_same_sum(num_tokens, weights):
    """Whatever it leaves in the rows of absent tiles."""

    def multiply(x_MD, w_EFD, expert_I, num_tiles, scale_EF=None):
        y_MF = grouped_matmul(x_MD, w_EFD, expert_I, num_tiles, scale_EF)
        row_M1 = jnp.arange(len(x_MD), dtype=jnp.int32)[:, None]
        return jnp.where(row_M1 < num_tiles * (len(x_MD) // len(expert_I)), y_MF, jnp.nan)

    rng = np.random.default_rng(num_tokens)
    h_TD = jnp.asarray(rng.standard_normal((num_tokens, WIDTH), np.float32))
    chosen = choose_experts(
        jnp.asarray(rng.standard_normal((num_tokens, NUM_EXPERTS), np.float32)), NUM_CHOSEN, True
    )
    flat = [make_weight(w.reshape(-1, w.shape[2]), weights) for w in make_experts(rng)]
    run = jax.jit(run_experts, static_argnames=("num_experts", "form"))
    want = run(h_TD, *chosen, *flat, num_experts=NUM_EXPERTS)
    got = run(h_TD, *chosen, *flat, num_experts=NUM_EXPERTS, form=GroupedForm(multiply, 4, 8))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_form_of_the_product_takes_experts_of_four_bits():
    rng = np.random.default_rng(0)
    width, group_size = 128, 64

    def draw_matrix(num_rows: int) -> GroupedMatrix:
        groups = (width // group_size, NUM_EXPERTS * num_rows)
        q_FC = rng.integers(-128, 128, (groups[1], width // 2))
        packed = Int4Matrix(
            jnp.asarray(q_FC, jnp.int8),
            jnp.asarray(rng.uniform(0.5, 2, groups), jnp.float16),
            jnp.asarray(rng.integers(0, 16, groups), jnp.int8),
        )
        return GroupedMatrix(packed, int4_matmul)

    h_TD = jnp.asarray(rng.standard_normal((7, width), np.float32))
    logits_TE = jnp.asarray(rng.standard_normal((7, NUM_EXPERTS), np.float32))
    chosen, matrices = (
        choose_experts(logits_TE, NUM_CHOSEN, True),
        [draw_matrix(2 * width), draw_matrix(width)],
    )
    run = jax.jit(run_experts, static_argnames=("num_experts", "form"))
    want = run(h_TD, *chosen, *matrices, num_experts=NUM_EXPERTS)
    form = GroupedForm(grouped_matmul, 4, 8)
    got = run(h_TD, *chosen, *matrices, num_experts=NUM_EXPERTS, form=form)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_shares_that_are_not_normalised_are_of_all_experts():
    logits_TE = jnp.asarray([[0.0, 1.0, 2.0, 3.0]])
    expert_TK, share_TK = choose_experts(logits_TE, 2, False)
    assert expert_TK.tolist() == [[3, 2]]
    np.testing.assert_allclose(share_TK, jax.nn.softmax(logits_TE)[:, [3, 2]], rtol=1e-6)


@pytest.mark.parametrize("tile_rows", [1, 2, 4])
def test_tiles_are_of_one_expert_and_no_more_than_are_needed(tile_rows):
    expert_P = np.array([3, 1, 1, 3, 1, 4, 1, 1])
    tiles = plan_tiles(jnp.asarray(expert_P, jnp.int32), NUM_EXPERTS, tile_rows)
    rows, num_tiles = np.asarray(tiles.row_P), int(tiles.num_tiles)
    assert num_tiles == sum(-(-count // tile_rows) for count in np.bincount(expert_P))
    assert len(set(rows.tolist())) == len(expert_P)
    assert num_tiles <= len(tiles.expert_I)
    assert rows.max() < num_tiles * tile_rows
    np.testing.assert_array_equal(np.asarray(tiles.expert_I)[rows // tile_rows], expert_P)


def test_a_tile_holds_about_what_an_expert_gets():
    assert [choose_tile_rows(copies, 128, 1, 64) for copies in (8, 128, 129, 1024, 10**6)] == [1, 1, 2, 8, 64]
    assert [choose_tile_rows(copies, 128, 8, 128) for copies in (8, 1024, 1025, 10**6)] == [8, 8, 16, 128]


def test_a_part_of_a_matrix_is_its_rows_whatever_their_type():
    index = jnp.int32(2)
    w_FD = jnp.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(take_part(w_FD, index, 3), w_FD[4:])
    part = take_part(QuantizedMatrix(w_FD, w_FD[:, 0]), index, 3)
    assert isinstance(part, QuantizedMatrix)
    np.testing.assert_array_equal(part.scale_F, w_FD[4:, 0])
    packed = Int4Matrix(w_FD, jnp.arange(12.0).reshape(2, 6), jnp.arange(12).reshape(2, 6))
    part = take_part(GroupedMatrix(packed, lambda x, w: x), index, 3)
    assert isinstance(part, GroupedMatrix)
    np.testing.assert_array_equal(part.packed.scale_GF, packed.scale_GF[:, 4:])
    np.testing.assert_array_equal(part.packed.q_FC, w_FD[4:])
