"""Attention of decode rows within one launch on a TPU: from q, k and v of all rows in VMEM to what attention
gives, there too. The rows' K and V go to the pool on the way.

Where a chip has two cores each has some of the rows: those whose tiles it walks. It writes their K and V, and
leaves zeros for the others.

Letters as in tpu_heads.py and tpu_decode_shape.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages
from jaxserve.kernels_pallas.kv_write.move_rows import RowMoves
from jaxserve.kernels_pallas.kv_write.tpu_heads import (
    HeadNorms,
    Heads,
    collect_outputs,
    pack_words,
    spread_queries,
)
from jaxserve.kernels_pallas.paged_attention.tpu_decode_core import DecodeCore, list_core_scratch
from jaxserve.kernels_pallas.paged_attention.tpu_decode_rows import RowsInVmem
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import DecodeShape
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Chip, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_stream import Cursor, Stream, StreamShape
from jaxserve.kernels_pallas.paged_attention.tpu_work import FIRST_TILE, NUM_ITEMS, RUN


def make_shape(kv: KVPages, num_heads: int, scale: float, chip: Chip) -> DecodeShape:
    """Of one token a row, without windows, caps and sinks."""
    layout, page_size = kv.layout, kv.words_PSJL.shape[1]
    blocks = choose_decode_blocks(layout, page_size, 1, chip)
    return DecodeShape(
        stream=StreamShape(layout=layout, blocks=blocks, page_size=page_size),
        heads_per_unit=layout.heads_per_unit * (num_heads // layout.num_kv_heads),
        scale=scale,
        window=None,
        soft_cap=None,
        adds_bf16=chip.adds_bf16,
    )


def list_rows_scratch(shape: DecodeShape, num_rows: int) -> dict[str, Any]:
    """For RowAttention."""
    layout = shape.layout
    token_rows = layout.num_chunks * shape.query_rows
    return {
        "words": pltpu.VMEM((num_rows * layout.num_rows, 1, LANES), jnp.int32),
        "queries": pltpu.VMEM((num_rows * token_rows, LANES), jnp.float32),
        "attended": pltpu.VMEM(((num_rows + 1) * token_rows, LANES), jnp.float32),
        "moved": pltpu.SemaphoreType.DMA,
        "pages": shape.stream.list_scratch(),
        "core": list_core_scratch(shape),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAttention:
    """What one core does, and its references: in SMEM, in HBM, and scratch."""

    shape: DecodeShape
    num_heads: int
    tiles_FL: Any
    cores_2C: Any
    first_page_1: Any
    write_index_R: Any
    table_R1W: Any
    pool_Z1L: Any
    scratch: dict[str, Any]
    norms: HeadNorms | None = None

    def announce(self) -> Cursor:
        """Ask for the ids of the first pages; `run` goes on from there."""
        return self._make_core().announce()

    def run(self, cursor: Cursor, qkv_RF: Any, cos_R1I: Any, sin_R1I: Any, out_RF: Any) -> None:
        """All are references; of rows that attend to nothing, or are another core's, `out_RF` gets zeros."""
        layout, scratch = self.shape.layout, self.scratch
        heads = Heads(qkv_RF, cos_R1I[:, 0], sin_R1I[:, 0], layout.head_dim, self.norms)
        pack_words(heads, scratch["words"], self.num_heads, layout)
        moves = self._make_moves(qkv_RF.shape[0])
        moves.start()
        spread_queries(heads, scratch["queries"], self.num_heads, layout)
        _clear(scratch["attended"], self.shape.query_rows)
        moves.wait()  # attention reads what was written
        self._make_core().run(cursor)
        collect_outputs(scratch["attended"], out_RF, self.num_heads, layout)

    def _make_core(self) -> DecodeCore:
        pages = self.scratch["pages"]
        own = {name: pages.get(name) for name in Stream._fields[6:]}  # no scales, as the pool is of bf16
        scalars = self.tiles_FL, self.cores_2C, self.first_page_1
        stream = Stream(*scalars, self.table_R1W, self.pool_Z1L, None, **own)
        rows = RowsInVmem(
            shape=self.shape,
            stream=stream,
            queries_ZL=self.scratch["queries"],
            outputs_ZL=self.scratch["attended"],
        )
        return DecodeCore(self.shape, stream, rows, None, **self.scratch["core"])

    def _make_moves(self, num_rows: int) -> RowMoves:
        page_size = self.shape.stream.page_size
        return RowMoves(
            sources=[self.scratch["words"]],
            pools=[self.pool_Z1L],
            num_tokens=num_rows,
            index_T=self.write_index_R,
            first_place=self.first_page_1[0] * page_size,
            page_size=page_size,
            moved=self.scratch["moved"],
            own_tokens=self._find_own(num_rows) if self.shape.blocks.num_cores > 1 else None,
        )

    def _find_own(self, num_rows: int) -> tuple[Any, Any]:
        """The first of this core's rows, and the one behind its last: tiles are in the order of rows."""
        core = pl.program_id(0)

        def find_first(core: Any) -> Any:
            known = jnp.minimum(core, self.shape.blocks.num_cores - 1)
            has_items = (core < self.shape.blocks.num_cores) & (self.cores_2C[NUM_ITEMS, known] > 0)
            return jnp.where(has_items, self.tiles_FL[RUN, self.cores_2C[FIRST_TILE, known]], num_rows)

        return jnp.where(core == 0, 0, find_first(core)), find_first(core + 1)


def _clear(ref_ZL: Any, rows_at_once: int) -> None:
    def clear_next(i: Any, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * rows_at_once, rows_at_once), rows_at_once)
        ref_ZL[here, :] = jnp.zeros((rows_at_once, LANES), ref_ZL.dtype)

    jax.lax.fori_loop(0, ref_ZL.shape[0] // rows_at_once, clear_next, None)
