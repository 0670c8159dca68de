"""From a StepPlan to one int32 array, and from that array to a StepBatch inside the program.

Called by the runner (pack, on the host) and by the step program (unpack, traced). One array means one
upload a step; floats travel as their bits. Knows nothing of models or of how plans are made.

The array of a program with R rows, C chunks, T prefill tokens and W pages a table, in this order:

    decode   [4, R]  slot, position, write index (page * page_size + offset), token id or NO_TOKEN
    chunks   [5, C]  slot, index of the first token in T, length, start position, samples (0 or 1)
    tables   [C, W]  the block table of each chunk's slot
    tokens   [3, T]  id, position, write index
    places   [3, T]  index of a token whose row is scored or NO_PLACE, the token that followed, its chunk
    params   [B, F]  sampling parameters, B = R + C rows of SAMPLING_FIELDS

and where the model takes images:

    deltas   [1, R]  what rotary positions of decode rows are moved by
    features [4, T]  time, row and column for rotary embedding, and the token's row of features or NO_ROW

and, last, where the program runs a window of several steps:

    window   [2, R]  steps that the row takes part in, and the page behind that of its write index

Decode rows need no table: the device keeps every slot's table and learns at most one page a row here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.interface import ImageTokens, StepBatch
from jaxserve.runner.buckets import Shape
from jaxserve.runner.images import SlotPositions
from jaxserve.runner.sampler import SAMPLING_FIELDS, RowParams, read_params
from jaxserve.runner.scores import ScorePlaces, scoring_temperature
from jaxserve.scheduler.plan import NO_ROW, NO_TOKEN, DecodeRow, PrefillChunk
from jaxserve.types import TokenParams

NO_PLACE = -1
SMALLEST_PENALTY = 1e-6  # one nearer to 0 would make infinities of large logits


def packed_shapes(shape: Shape, table_width: int, takes_images: bool) -> tuple[tuple[int, int], ...]:
    """The parts of a program's packed array, in order."""
    return (
        (4, shape.num_rows),
        (5, shape.num_chunks),
        (shape.num_chunks, table_width),
        (3, shape.num_tokens),
        (3, shape.num_tokens),
        (shape.num_sampled, len(SAMPLING_FIELDS)),
        *(((1, shape.num_rows), (4, shape.num_tokens)) if takes_images else ()),
        *(((2, shape.num_rows),) if shape.window > 1 else ()),
    )


def packed_size(shape: Shape, table_width: int, takes_images: bool = False) -> int:
    return sum(rows * cols for rows, cols in packed_shapes(shape, table_width, takes_images))


def _split(packed, shape: Shape, table_width: int, takes_images: bool) -> list:
    """Views of the parts; works on NumPy arrays and on traced ones."""
    parts, offset = [], 0
    for rows, cols in packed_shapes(shape, table_width, takes_images):
        parts.append(packed[offset : offset + rows * cols].reshape(rows, cols))
        offset += rows * cols
    return parts


def slot_params(params: TokenParams, num_prompt_tokens: int) -> np.ndarray:
    """One slot's sampling parameters as an int32 row of SAMPLING_FIELDS."""
    values = {
        "temperature": 0.0 if params.is_greedy else params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "repetition_penalty": max(params.repetition_penalty, SMALLEST_PENALTY),
        "top_k": params.top_k,
        "seed": params.seed & 0x7FFFFFFF,
        "min_position": num_prompt_tokens + params.min_new_tokens,
        "has_extras": params.has_extras,
        "wants_scores": params.scores is not None and params.scores.of_output,
        "is_scaled": params.scores is not None and params.scores.is_scaled,
    }
    fields = [np.asarray(values[name], dtype).view(np.int32) for name, dtype in SAMPLING_FIELDS.items()]
    return np.stack(fields)


