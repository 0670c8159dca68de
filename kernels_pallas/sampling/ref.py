"""Choosing one token a row from its logits, the reference: the specification of the kernel and XLA's form.

Temperature, top-k, top-p, min-p, then Gumbel-max over what is kept. There is no sort of the vocabulary:
thresholds are found by bisection on the bits of the floats, among the likely tokens if they lie there. Work
that no row asks for is skipped, and noise is drawn only for tokens that it could bring to the top. A row's
randomness is keyed by (its seed, the position of the token), a token's by its id beside. Penalties, bias and
what a row of bad logits means are the caller's.

B rows, V tokens of the vocabulary, C likely ones; N blocks of W tokens, J of them likely, P those of all
rows, E at a time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.row_blocks import BLOCK_ROWS, Take, update_rows
from jaxserve.kernels_pallas.sampling.noise import LARGEST_NOISE, gumbel, row_keys
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards

BLOCK_TOKENS = 128  # of the vocabulary, for which noise is drawn or not
BLOCKS_AT_ONCE = 64
LIKELY_BLOCKS = 64  # of a row, in which thresholds are looked for first


def choose_tokens(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    *,
    shards: Shards = ONE_DEVICE,
    block_rows: int = BLOCK_ROWS,
) -> tuple[jax.Array, jax.Array]:
    """The token ids, int32 [B], and the largest logit of each row, which is NaN if any of its logits is.

    `logits_BV` float32 or bfloat16; temperature, top_p, min_p float32; top_k, seed, position int32.
    Temperature 0 means the largest logit, the lowest id among equals; top_k 0 means all, top_p 1 and min_p 0
    likewise. Ties with the k-th largest are kept. The token of a row whose largest logit is not finite
    means nothing.

    Each of several `shards` has some of the vocabulary and gets the tokens of all of it: what one device
    would choose, but for the rounding of top-p's sums. They exchange the best token of each; where a row asks
    for top-k or top-p their likely tokens, and if it must look further a number a pass of the bisection.
    Rows are drawn for `block_rows` at a time.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    largest_B, greedy_B = _find_largest(logits_BV)
    largest_B, greedy_B = _agree(largest_B, greedy_B + shards.find_first(logits_BV.shape[1]), shards)

    def draw(take: Take, is_drawn_B: jax.Array, greedy_B: jax.Array) -> jax.Array:
        temperature, top_k, top_p, min_p = map(take, (temperature_B, top_k_B, top_p_B, min_p_B))
        kept_BV = _keep_likely(take(logits_BV), is_drawn_B, temperature, top_k, top_p, min_p, shards)
        keys_B2 = row_keys(take(seed_B), take(position_B))
        return jnp.where(is_drawn_B, _draw_tokens(kept_BV, greedy_B, keys_B2, is_drawn_B, shards), greedy_B)

    return update_rows(draw, temperature_B > 0, greedy_B, block_rows), largest_B


def _draw_tokens(
    kept_BV: jax.Array, greedy_B: jax.Array, key_B2: jax.Array, is_drawn_B: jax.Array, shards: Shards
) -> jax.Array:
    """The id with the largest sum of logit and noise, the lowest among equals; of rows that are drawn.

    Most of the vocabulary lies too far behind the most likely token, with its noise, for any noise to bring
    it to the top. Only blocks with a token that does not are looked at: the noise of 32 rows of 152k logits
    takes two cores as long as the model's step.
    """
    first_id = shards.find_first(kept_BV.shape[1])
    kept_BNW = _cut_into_blocks(kept_BV)
    num_rows, num_blocks, _ = kept_BNW.shape
    to_beat_B = gumbel(key_B2[:, 0], key_B2[:, 1], greedy_B.astype(jnp.uint32))  # its logit is 0
    may_win_BN = jnp.max(kept_BNW, axis=2) + LARGEST_NOISE >= to_beat_B[:, None]
    may_win_BN &= is_drawn_B[:, None]
    num_so_far_P = jnp.cumsum(may_win_BN.reshape(-1), dtype=jnp.int32)  # that may win, up to each of B * N

    def draw_blocks(turn: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rank_E = turn * BLOCKS_AT_ONCE + jnp.arange(BLOCKS_AT_ONCE, dtype=jnp.int32)
        row_E, block_E = jnp.divmod(_find_first_above(num_so_far_P, rank_E), num_blocks)  # row B: no more
        id_EW = first_id + block_E[:, None] * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS)
        key_E2 = key_B2.at[row_E].get(mode="clip")
        noise_EW = gumbel(key_E2[:, :1], key_E2[:, 1:], id_EW.astype(jnp.uint32))
        best_E, place_in_block_E = _find_largest(kept_BNW.at[row_E, block_E].get(mode="clip") + noise_EW)
        id_E = first_id + block_E * BLOCK_TOKENS + place_in_block_E
        is_own_BE = row_E[None, :] == jnp.arange(num_rows)[:, None]
        best_BE = jnp.where(is_own_BE, best_E[None, :], -jnp.inf)
        here_B, place_B = _find_largest(best_BE)
        here_id_B = id_E.at[place_B].get(mode="clip")
        best_B, id_B = best  # of lower ids, which win among equals
        return jnp.maximum(here_B, best_B), jnp.where(here_B > best_B, here_id_B, id_B)

    num_turns = (num_so_far_P[-1] + BLOCKS_AT_ONCE - 1) // BLOCKS_AT_ONCE
    nothing_B = jnp.full(num_rows, -jnp.inf), jnp.zeros(num_rows, jnp.int32)
    best_B, id_B = jax.lax.fori_loop(0, num_turns, draw_blocks, nothing_B)
    return _agree(best_B, id_B, shards)[1]


