"""What is static about a launch of the GPU's prefill attention, and what its programs are handed.

Shared by gpu_prefill.py, which launches, and by the programs of the warpgroups, gpu_prefill_block.py and
gpu_prefill_consumer.py. Knows nothing of what they compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxserve.kernels_pallas.kv_layer import PAIRS_PER_SCALE, choose_operand_dtype
from jaxserve.kernels_pallas.paged_attention.prefill_plan import TileList

ROWS = 64  # M: of one consumer's product
NUM_CONSUMERS = 2
MAX_HEADS_PER_TILE = 16
OUT_CHANNELS = 64  # that leave at a time
# Of an int8 or fp8 pool: channels that are widened at a time, and neighbours of K in int8 that share a scale.
PIECE_CHANNELS, SCALED_CHANNELS = 64, PAIRS_PER_SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillShape:
    """What is static about a launch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    num_k_scales: int  # 0 of a pool that has none
    scale: float
    window: int | None
    soft_cap: float | None
    block_tokens: int  # B: of K and V, in one product
    num_stages: int  # blocks of K and V in shared memory
    num_places: int  # pieces of a narrow pool in shared memory, 0 of bf16
    num_sms: int
    is_simulated: bool

    @property
    def is_narrow(self) -> bool:
        return self.kv_dtype != "bfloat16"

    @property
    def operand_dtype(self) -> Any:
        return choose_operand_dtype(self.kv_dtype)

    @property
    def piece_scales(self) -> int:
        """Scales of a token's K in a piece of an int8 pool."""
        return min(self.num_k_scales, PIECE_CHANNELS // SCALED_CHANNELS)

    @property
    def heads_per_tile(self) -> int:
        """A power of two, so that rows divide evenly and by shifts."""
        return math.gcd(self.num_heads // self.num_kv_heads, MAX_HEADS_PER_TILE)

    @property
    def tile_tokens(self) -> int:
        return NUM_CONSUMERS * ROWS // self.heads_per_tile

    @property
    def heads_per_consumer(self) -> int:
        """Consumers share the heads of a tile; where it has one, they share its tokens."""
        return max(1, self.heads_per_tile // NUM_CONSUMERS)

    @property
    def consumer_tokens(self) -> int:
        return ROWS // self.heads_per_consumer

    @property
    def piece_channels(self) -> int:
        """Channels of the output that are multiplied at a time: for more there are no registers."""
        return self.head_dim if self.head_dim <= 128 else 64

    @property
    def out_channels(self) -> int:
        """Channels of the output that leave at a time: a narrow pool's pieces need the memory."""
        if not self.is_narrow:
            return OUT_CHANNELS
        return 32 if self.head_dim <= 128 else 16

    @property
    def out_part_channels(self) -> int:
        """Channels of a row of `out_smem`: longer rows take registers for their swizzled addresses."""
        return self.out_channels if self.head_dim <= 128 else 16

    def place_consumer(self, consumer):
        """The first head and the first token, within its tile, of a consumer's rows."""
        if self.heads_per_tile == 1:
            return 0, consumer * ROWS
        return consumer * self.heads_per_consumer, 0


class Memory(NamedTuple):
    """All references of a block of threads: arrays in device memory, shared memory, barriers."""

    q_TNH: Any
    k_PSKH: Any
    v_PSKH: Any
    k_scale_PSKQ: Any  # or None
    v_scale_PSK: Any  # or None
    table_XW: Any
    sinks_N: Any  # or None
    tiles: TileList
    out_TNH: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    p_smem: Any
    out_smem: Any
    q_filled: Any
    q_emptied: Any
    k_filled: Any
    k_emptied: Any
    v_filled: Any
    v_emptied: Any
    turn: Any  # of each consumer, to start products
    v_uncleared: Any = None  # a block of V whose dead rows the producer has to clear
    narrow_smem: Any = None  # pieces of an int8 or fp8 pool as they are there
    narrow_filled: Any = None
    scale_smem: Any = None  # of K's in an int8 pool, those that belong to the piece
    scale_filled: Any = None


class Tile(NamedTuple):
    """One tile of one group of heads: scalars."""

    first_head: jax.Array
    kv_head: jax.Array
    first_token: jax.Array  # of row 0
    first_row: jax.Array  # the live rows, a row a token
    end_row: jax.Array
    first_pos: jax.Array  # of row 0
    kv_len: jax.Array
    slot: jax.Array
    first_page: jax.Array  # of those that the window reaches
    num_blocks: jax.Array  # of K and V, from that page on; one where nothing is seen
