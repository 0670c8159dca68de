"""What a launch of the TPU's decode attention is made for, and its rows of queries and outputs. Plain XLA.

Letters beside the usual ones: U units of KV heads, A chunks of a unit, L = 128 lanes, M query rows of a unit,
padded to a multiple of 8: token by token (Q of them), and of a token head by head (Y). Knows no pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_pages import LANES, PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import MAX_UNROLLED, Blocks, pad_sublanes
from jaxserve.kernels_pallas.paged_attention.tpu_stream import StreamShape


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape:
    stream: StreamShape
    heads_per_unit: int  # query heads
    scale: float
    window: int | None
    soft_cap: float | None
    adds_bf16: bool

    @property
    def layout(self) -> PagesLayout:
        return self.stream.layout

    @property
    def blocks(self) -> Blocks:
        return self.stream.blocks

    @property
    def query_rows(self) -> int:
        """M."""
        return pad_sublanes(self.blocks.tile_tokens * self.heads_per_unit)

    def find_heads(self, row_M1: jax.Array) -> jax.Array:
        """Which KV head of a unit the rows are for."""
        group = self.heads_per_unit // self.layout.heads_per_unit
        head_M1 = row_M1 * 0
        for token in range(self.blocks.tile_tokens):
            for head in range(1, self.layout.heads_per_unit):
                first_row = token * self.heads_per_unit + head * group
                head_M1 += ((row_M1 >= first_row) & (row_M1 < first_row + group)).astype(jnp.int32) * head
        return head_M1

    @property
    def units_at_once(self) -> int:
        """Units whose instructions may overlap: a divisor of all, and whole rows of words."""
        num_units = self.layout.num_units
        for count in range(max(MAX_UNROLLED // self.blocks.num_items, 1), 1, -1):
            is_whole = count * self.layout.chunks_per_unit % self.layout.chunks_per_row == 0
            if num_units % count == 0 and (is_whole or count == num_units):
                return count
        return 1 if self.layout.chunks_per_unit >= self.layout.chunks_per_row else num_units


def gather_rows(q_TUAML: jax.Array, shape: DecodeShape) -> jax.Array:
    """[R, U, A, M, L], M those of all tokens of a row."""
    tokens = shape.blocks.tile_tokens
    if tokens == 1:
        return q_TUAML
    q_TUAYL = q_TUAML[:, :, :, : shape.heads_per_unit]
    q_RQUAYL = q_TUAYL.reshape(-1, tokens, *q_TUAYL.shape[1:])
    q_RUAQYL = q_RQUAYL.transpose(0, 2, 3, 1, 4, 5)
    q_RUAML = q_RUAQYL.reshape(*q_RUAQYL.shape[:3], -1, LANES)
    padding = shape.query_rows - q_RUAML.shape[3]
    return jnp.pad(q_RUAML, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))


def scatter_rows(out_RUAML: jax.Array, shape: DecodeShape) -> jax.Array:
    """[T, U, Y, A, L]: what `gather_rows` did, undone."""
    tokens, heads = shape.blocks.tile_tokens, shape.heads_per_unit
    out_RUAQYL = out_RUAML[:, :, :, : tokens * heads].reshape(*out_RUAML.shape[:3], tokens, heads, LANES)
    out_RQUYAL = out_RUAQYL.transpose(0, 3, 1, 4, 2, 5)
    return out_RQUYAL.reshape(-1, *out_RQUYAL.shape[2:])


def spread_sinks(sinks_N: jax.Array, shape: DecodeShape) -> jax.Array:
    """The score that each query's softmax begins with, [U, M, L]."""
    num_units, rows = shape.layout.num_units, shape.query_rows
    num_heads = num_units * shape.heads_per_unit
    sinks_N = jnp.pad(sinks_N.astype(jnp.float32), (0, num_heads - len(sinks_N)))
    sinks_UM = jnp.tile(sinks_N.reshape(num_units, -1), (1, shape.blocks.tile_tokens))
    sinks_UM = jnp.pad(sinks_UM, ((0, 0), (0, rows - sinks_UM.shape[1])))
    return jnp.broadcast_to(sinks_UM[:, :, None], (num_units, rows, LANES))
