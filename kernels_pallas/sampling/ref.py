"""Choosing one token a row from its logits, the reference: the specification of the kernel and XLA's form.

Temperature, top-k, top-p, min-p, then Gumbel-max over what is kept. There is no sort of the vocabulary:
thresholds are found by bisection on the bits of the floats. Work that no row of the batch asks for is
skipped (`lax.cond`). A row's randomness is keyed by (its seed, the position of the token), a token's by its
id beside. Penalties, bias and what a row of bad logits means are the caller's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def choose_tokens(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The token ids, int32 [B], and the largest logit of each row, which is NaN if any of its logits is.

    `logits_BV` float32 or bfloat16; temperature, top_p, min_p float32; top_k, seed, position int32.
    Temperature 0 means the largest logit, the lowest id among equals; top_k 0 means all, top_p 1 and min_p 0
    likewise. Ties with the k-th largest are kept. The token of a row whose largest logit is not finite
    means nothing.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    largest_B, greedy_B = _find_largest(logits_BV)
    is_greedy_B = temperature_B == 0

    def draw() -> jax.Array:
        kept_BV = _keep_likely(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B)
        noise_BV = jax.vmap(lambda seed, position: _draw_noise(seed, position, logits_BV.shape[1]))(
            seed_B, position_B
        )
        return jnp.where(is_greedy_B, greedy_B, _find_largest(kept_BV + noise_BV)[1])

    return jax.lax.cond(jnp.all(is_greedy_B), lambda: greedy_B, draw), largest_B


def _draw_noise(seed: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,))


def _keep_likely(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
) -> jax.Array:
    """The scaled logits, 0 at their largest, and -inf where cut: top-k, top-p of what remains, then min-p."""
    is_drawn_B = temperature_B > 0
    scaled_BV = logits_BV / jnp.where(is_drawn_B, temperature_B, 1.0)[:, None]
    scaled_BV = scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True)
    nothing_cut_B = jnp.full_like(top_p_B, -jnp.inf)
    top_k_floor_B = jax.lax.cond(
        jnp.any((top_k_B > 0) & is_drawn_B),
        lambda: _top_k_floor(scaled_BV, top_k_B),
        lambda: nothing_cut_B,
    )
    top_p_floor_B = jax.lax.cond(
        jnp.any((top_p_B < 1) & is_drawn_B),
        lambda: _top_p_floor(scaled_BV, top_p_B, top_k_floor_B),
        lambda: nothing_cut_B,
    )
    floor_B = jnp.maximum(jnp.maximum(top_k_floor_B, top_p_floor_B), jnp.log(min_p_B))
    return jnp.where(scaled_BV >= floor_B[:, None], scaled_BV, -jnp.inf)


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


def _top_k_floor(scaled_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """The k-th largest value of each row; -inf where top_k is 0. Ties with it are kept."""

    def enough(floor_B: jax.Array) -> jax.Array:
        return jnp.sum(scaled_BV >= floor_B[:, None], axis=-1, dtype=jnp.int32) >= top_k_B

    return jnp.where(top_k_B > 0, _largest_floor(enough, top_k_B.shape[0]), -jnp.inf)


def _top_p_floor(scaled_BV: jax.Array, top_p_B: jax.Array, top_k_floor_B: jax.Array) -> jax.Array:
    """The largest value whose upper set holds at least top_p of the mass that top-k left."""
    mass_BV = jnp.where(scaled_BV >= top_k_floor_B[:, None], jnp.exp(scaled_BV), 0.0)
    wanted_B = top_p_B * jnp.sum(mass_BV, axis=-1)

    def enough(floor_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(scaled_BV >= floor_B[:, None], mass_BV, 0.0), axis=-1) >= wanted_B

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
