"""Log-probabilities on the device: those of the sampled rows, and those of chosen rows of the prompts.

Called inside the step program; the runner reads on the host what comes back (`read_scores`). All in
float32, natural logarithms, over the whole vocabulary. Work that no row of a step asks for is skipped.

Axes that only this file and those that hand it its arrays know:

    Q  prompt rows that are scored, at most the step's prefill tokens
    M  watched ids of a slot, MAX_WATCHED_IDS
    E  the ids whose logprob is looked up: a row's target, then its watched ids
    J  the best ids of a row, MAX_TOP_LOGPROBS
    Z  the 32-bit words of one row's scores, floats as their bits:

       logprob of the target | J best ids | their J logprobs | M logprobs of the watched ids

A row whose logits are not numbers (see `sample`) scores NaN everywhere. Knows nothing of requests or text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.row_blocks import BLOCK_ROWS, Take, update_rows
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards
from jaxserve.runner.sampler import RowParams
from jaxserve.types import MAX_TOP_LOGPROBS, MAX_WATCHED_IDS, ScoreParams, TokenScores

SCORE_WIDTH = 1 + 2 * MAX_TOP_LOGPROBS + MAX_WATCHED_IDS
PROMPT_ROWS = 32  # whose logits exist at a time
GROUP_IDS = 128  # ids that compete as one in the first of the stages of `find_top`
# XLA for TPUs sorts rows no wider than so many times what is wanted of them, and has an operation for wider
# ones. For 128 of 8,064 numbers the sort has 1.2 MB of code on a v5e and takes six seconds to compile, the
# operation for 128 of 8,320 has 0.1 MB, which is more than the sort of short rows has (libtpu 0.0.52).
MOST_TIMES_SORTED = 64
MOST_IDS_SORTED = 512


class ScorePlaces(NamedTuple):
    """The prompt rows that a step scores: the first `count` of Q; what lies behind them is padding."""

    count: jax.Array  # int32 scalar
    token_Q: jax.Array  # int32, index in T
    target_Q: jax.Array  # int32, the token that follows there
    slot_Q: jax.Array  # int32
    temperature_Q: jax.Array  # float32, what the logits are divided by


def scoring_temperature(rows: RowParams) -> jax.Array:
    """What a row's logits are divided by before they are scored: 1 unless the scaled ones are wanted."""
    return jnp.where((rows.is_scaled > 0) & (rows.temperature > 0), rows.temperature, 1.0)


def score_sampled(
    x_BD: jax.Array,
    compute_logits: Callable[[jax.Array], jax.Array],
    edited_BV: jax.Array,
    token_B: jax.Array,
    rows: RowParams,
    slot_B: jax.Array,
    watched_XM: jax.Array,
    shards: Shards = ONE_DEVICE,
    block_rows: int = BLOCK_ROWS,
) -> jax.Array:
    """The scores of the tokens just sampled, [B, Z]; zeros if no row that samples wants any.

    Of the model's own distribution, or for rows that say `is_scaled` of the one after penalties, bias
    and temperature (1 for greedy rows). Padding, and chunks that do not sample, name the trash slot.

    `edited_BV` are the logits that were sampled from, which took the place of the model's own in memory.
    If a row needs those as they were, they are computed once more: keeping them would cost every step a copy,
    those that score nothing included. Of each of several `shards` they are those of its ids.
    """

    def score(take: Take, _: jax.Array, __: jax.Array) -> jax.Array:
        edited, taken = take(edited_BV), RowParams(*map(take, rows))
        is_scaled_B = taken.is_scaled > 0
        is_lost_B = (taken.has_extras > 0) & ~is_scaled_B
        logits_BV = jax.lax.cond(jnp.any(is_lost_B), lambda: compute_logits(take(x_BD)), lambda: edited)
        scaled_BV = edited / scoring_temperature(taken)[:, None]
        scored_BV = jnp.where(is_scaled_B[:, None], scaled_BV, logits_BV)
        return _score_rows(scored_BV, jnp.maximum(take(token_B), 0), watched_XM[take(slot_B)], shards)

    trash_slot = watched_XM.shape[0] - 1
    wants_B = (rows.wants_scores > 0) & (slot_B != trash_slot)
    zeros_BZ = jnp.zeros((token_B.shape[0], SCORE_WIDTH), jnp.int32)
    return update_rows(score, wants_B, zeros_BZ, block_rows)


def score_prompts(
    x_TD: jax.Array,
    compute_logits: Callable[[jax.Array], jax.Array],
    places: ScorePlaces,
    watched_XM: jax.Array,
    shards: Shards = ONE_DEVICE,
    block_rows: int = BLOCK_ROWS,
) -> jax.Array:
    """The scores of the chosen rows of prompts, [Q, Z]: as many as there are rows for, maybe none.

    Their logits exist PROMPT_ROWS at a time, as the head is read each time; they are scored `block_rows` at a
    time. Temperature is all that `is_scaled` means here: penalties count the output, of which there is none.
    """

    def score(take: Take, _: jax.Array, score_BZ: jax.Array) -> jax.Array:
        logits_BV = compute_logits(x_TD[jnp.maximum(take(places.token_Q), 0)])
        logits_BV = logits_BV / take(places.temperature_Q)[:, None]
        target_B, watched_BM = take(places.target_Q), watched_XM[take(places.slot_Q)]

        def score_block(take: Take, _: jax.Array, __: jax.Array) -> jax.Array:
            return _score_rows(take(logits_BV), take(target_B), take(watched_BM), shards)

        return update_rows(score_block, jnp.ones_like(target_B, bool), score_BZ, block_rows)

    num_places = places.token_Q.shape[0]
    is_scored_Q = jnp.arange(num_places) < places.count
    zeros_QZ = jnp.zeros((num_places, SCORE_WIDTH), jnp.int32)
    return update_rows(score, is_scored_Q, zeros_QZ, PROMPT_ROWS)