def _find_first_above(sorted_P: jax.Array, value_E: jax.Array) -> jax.Array:
    """The first place of a larger number for each value; P where there is none. A TPU compares with all."""
    find = partial(jnp.searchsorted, side="right")
    compare, bisect = partial(find, method="compare_all"), partial(find, method="scan")
    return jax.lax.platform_dependent(sorted_P, value_E, tpu=compare, default=bisect)


def _keep_likely(
    logits_BV: jax.Array,
    is_drawn_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    shards: Shards,
) -> jax.Array:
    """The scaled logits, 0 at their largest, and -inf where cut: top-k, top-p of what remains, then min-p."""
    scaled_BV = logits_BV / jnp.where(is_drawn_B, temperature_B, 1.0)[:, None]
    scaled_BV = scaled_BV - shards.find_largest(jnp.max(scaled_BV, axis=-1, keepdims=True))
    top_k_B, top_p_B = jnp.where(is_drawn_B, top_k_B, 0), jnp.where(is_drawn_B, top_p_B, 1.0)
    is_cut_B = (top_k_B > 0) | (top_p_B < 1)

    def find_floor() -> jax.Array:
        likely_BC, rest_B = _find_likely(scaled_BV, shards)
        mass_B = shards.add(jnp.sum(jnp.exp(scaled_BV), axis=-1))
        floor_B = _find_floor(likely_BC, top_k_B, top_p_B, mass_B, ONE_DEVICE)
        is_beyond_B = is_cut_B & (floor_B <= rest_B)
        return jax.lax.cond(
            jnp.any(is_beyond_B),
            lambda: _find_floor(scaled_BV, top_k_B, top_p_B, mass_B, shards),
            lambda: floor_B,
        )

    nothing_cut_B = jnp.full_like(top_p_B, -jnp.inf)
    floor_B = jax.lax.cond(jnp.any(is_cut_B), find_floor, lambda: nothing_cut_B)
    floor_B = jnp.maximum(floor_B, jnp.log(min_p_B))
    return jnp.where(scaled_BV >= floor_B[:, None], scaled_BV, -jnp.inf)


def _find_likely(scaled_BV: jax.Array, shards: Shards) -> tuple[jax.Array, jax.Array]:
    """The logits of the blocks with the largest maxima, [B, C], and the largest of all others, which is -inf
    where there are none. A floor above that is the floor of the whole row. Shards each give their part of the
    blocks, and all get those of all."""
    blocks_BNW = _cut_into_blocks(scaled_BV)
    num_rows, num_blocks, _ = blocks_BNW.shape
    num_likely = shards.count_own(LIKELY_BLOCKS)
    if num_blocks <= num_likely:
        return shards.join(scaled_BV), jnp.full(num_rows, -jnp.inf)
    max_BJ, block_BJ = jax.lax.top_k(jnp.max(blocks_BNW, axis=2), num_likely + 1)
    likely_BJW = jnp.take_along_axis(blocks_BNW, block_BJ[:, :-1, None], axis=1)
    return shards.join(likely_BJW.reshape(num_rows, -1)), shards.find_largest(max_BJ[:, -1])


def _find_floor(
    scaled_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, mass_B: jax.Array, shards: Shards
) -> jax.Array:
    """The smallest logit that a row keeps: at least the k-th largest, and at least the one down to which
    top_p of the mass lies that top-k left; -inf for a row that asks for neither.

    `mass_B` is that of the whole vocabulary: what `scaled_BV` holds may be the likely part of it.
    """
    nothing_cut_B = jnp.full_like(top_p_B, -jnp.inf)
    top_k_floor_B = jax.lax.cond(
        jnp.any(top_k_B > 0), lambda: _top_k_floor(scaled_BV, top_k_B, shards), lambda: nothing_cut_B
    )
    top_p_floor_B = jax.lax.cond(
        jnp.any(top_p_B < 1),
        lambda: _top_p_floor(scaled_BV, top_p_B, top_k_floor_B, mass_B, shards),
        lambda: nothing_cut_B,
    )
    return jnp.maximum(top_k_floor_B, top_p_floor_B)


