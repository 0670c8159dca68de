"""What the GPU's prefill attention can run, and its work as a list of query tiles, from the true lengths.

The list is computed on the device, and the kernel of gpu_prefill.py walks it. A run of query tokens is cut
into tiles, its last tile first: under a causal mask the last one sees the most of the KV cache, and long
work goes first so that what is left at the end is short. Tokens of no run are listed, too, as tiles that see
nothing: attention over nothing is the zeros that they must yield, so that nobody has to clear the output
beforehand. The list has a static length, of which the first `num_tiles` entries count; jit shares it among
the layers of a step.

A tile begins at a multiple of ALIGNMENT tokens, as copies of queries must; rows of it in front of the run
are left alone. Runs of 13 and 2 tokens with a gap between them, in tiles of 8:

    token   0 . . . . . . 7   8 . . . 12   13 . .   16 17
    tile    1 1 1 1 1 1 1 1   0 0 0 0 0    3  3 3    2  2      rows 5 to 7 of tile 3, rows 0 and 1 of tile 2
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGNMENT = 8  # tokens
KV_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")


class TileList(NamedTuple):
    """L tiles, int32; those from `num_tiles_1[0]` on are not there."""

    first_token_L: jax.Array  # of row 0
    first_row_L: jax.Array  # the live rows, a row a token
    end_row_L: jax.Array
    first_pos_L: jax.Array  # of row 0 in its sequence; a row whose position is negative sees nothing
    kv_len_L: jax.Array  # tokens of the sequence in the pool; 0 for tokens of no run
    slot_L: jax.Array  # whose block table
    num_tiles_1: jax.Array


def find_prefill_limit(head_dim: int, page_size: int, kv_dtype: str) -> str:
    """Why the kernel cannot read such a pool; empty if it can."""
    if head_dim not in (64, 128, 256):
        return f"prefill wants heads of 64, 128, 256, not {head_dim}"
    sizes = (64,) if head_dim == 256 else (64, 128)  # those that divide a block of keys
    if page_size not in sizes:
        return f"prefill wants pages of {' or '.join(map(str, sizes))} tokens, not {page_size}"
    if kv_dtype not in KV_DTYPES:
        return f"prefill wants pools of {', '.join(KV_DTYPES)}, not {kv_dtype}"
    return ""


def list_tiles(
    token_C: jax.Array,
    len_C: jax.Array,
    kv_len_C: jax.Array,
    slot_C: jax.Array,
    *,
    num_tokens: int,
    tile_tokens: int,
) -> TileList:
    """Tiles that cover each of `num_tokens` tokens once: those of the runs, then those between them.

    The arguments are `paged_prefill`'s; a run of length 0 is not there. Runs must not overlap, and may lie
    in any order.
    """
    end_C = token_C + len_C
    # A gap begins at 0 and behind every run, and ends where the next run begins: it may be empty.
    gap_first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.where(len_C > 0, end_C, num_tokens)])
    is_behind = (len_C > 0) & (token_C >= gap_first[:, None])
    gap_end = jnp.min(jnp.where(is_behind, token_C, num_tokens), axis=1)
    no_gap = jnp.zeros_like(gap_first)

    first_I = jnp.concatenate([token_C, gap_first])  # I: intervals, C runs and C + 1 gaps
    len_I = jnp.concatenate([len_C, gap_end - gap_first])
    kv_len_I = jnp.concatenate([kv_len_C, no_gap])
    slot_I = jnp.concatenate([slot_C, no_gap])

    row_I = first_I % ALIGNMENT  # of an interval's first token in its first tile
    tiles_I = jnp.where(len_I > 0, (row_I + len_I + tile_tokens - 1) // tile_tokens, 0)
    end_I = jnp.cumsum(tiles_I)
    num_intervals = len(len_I)
    max_tiles = (num_tokens + num_intervals * (ALIGNMENT - 1)) // tile_tokens + num_intervals
    index_L = jnp.arange(max_tiles, dtype=jnp.int32)
    interval_L = jnp.sum(index_L[:, None] >= end_I[None, :], axis=1, dtype=jnp.int32)
    interval_L = jnp.minimum(interval_L, num_intervals - 1)

    offset_L = (end_I[interval_L] - 1 - index_L) * tile_tokens - row_I[interval_L]  # the last tile first
    kv_len_L, len_L = kv_len_I[interval_L], len_I[interval_L]
    return TileList(
        first_token_L=first_I[interval_L] + offset_L,
        first_row_L=jnp.maximum(-offset_L, 0),
        end_row_L=jnp.minimum(len_L - offset_L, tile_tokens),
        first_pos_L=jnp.where(kv_len_L > 0, kv_len_L - len_L + offset_L, -tile_tokens),
        kv_len_L=kv_len_L,
        slot_L=slot_I[interval_L],
        num_tiles_1=end_I[-1:],
    )
