"""What the TPU's attention can run, and the sizes of its blocks. Knows nothing of rows, nor of arrays.

A tile of I query tokens is attended to block by block of B tokens of K and V (tpu_work.py lists them). Sizes
come from a model of the chip: so many bytes must be under way as arrive during the latency of a copy,
and a tile of a prefill must have so many rows that products take longer than copies. None of it was ever
timed on a TPU; sizes that were (tpu_tuned.py) go before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxserve.kernels_pallas.kv_pages import LANES, SUBLANES, PagesLayout

HEAD_DIMS = (64, 128, 256)
KV_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
PAGE_SIZES = (16, 32, 64, 128, 256, 512)
COPY_LATENCY_S = 2e-6  # of a copy from HBM, with the time to issue those of a trip: a guess
MAX_BLOCK_TOKENS = 512
MAX_ITEMS = 8  # of a trip
MAX_UNROLLED = 16  # pairs of an item and a unit of heads whose instructions may overlap
PREFILL_BLOCK_TOKENS = 256
PREFILL_PRODUCT_ROWS = 256  # of queries, in one product
PREFILL_BUFFER_BYTES = 24 << 20
QUERY_ROW_BYTES = LANES * (4 + 4 + 2 + 4 + 4 + 4 + 4)  # q twice, as an operand, maximum, sum, output twice
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 16, 256  # of a prefill
VMEM_LIMIT_BYTES = 48 << 20  # the smallest of the chips has 64 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How the work is cut. Block tokens are a power of two, and whole pages."""

    block_tokens: int  # B
    num_items: int  # of a trip, whose copies are under way together: E
    tile_tokens: int  # I
    num_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedBlocks:
    """Blocks that were the fastest of several on a chip, and for which pool and queries."""

    device_kind: str
    jax_version: str
    layout: PagesLayout
    page_size: int
    rows_per_token: int  # of 128 numbers that the queries of a token take, in a prefill; 0 for decode
    blocks: Blocks
    time_s: float  # of a launch
    model_time_s: float  # with the blocks that are chosen where nothing was timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What the sizes of blocks depend on: public figures, of one core."""

    bytes_per_s: float
    flops_per_s: float  # bf16
    num_cores: int = 1  # that share one JAX device
    multiplies_int8: bool = False  # or bf16 only, and perhaps fp8
    adds_bf16: bool = False  # or float32 only
    tuned: tuple[TunedBlocks, ...] = ()

    def find_tuned(self, layout: PagesLayout, page_size: int, rows_per_token: int) -> Blocks | None:
        key = (layout, page_size, rows_per_token)
        rows = (row for row in self.tuned if (row.layout, row.page_size, row.rows_per_token) == key)
        return next((row.blocks for row in rows), None)


CHIPS = {
    "TPU v4": Chip(bytes_per_s=1.2e12, flops_per_s=275e12),
    "TPU v5 lite": Chip(bytes_per_s=0.82e12, flops_per_s=197e12, multiplies_int8=True),
    "TPU v5": Chip(bytes_per_s=1.38e12, flops_per_s=230e12, num_cores=2, multiplies_int8=True),  # v5p
    "TPU v6 lite": Chip(bytes_per_s=1.64e12, flops_per_s=918e12, multiplies_int8=True, adds_bf16=True),
    "TPU7x": Chip(bytes_per_s=3.7e12, flops_per_s=1153e12, adds_bf16=True),
}
ANOTHER_CHIP = Chip(bytes_per_s=1.6e12, flops_per_s=900e12)


def find_limit(head_dim: int, page_size: int, kv_dtype: str) -> str:
    """Why the TPU's kernels do not serve such a pool; empty if they do."""
    if head_dim not in HEAD_DIMS:
        return f"the TPU's kernels want heads of {_list(HEAD_DIMS)}, not {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"the TPU's kernels want pages of {_list(PAGE_SIZES)} tokens, not {page_size}"
    if kv_dtype not in KV_DTYPES:
        return f"the TPU's kernels want pools of {_list(KV_DTYPES)}, not {kv_dtype}"
    return ""


def _list(choices: tuple[int | str, ...]) -> str:
    return ", ".join(map(str, choices))


def choose_decode_blocks(layout: PagesLayout, page_size: int, tokens_per_row: int, chip: Chip) -> Blocks:
    """Blocks and items of a trip, so that its copies hide their latency and its products each other's."""
    tuned = chip.find_tuned(layout, page_size, 0)
    if tuned is not None:
        return replace(tuned, tile_tokens=tokens_per_row)
    trip_bytes = chip.bytes_per_s * COPY_LATENCY_S
    token_bytes = (layout.num_rows + layout.num_scale_rows) * LANES * 4
    block_tokens = MAX_BLOCK_TOKENS
    while block_tokens > max(LANES, page_size) and block_tokens * token_bytes > trip_bytes:
        block_tokens //= 2
    num_items = math.ceil(trip_bytes / (block_tokens * token_bytes))
    num_items = min(1 << (num_items - 1).bit_length(), MAX_ITEMS)
    return Blocks(
        block_tokens=block_tokens,
        num_items=num_items,
        tile_tokens=tokens_per_row,
        num_cores=chip.num_cores,
    )


def choose_prefill_blocks(
    layout: PagesLayout, page_size: int, num_tokens: int, rows_per_token: int, chip: Chip
) -> Blocks:
    """Tiles whose products take twice as long as the copies of K and V, if their buffers fit.

    `rows_per_token` are those of 128 numbers that the queries of a token take.
    """
    most = 1 << (num_tokens - 1).bit_length()
    tuned = chip.find_tuned(layout, page_size, rows_per_token)
    if tuned is not None:
        return replace(tuned, tile_tokens=max(min(tuned.tile_tokens, most), MIN_TILE_TOKENS))
    rows_per_unit = rows_per_token / layout.num_units
    # Of a row of queries and a token of K and V: 512 flops for each chunk, and a row of words is copied once.
    rows = 2 * chip.flops_per_s / chip.bytes_per_s * layout.num_rows / layout.num_chunks
    tile_tokens = 1 << math.ceil(math.log2(max(rows / rows_per_unit, 1)))
    tile_bytes = rows_per_token * QUERY_ROW_BYTES
    while tile_tokens > MIN_TILE_TOKENS and tile_tokens * tile_bytes > PREFILL_BUFFER_BYTES:
        tile_tokens //= 2
    return Blocks(
        block_tokens=max(PREFILL_BLOCK_TOKENS, page_size),
        num_items=1,
        tile_tokens=max(min(tile_tokens, most, MAX_TILE_TOKENS), MIN_TILE_TOKENS),
        num_cores=chip.num_cores,
    )


def pad_sublanes(num_rows: int) -> int:
    return math.ceil(num_rows / SUBLANES) * SUBLANES
