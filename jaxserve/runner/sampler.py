"""Sampling on the device: from the logits of a step's rows to one token a row.

Called inside the step program. Complete: temperature, top-k, top-p, min-p, the three penalties, logit
bias, minimum length and a seed a row. Work that no row of the batch asks for is skipped (`lax.cond`).
There is no sort of the vocabulary: thresholds are found by bisection on the bits of the floats.

A row's randomness is keyed by (its seed, the position of the token), so a seed reproduces its text
whatever the rest of the batch, and a sequence that is retracted and computed again repeats itself (up to
what the float noise between two program shapes may turn).
Greedy is the argmax with the lowest id on ties. Knows nothing of requests, stops or text.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.scheduler.plan import NO_TOKEN

# One row's parameters as they travel: each field is 32 bits, floats as their bits.
SAMPLING_FIELDS = {
    "temperature": np.float32,  # 0 means greedy
    "top_p": np.float32,
    "min_p": np.float32,
    "frequency_penalty": np.float32,
    "presence_penalty": np.float32,
    "repetition_penalty": np.float32,
    "top_k": np.int32,  # 0 means all
    "seed": np.int32,
    "min_position": np.int32,  # tokens at positions below it may not be stop ids
    "has_extras": np.int32,  # whether edits_XV and bias_XV of the row's slot are to be read
    "wants_scores": np.int32,  # whether the log-probabilities of sampled tokens are to be told
    "is_scaled": np.int32,  # whether those told are of the distribution that is sampled from
}

# edits_XV holds, for a slot and a token, how often the token was generated (low bits) and two flags.
COUNT_MASK = (1 << 20) - 1
IN_PROMPT = 1 << 20
IS_STOP = 1 << 21


class RowParams(NamedTuple):
    """The fields of SAMPLING_FIELDS by row, and the position each sampled token will have."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    repetition_penalty: jax.Array
    top_k: jax.Array
    seed: jax.Array
    min_position: jax.Array
    has_extras: jax.Array
    wants_scores: jax.Array
    is_scaled: jax.Array
    position: jax.Array


def read_params(params_BF: jax.Array, position_B: jax.Array) -> RowParams:
    """Undo `slot_params` (runner/batch.py) on the device."""
    columns = []
    for column, dtype in enumerate(SAMPLING_FIELDS.values()):
        field_B = params_BF[:, column]
        is_float = dtype == np.float32
        columns.append(jax.lax.bitcast_convert_type(field_B, jnp.float32) if is_float else field_B)
    return RowParams(*columns, position=position_B)


def edit_logits(
    logits_BV: jax.Array, rows: RowParams, slot_B: jax.Array, edits_XV: jax.Array, bias_XV: jax.Array
) -> jax.Array:
    """The float32 logits that are sampled from: those of rows with extras edited, the others as they are."""
    return jax.lax.cond(
        jnp.any(rows.has_extras > 0),
        lambda: _edit_rows(logits_BV, rows, edits_XV[slot_B], bias_XV[slot_B]),
        lambda: logits_BV,
    )


def sample(logits_BV: jax.Array, rows: RowParams) -> jax.Array:
    """One token id a row, int32 [B], from edited logits; NO_TOKEN where they are not numbers.

    A row is refused if it holds a NaN, or if its largest logit is infinite (with either sign).
    """
    largest_B, greedy_B = _find_largest(logits_BV)
    is_greedy_B = rows.temperature == 0
    token_B = jax.lax.cond(
        jnp.all(is_greedy_B),
        lambda: greedy_B,
        lambda: jnp.where(is_greedy_B, greedy_B, _draw(logits_BV, rows)),
    )
    # A NaN is the largest of its row, so this value tells of the whole row.
    return jnp.where(jnp.isfinite(largest_B), token_B, NO_TOKEN)


def _edit_rows(logits_BV: jax.Array, rows: RowParams, edits_BV: jax.Array, bias_BV: jax.Array) -> jax.Array:
    """Repetition, frequency and presence penalties, bias, stop ids before the minimum length.

    Repetition (Keskar et al. 2019) looks at prompt and output, the other two (OpenAI) at output only.
    """
    count_BV = (edits_BV & COUNT_MASK).astype(jnp.float32)
    seen_BV = (edits_BV & (COUNT_MASK | IN_PROMPT)) > 0
    penalty_B1 = rows.repetition_penalty[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    edited_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    edited_BV -= rows.frequency_penalty[:, None] * count_BV
    edited_BV -= rows.presence_penalty[:, None] * (count_BV > 0)
    edited_BV += bias_BV
    too_early_B1 = (rows.position < rows.min_position)[:, None]
    edited_BV = jnp.where(too_early_B1 & ((edits_BV & IS_STOP) > 0), -jnp.inf, edited_BV)
    is_edited_BV = (rows.has_extras > 0)[:, None] & ~jnp.isnan(logits_BV)  # a NaN is to be noticed
    return jnp.where(is_edited_BV, edited_BV, logits_BV)


def _draw(logits_BV: jax.Array, rows: RowParams) -> jax.Array:
    """Gumbel-max over the kept tokens: top-k first, top-p of what remains, then min-p."""
    is_drawn_B = rows.temperature > 0
    scaled_BV = logits_BV / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    scaled_BV = scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True)
    nothing_cut_B = jnp.full_like(rows.top_p, -jnp.inf)
    top_k_floor_B = jax.lax.cond(
        jnp.any((rows.top_k > 0) & is_drawn_B),
        lambda: _top_k_floor(scaled_BV, rows.top_k),
        lambda: nothing_cut_B,
    )
    top_p_floor_B = jax.lax.cond(
        jnp.any((rows.top_p < 1) & is_drawn_B),
        lambda: _top_p_floor(scaled_BV, rows.top_p, top_k_floor_B),
        lambda: nothing_cut_B,
    )
    floor_B = jnp.maximum(jnp.maximum(top_k_floor_B, top_p_floor_B), jnp.log(rows.min_p))
    kept_BV = jnp.where(scaled_BV >= floor_B[:, None], scaled_BV, -jnp.inf)
    vocab_size = logits_BV.shape[1]

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,))

    noise_BV = jax.vmap(noise)(rows.seed, rows.position)
    return _find_largest(kept_BV + noise_BV)[1]


def _find_largest(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row and the lowest id that has it, which is none if it is NaN.

    Two simple reductions: XLA's CPU backend does not vectorise argmax, and took a tenth of a step for it.
    """
    largest_B = jnp.max(x_BV, axis=-1)
    id_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    return largest_B, jnp.min(jnp.where(x_BV == largest_B[:, None], id_BV, x_BV.shape[1]), axis=-1)


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
