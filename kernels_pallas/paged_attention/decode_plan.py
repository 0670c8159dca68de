"""Divides the work of paged decode attention among the blocks of a grid, by true lengths. Plain XLA.

The work is a list of pages: of every row, for every head, the pages whose tokens it attends to. It is cut
into equal shares, one for each block of a fixed grid, all of which run at once, so that a share may begin and
end inside a (row, head). What a block has of one (row, head) is a segment, and yields one partial result. Two
rows of 3 and 2 pages, two heads, shares of 4 pages:

    row, head    0,0  0,0  0,0  0,1  0,1  0,1  1,0  1,0  1,1  1,1
    block         0    0    0    0    1    1    1    1    2    2
    partial       0    0    0    1    2    2    3    3    5    5        = block + row * heads + head

Knows nothing of heads that share K and V, nor of how a page is attended to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PAGE_TOKENS = 64  # rows of one wgmma, so that one page is one tile
HEAD_DIMS = (64, 128, 256)
KV_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
MIN_PAGES_PER_BLOCK = 4  # shorter shares would cost more to merge than they save

# Columns of `rows_RF`. SEEN: tokens that the row's first query attends to; LIVE: its queries that are no
# padding; FIRST_PAGE: of its pages, the first that is read; START: where its pages begin in the list.
SLOT, SEEN, LIVE, FIRST_PAGE, NUM_PAGES, START, NEXT_ROW = range(7)


def find_decode_limit(head_dim: int, page_tokens: int, kv_dtype: str) -> str:
    """Why the GPU's decode kernel does not serve such a pool; empty if it does."""
    if page_tokens != PAGE_TOKENS:
        return f"decode wants pages of {PAGE_TOKENS} tokens, not {page_tokens}"
    if head_dim not in HEAD_DIMS:
        return f"decode wants heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if kv_dtype not in KV_DTYPES:
        return f"decode wants pools of {', '.join(KV_DTYPES)}, not {kv_dtype}"
    return ""


class DecodePlan(NamedTuple):
    """The plan of one step. It depends on no layer, so that XLA computes it once for all of them.

    `first_row_J` is the row in which the share of each of the J blocks begins. `share_2` holds the pages of a
    share and those of all.
    """

    rows_RF: jax.Array
    first_row_J: jax.Array
    share_2: jax.Array


def plan_decode(
    slot_RQ: jax.Array, kv_len_RQ: jax.Array, num_heads: int, num_blocks: int, window: int | None = None
) -> DecodePlan:
    """Shares for R rows of Q queries each: consecutive tokens of one slot, and length 0 behind the last."""
    num_rows = len(kv_len_RQ)
    seen_R = kv_len_RQ[:, 0]
    last_R = jnp.max(kv_len_RQ, axis=1)
    first_R = jnp.zeros_like(seen_R)
    if window is not None:
        first_R = jnp.maximum(seen_R - window, 0) // PAGE_TOKENS
    pages_R = (last_R + PAGE_TOKENS - 1) // PAGE_TOKENS - first_R
    end_R = jnp.cumsum(pages_R * num_heads)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    # The nearest row behind this one that has pages: padding is no work.
    with_pages_R = jnp.where(pages_R > 0, row_R, num_rows - 1)
    next_R = jnp.append(lax.cummin(with_pages_R, reverse=True)[1:], num_rows - 1)
    live_R = jnp.sum(kv_len_RQ > 0, axis=1)
    fields = [slot_RQ[:, 0], seen_R, live_R, first_R, pages_R, end_R - pages_R * num_heads, next_R]
    share = jnp.maximum(-(-end_R[-1] // num_blocks), MIN_PAGES_PER_BLOCK)
    first_J = share * jnp.arange(num_blocks, dtype=jnp.int32)
    first_row_J = jnp.sum(first_J[:, None] >= end_R[None, :], axis=1, dtype=jnp.int32)
    return DecodePlan(
        rows_RF=jnp.stack(fields, axis=1).astype(jnp.int32),
        first_row_J=jnp.minimum(first_row_J, num_rows - 1),
        share_2=jnp.stack([share, end_R[-1]]).astype(jnp.int32),
    )
