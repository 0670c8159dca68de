"""Paged decode attention on a TPU, in Pallas; `ref.paged_decode` is its specification.

The launch that only attends, to queries that rope_write has put in order; what a core does is in
tpu_decode_core.py. Letters as in tpu_decode_shape.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.kv_pages import KVPages
from jaxserve.kernels_pallas.paged_attention.tpu_decode_core import DecodeCore, list_core_scratch
from jaxserve.kernels_pallas.paged_attention.tpu_decode_rows import RowsInHbm
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import (
    DecodeShape,
    gather_rows,
    scatter_rows,
    spread_sinks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_launch import launch_cores
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    ANOTHER_CHIP,
    Blocks,
    Chip,
    choose_decode_blocks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries, from_units, order_queries
from jaxserve.kernels_pallas.paged_attention.tpu_stream import (
    Stream,
    StreamShape,
)
from jaxserve.kernels_pallas.paged_attention.tpu_work import (
    Work,
    list_decode_work,
)


def paged_decode(
    q_RNH: jax.Array | UnitQueries,
    kv: KVPages,
    table_XW: jax.Array,
    slot_R: jax.Array,
    kv_len_R: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    tokens_per_row: int = 1,
    work: Work | None = None,
    chip: Chip = ANOTHER_CHIP,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`ref.paged_decode` of a pool of KVPages: [R, N, H] float32, of [R, N, H] or of what rope_write gave.

    Queries and probabilities are rounded to bf16. `work` is what `list_decode_work` gives for the same
    arguments, if the caller has it already. `chip` is what sizes are chosen for, `blocks` are sizes for tests
    and for tuning; `interpret` takes what `pallas_call` does.
    """
    layout, page_size = kv.layout, kv.words_PSJL.shape[1]
    queries = order_queries(q_RNH, layout)
    num_heads = queries.num_heads
    shape = DecodeShape(
        stream=StreamShape(
            layout=layout,
            blocks=blocks or choose_decode_blocks(layout, page_size, tokens_per_row, chip),
            page_size=page_size,
        ),
        heads_per_unit=layout.heads_per_unit * (num_heads // layout.num_kv_heads),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        adds_bf16=chip.adds_bf16,
    )
    if work is None:
        rows = (table_XW, slot_R, kv_len_R)
        sizes = {"tokens_per_row": tokens_per_row, "window": window, "blocks": shape.blocks}
        work = list_decode_work(*rows, **sizes, interpret=interpret)
    sinks = [] if sinks_N is None else [spread_sinks(sinks_N, shape)]
    out_RUAML = _launch(shape, work, gather_rows(queries.q_TUAML, shape), sinks, kv, interpret)
    out_TUYAL = scatter_rows(out_RUAML, shape)
    out_RNH = from_units(out_TUYAL, num_heads, layout)
    return jnp.where(work.is_live_T[:, None, None], out_RNH, 0.0)


def _launch(shape: DecodeShape, work: Work, q_RUAML, sinks: list, kv: KVPages, interpret) -> jax.Array:
    in_hbm = RowsInHbm.list_scratch(shape, q_RUAML.shape[1:])

    def run_core(stream: Stream, q_RUAML: Any, sinks_UML: Any, out_RUAML: Any, **scratch: Any) -> None:
        own = {name: scratch.pop(name) for name in in_hbm}
        rows = RowsInHbm(shape=shape, stream=stream, q_RUAML=q_RUAML, out_RUAML=out_RUAML, **own)
        core = DecodeCore(shape, stream, rows, sinks_UML, **scratch)
        core.run(core.announce())

    return launch_cores(
        "paged_decode",
        run_core,
        shape.stream,
        work,
        q_RUAML,
        sinks,
        kv,
        {**in_hbm, **list_core_scratch(shape)},
        checks_bounds=False,  # of copies: a third of a page's instructions
        interpret=interpret,
    )
