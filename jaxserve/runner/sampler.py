"""Sampling on the device: from the logits of a step's rows to one token a row.

Called inside the step program. Complete: temperature, top-k, top-p, min-p, the three penalties, logit
bias, minimum length and a seed a row. Work that no row of the batch asks for is skipped.
The choice itself is a kernel (kernels_pallas/sampling); what comes before and after it is here.

A row's randomness is keyed by (its seed, the position of the token), so a seed reproduces its text
whatever the rest of the batch, and a sequence that is retracted and computed again repeats itself (up to
what the float noise between two program shapes may turn).
Greedy is the argmax with the lowest id on ties. Knows nothing of requests, stops or text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.row_blocks import BLOCK_ROWS, Take, update_rows
from jaxserve.kernels_pallas.sampling import ref as sampling_ref
from jaxserve.kernels_pallas.shards import Shards
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


def hide_padding(logits_BV: jax.Array, shards: Shards, vocab_size: int) -> jax.Array:
    """The logits of this device's ids, with -inf for those behind the end of the vocabulary."""
    if shards.num_devices == 1:
        return logits_BV
    num_ids = logits_BV.shape[1]
    id_V = shards.find_first(num_ids) + jnp.arange(num_ids)
    return jnp.where(id_V < vocab_size, logits_BV, -jnp.inf)


def edit_logits(
    logits_BV: jax.Array,
    rows: RowParams,
    slot_B: jax.Array,
    edits_XV: jax.Array,
    bias_XV: jax.Array,
    block_rows: int = BLOCK_ROWS,
) -> jax.Array:
    """The float32 logits that are sampled from: those of rows with extras edited, the others as they are."""

    def edit(take: Take, has_extras_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        taken = RowParams(*map(take, rows))
        slots = take(slot_B)
        return _edit_rows(logits_BV, has_extras_B, taken, edits_XV[slots], bias_XV[slots])

    return update_rows(edit, rows.has_extras > 0, logits_BV, block_rows)


def sample(
    logits_BV: jax.Array, rows: RowParams, choose_tokens: Callable = sampling_ref.choose_tokens
) -> jax.Array:
    """One token id a row, int32 [B], from edited logits; NO_TOKEN where they are not numbers.

    A row is refused if it holds a NaN, or if its largest logit is infinite (with either sign).
    """
    token_B, largest_B = choose_tokens(
        logits_BV, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position
    )
    # A NaN is the largest of its row, so this value tells of the whole row.
    return jnp.where(jnp.isfinite(largest_B), token_B, NO_TOKEN)


def _edit_rows(
    logits_BV: jax.Array, has_extras_B: jax.Array, rows: RowParams, edits_BV: jax.Array, bias_BV: jax.Array
) -> jax.Array:
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
    is_edited_BV = has_extras_B[:, None] & ~jnp.isnan(logits_BV)  # a NaN is to be noticed
    return jnp.where(is_edited_BV, edited_BV, logits_BV)