def _score_rows(
    logits_BV: jax.Array, target_B: jax.Array, watched_BM: jax.Array, shards: Shards
) -> jax.Array:
    """Of each of several devices' ids its own: they exchange maxima, sums and the best of each."""
    num_own = logits_BV.shape[1]
    largest_B1 = shards.find_largest(jnp.max(logits_BV, axis=1, keepdims=True))  # NaN if any is
    weight_BUI = _group(jnp.exp(logits_BV - largest_B1), 0.0)
    # Summed in stages: one float32 sum over a large vocabulary loses digits.
    sum_B1 = shards.add(jnp.sum(jnp.sum(weight_BUI, axis=2), axis=1, keepdims=True))
    log_sum_B1 = jnp.where(jnp.isfinite(largest_B1), jnp.log(sum_B1) + largest_B1, jnp.nan)
    top_BJ, top_id_BJ = find_top(logits_BV, MAX_TOP_LOGPROBS)
    if shards.num_devices > 1:
        top_BJ, top_id_BJ = shards.join(top_BJ), shards.join(top_id_BJ + shards.find_first(num_own))
        top_BJ, place_BJ = find_top(top_BJ, MAX_TOP_LOGPROBS)  # the lowest place is the lowest id
        top_id_BJ = jnp.take_along_axis(top_id_BJ, place_BJ, axis=1)
    id_BE = shards.find_own(jnp.concatenate([target_B[:, None], watched_BM], axis=1), num_own)
    chosen_BE = jnp.take_along_axis(logits_BV, id_BE, axis=1, mode="fill", fill_value=-jnp.inf)
    chosen_BE = shards.find_largest(chosen_BE) - log_sum_B1
    parts = [_bits(chosen_BE[:, :1]), top_id_BJ, _bits(top_BJ - log_sum_B1), _bits(chosen_BE[:, 1:])]
    return jnp.concatenate(parts, axis=1)


def find_top(x_BV: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
    """The `num_top` largest of each row and their indices, best first, the lowest index on ties.

    Past the end of a short row come -inf and indices beyond it. A TPU has an operation for the whole of a
    row; stages would be three times its code. Others search a wide row in two stages.
    """
    x_BUI = _group(x_BV, -jnp.inf)
    num_rows, num_groups, _ = x_BUI.shape
    x_BV = x_BUI.reshape(num_rows, -1)
    if num_groups <= num_top:
        padding = max(num_top - x_BV.shape[1], 0)
        return _find_top_at_once(jnp.pad(x_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf), num_top)
    at_once, in_stages = (partial(find, num_top=num_top) for find in (_find_top_at_once, _find_top_in_stages))
    return jax.lax.platform_dependent(x_BV, tpu=at_once, default=in_stages)


def _find_top_at_once(x_BV: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
    def find(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        top_BJ, id_BJ = jax.lax.top_k(x_BV, num_top)
        return top_BJ, id_BJ

    def find_in_wider(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        padding = MOST_TIMES_SORTED * num_top + GROUP_IDS - x_BV.shape[1]
        return find(jnp.pad(x_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf))

    if MOST_IDS_SORTED < x_BV.shape[1] <= MOST_TIMES_SORTED * num_top:
        return jax.lax.platform_dependent(x_BV, tpu=find_in_wider, default=find)
    return find(x_BV)


def _find_top_in_stages(x_BV: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
    """The best groups by their largest member, then their members: on the CPU 3 to 4 times faster than one.

    Any member of the result has its group among the best `num_top`: every group ahead of its own holds
    somebody ahead of itself. That is so with ties as well, if they go to the lower index in both stages.
    """
    x_BUI = _group(x_BV, -jnp.inf)
    num_rows = x_BUI.shape[0]
    _, group_BJ = jax.lax.top_k(jnp.max(x_BUI, axis=2), num_top)
    group_BJ = jnp.sort(group_BJ, axis=1)  # so that the members stay in the order of their indices
    member_BJI = jnp.take_along_axis(x_BUI, group_BJ[:, :, None], axis=1)
    top_BJ, place_BJ = jax.lax.top_k(member_BJI.reshape(num_rows, -1), num_top)
    group_BJ = jnp.take_along_axis(group_BJ, place_BJ // GROUP_IDS, axis=1)
    return top_BJ, group_BJ * GROUP_IDS + place_BJ % GROUP_IDS


def _group(x_BV: jax.Array, padding: float) -> jax.Array:
    """[B, U, I]: the vocabulary as U groups of I = GROUP_IDS neighbouring ids."""
    num_rows, num_ids = x_BV.shape
    padded = -num_ids % GROUP_IDS
    x_BV = jnp.pad(x_BV, ((0, 0), (0, padded)), constant_values=padding)
    return x_BV.reshape(num_rows, -1, GROUP_IDS)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def read_scores(score: np.ndarray, wanted: ScoreParams, vocab_size: int) -> list[TokenScores]:
    """Rows [rows, Z] of one request, each cut down to what it wants."""
    values = score.view(np.float32)
    num_top, num_watched = min(wanted.num_top, vocab_size), len(wanted.watched_ids)
    first_logprob, first_watched = 1 + MAX_TOP_LOGPROBS, 1 + 2 * MAX_TOP_LOGPROBS
    return [
        TokenScores(*fields)
        for fields in zip(
            values[:, 0].tolist(),
            score[:, 1 : 1 + num_top].tolist(),
            values[:, first_logprob : first_logprob + num_top].tolist(),
            values[:, first_watched : first_watched + num_watched].tolist(),
            strict=True,
        )
    ]