def pack_step(
    shape: Shape,
    decode: Sequence[DecodeRow],
    chunks: Sequence[PrefillChunk],
    params_XF: np.ndarray,
    page_size: int,
    table_width: int,
    slots: SlotPositions | None = None,
) -> np.ndarray:
    """The packed array of one launch. Padding names the trash slot (the last one) and page 0. There are
    `slots` if the model takes images."""
    trash_slot = params_XF.shape[0] - 1
    takes_images = slots is not None
    packed = np.zeros(packed_size(shape, table_width, takes_images), np.int32)
    parts = _split(packed, shape, table_width, takes_images)
    decode_FR, chunk_FC, table_CW, token_FT, place_FQ, params_BF = parts[:6]
    slot_B = np.full(shape.num_sampled, trash_slot, np.int32)
    decode_FR[0] = trash_slot
    decode_FR[3] = NO_TOKEN
    chunk_FC[0] = trash_slot
    place_FQ[0] = NO_PLACE
    if decode:
        fields = [(row.slot, row.position, row.page_id, row.token_id) for row in decode]
        fields = np.array(fields, np.int32).T
        decode_FR[:, : len(decode)] = fields
        decode_FR[2, : len(decode)] = fields[2] * page_size + fields[1] % page_size
        slot_B[: len(decode)] = fields[0]
        if shape.window > 1:
            parts[-1][:, : len(decode)] = np.array([(row.num_steps, row.next_page_id) for row in decode]).T
    first = num_places = 0
    for c, chunk in enumerate(chunks):
        length = len(chunk.token_ids)
        chunk_FC[:, c] = (chunk.slot, shape.num_rows + first, length, chunk.start, chunk.samples)
        pages = np.asarray(chunk.page_ids, np.int32)
        table_CW[c, : len(pages)] = pages
        positions = np.arange(chunk.start, chunk.start + length, dtype=np.int32)
        token_FT[0, first : first + length] = chunk.token_ids
        token_FT[1, first : first + length] = positions
        token_FT[2, first : first + length] = (
            pages[positions // page_size] * page_size + positions % page_size
        )
        slot_B[shape.num_rows + c] = chunk.slot
        here = slice(num_places, num_places + len(chunk.score_places))
        place_FQ[0, here] = np.asarray(chunk.score_places, np.int32) + shape.num_rows + first
        place_FQ[1, here] = chunk.score_targets
        place_FQ[2, here] = c
        num_places = here.stop
        first += length
    params_BF[:] = params_XF[slot_B]
    if slots is not None:
        _pack_images(parts[6], parts[7], decode, chunks, slots)
    return packed


def _pack_images(
    delta_FR: np.ndarray,
    feature_FT: np.ndarray,
    decode: Sequence[DecodeRow],
    chunks: Sequence[PrefillChunk],
    slots: SlotPositions,
) -> None:
    """Fill the parts that only models have which take images."""
    delta_FR[0, : len(decode)] = slots.delta_X[[row.slot for row in decode]]
    feature_FT[3] = NO_ROW
    first = 0
    for chunk in chunks:
        here = slice(first, first + len(chunk.token_ids))
        feature_FT[:3, here] = slots.at(chunk.slot, chunk.start, chunk.start + len(chunk.token_ids))
        if chunk.feature_rows:
            feature_FT[3, here] = chunk.feature_rows
        first = here.stop


class Unpacked(NamedTuple):
    """What the step program reads out of the packed array."""

    batch: StepBatch
    rows: RowParams
    slot_B: jax.Array  # where row B's sampled token is remembered; the trash slot for padding
    places: ScorePlaces | None  # None in a program without prefill


def unpack_step(
    packed: jax.Array,
    shape: Shape,
    page_size: int,
    last_token_X: jax.Array,
    table_XW: jax.Array,
    feature_MD: jax.Array | None = None,
    step: jax.Array | int = 0,
) -> Unpacked:
    """The packed array and the device's own memory as a StepBatch; traced in the step program.

    `batch.table_XW` is the table with this step's changes and becomes the new state. `feature_MD` is there if
    the model takes images. `step` counts those of a window.
    """
    parts = _split(packed, shape, table_XW.shape[1], feature_MD is not None)
    decode_FR, chunk_FC, table_CW, token_FT, place_FQ, params_BF = parts[:6]
    trash_slot = last_token_X.shape[0] - 1
    if shape.window > 1:
        decode_FR = _move_rows(decode_FR, parts[-1], step, page_size, trash_slot)
    slot_R, position_R, write_R, token_R = decode_FR
    slot_C, token_C, len_C, start_C, samples_C = chunk_FC
    table_XW = table_XW.at[slot_C].set(table_CW)
    table_XW = table_XW.at[slot_R, position_R // page_size].set(write_R // page_size)
    kv_len_R = jnp.where(slot_R == trash_slot, 0, position_R + 1)
    token_R = jnp.where(token_R == NO_TOKEN, last_token_X[slot_R], token_R)
    batch = StepBatch(
        token_ids_T=jnp.concatenate([token_R, token_FT[0]]),
        positions_T=jnp.concatenate([position_R, token_FT[1]]),
        write_index_T=jnp.concatenate([write_R, token_FT[2]]),
        decode_slot_R=slot_R,
        decode_kv_len_R=kv_len_R,
        chunk_slot_C=slot_C,
        chunk_token_C=token_C,
        chunk_len_C=len_C,
        chunk_kv_len_C=start_C + len_C,
        table_XW=table_XW,
        sample_token_B=jnp.concatenate(
            [jnp.arange(shape.num_rows, dtype=jnp.int32), jnp.maximum(token_C + len_C - 1, 0)]
        ),
    )
    sampled_position_B = jnp.concatenate([position_R + 1, start_C + len_C])
    slot_B = jnp.concatenate([slot_R, jnp.where(samples_C > 0, slot_C, trash_slot)])
    rows = read_params(params_BF, sampled_position_B)
    places = None
    if shape.num_tokens:
        place_Q, target_Q, chunk_Q = place_FQ
        places = ScorePlaces(
            count=jnp.sum(place_Q != NO_PLACE, dtype=jnp.int32),
            token_Q=place_Q,
            target_Q=target_Q,
            slot_Q=slot_C[chunk_Q],
            temperature_Q=scoring_temperature(rows)[shape.num_rows + chunk_Q],
        )
    if feature_MD is not None:
        batch = _add_images(batch, parts[6], parts[7], feature_MD)
    return Unpacked(batch, rows, slot_B, places)


def _move_rows(
    decode_FR: jax.Array, window_FR: jax.Array, step: jax.Array | int, page_size: int, trash_slot: int
) -> jax.Array:
    """The decode rows of a step of a window: as many positions on, or padding once their steps are over."""
    slot_R, first_R, write_R, token_R = decode_FR
    num_steps_R, next_page_R = window_FR
    position_R = first_R + step
    is_first_page_R = position_R // page_size == first_R // page_size
    page_R = jnp.where(is_first_page_R, write_R // page_size, next_page_R)
    moved_FR = jnp.stack(
        [
            slot_R,
            position_R,
            page_R * page_size + position_R % page_size,
            jnp.where(step == 0, token_R, NO_TOKEN),
        ]
    )
    padding_F = jnp.array([trash_slot, 0, 0, NO_TOKEN], jnp.int32)
    return jnp.where(step < num_steps_R, moved_FR, padding_F[:, None])


def _add_images(
    batch: StepBatch, delta_FR: jax.Array, feature_FT: jax.Array, feature_MD: jax.Array
) -> StepBatch:
    """The batch with the positions and features that models see images by."""
    num_rows, num_tokens = delta_FR.shape[1], feature_FT.shape[1]
    position_R = batch.positions_T[:num_rows] + delta_FR[0]
    batch = batch._replace(positions_T=batch.positions_T.at[:num_rows].set(position_R))
    if num_tokens == 0:
        return batch
    position_3R = jnp.broadcast_to(position_R, (3, num_rows))
    images = ImageTokens(
        positions_3T=jnp.concatenate([position_3R, feature_FT[:3]], axis=1),
        feature_row_T=jnp.concatenate([jnp.full(num_rows, NO_ROW, jnp.int32), feature_FT[3]]),
        feature_MD=feature_MD,
    )
    return batch._replace(images=images)