def _cut_into_blocks(x_BV: jax.Array) -> jax.Array:
    """[B, N, W], the last block filled up with -inf."""
    num_rows, vocab_size = x_BV.shape
    x_BV = jnp.pad(x_BV, ((0, 0), (0, -vocab_size % BLOCK_TOKENS)), constant_values=-jnp.inf)
    return x_BV.reshape(num_rows, -1, BLOCK_TOKENS)


def _find_largest(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row and the lowest id that has it; NaN and -1 if the row holds a NaN.

    Two simple reductions: XLA's CPU backend does not vectorise argmax, and took a tenth of a step for it.
    Its maximum of a long row loses a NaN, so the second reduction looks for one.
    """
    largest_B = jnp.max(x_BV, axis=-1)
    id_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    id_BV = jnp.where(x_BV == largest_B[:, None], id_BV, x_BV.shape[1])
    id_B = jnp.min(jnp.where(jnp.isnan(x_BV), -1, id_BV), axis=-1)
    return jnp.where(id_B < 0, jnp.nan, largest_B), id_B


def _agree(largest_B: jax.Array, id_B: jax.Array, shards: Shards) -> tuple[jax.Array, jax.Array]:
    """The largest of what each device found, and its id in the whole vocabulary, the lowest among equals; NaN
    if any found a NaN, whose id means nothing. One all-gather."""
    if shards.num_devices == 1:
        return largest_B, id_B
    both_2B = jnp.stack([jax.lax.bitcast_convert_type(largest_B, jnp.int32), id_B])
    bits_NB, id_NB = jnp.moveaxis(shards.stack(both_2B), 1, 0)  # here N devices
    largest_NB = jax.lax.bitcast_convert_type(bits_NB, jnp.float32)
    # One reduction of pairs: several of single numbers are an operation each on a TPU, of a microsecond.
    nothing = jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max)
    largest_B, id_B = jax.lax.reduce((largest_NB, id_NB), nothing, _take_larger, (0,))
    return largest_B, id_B


def _take_larger(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The pair of the larger value, of equal values that of the lower id; a NaN before all."""
    (value, id_), (other_value, other_id) = one, other
    is_before = (other_value > value) | ((other_value == value) & (other_id < id_))
    takes_other = jnp.isnan(other_value) | (is_before & ~jnp.isnan(value))
    return jnp.where(takes_other, other_value, value), jnp.where(takes_other, other_id, id_)


def _top_k_floor(scaled_BV: jax.Array, top_k_B: jax.Array, shards: Shards) -> jax.Array:
    """The k-th largest value of each row; -inf where top_k is 0. Ties with it are kept."""

    def enough(floor_B: jax.Array) -> jax.Array:
        return shards.add(jnp.sum(scaled_BV >= floor_B[:, None], axis=-1, dtype=jnp.int32)) >= top_k_B

    return jnp.where(top_k_B > 0, _largest_floor(enough, top_k_B.shape[0]), -jnp.inf)


def _top_p_floor(
    scaled_BV: jax.Array,
    top_p_B: jax.Array,
    top_k_floor_B: jax.Array,
    mass_B: jax.Array,
    shards: Shards,
) -> jax.Array:
    """The largest value whose upper set holds at least top_p of the mass that top-k left."""
    mass_BV = jnp.where(scaled_BV >= top_k_floor_B[:, None], jnp.exp(scaled_BV), 0.0)
    left_B = jnp.where(top_k_floor_B > -jnp.inf, shards.add(jnp.sum(mass_BV, axis=-1)), mass_B)
    wanted_B = top_p_B * left_B

    def enough(floor_B: jax.Array) -> jax.Array:
        above_B = jnp.sum(jnp.where(scaled_BV >= floor_B[:, None], mass_BV, 0.0), axis=-1)
        return shards.add(above_B) >= wanted_B

    return jnp.where(top_p_B < 1, _largest_floor(enough, top_p_B.shape[0]), -jnp.inf)


def _largest_floor(enough, num_rows: int) -> jax.Array:
    """The largest float <= 0 for which `enough` (monotone: true for low floors) holds, a row.

    The bits of a negative float, read as an unsigned integer, grow with its magnitude: bisect them.
    Scaled logits are at most 0, so magnitudes suffice. 31 passes find the float exactly.
    """

    def narrow(_, bounds):
        low_B, high_B = bounds  # enough fails below low, holds at high
        middle_B = low_B + (high_B - low_B) // 2
        floor_B = -jax.lax.bitcast_convert_type(middle_B, jnp.float32)
        holds_B = enough(floor_B)
        return jnp.where(holds_B, low_B, middle_B + 1), jnp.where(holds_B, middle_B, high_B)

    infinity_bits = jnp.int32(0x7F800000)
    start = (jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, infinity_bits))
    _, high_B = jax.lax.fori_loop(0, 31, narrow, start)
    return -jax.lax.bitcast_convert_type(high_B, jnp.float32)
