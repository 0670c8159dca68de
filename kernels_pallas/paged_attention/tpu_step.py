"""The work of a step's attention on a TPU, listed once for all layers.

A program that loops over layers would list it in every turn, as XLA moves none of it out of the loop. Knows
nothing of what a layer is.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxserve.kernels_pallas.kv_pages import KVPages
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Chip, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_prefill import choose_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_work import StepWork, list_decode_work, list_prefill_work


def list_step_work(
    kv: KVPages,
    table_XW: jax.Array,
    decode: tuple[jax.Array, jax.Array],
    prefill: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    num_tokens: int,
    num_heads: int,
    chip: Chip,
    interpret: Any = False,
) -> StepWork:
    """`decode` and `prefill` are what `paged_decode` and `paged_prefill` take behind the table: slots and so
    on, of no rows where there are none. `num_tokens` are those of prefill, `num_heads` query heads. `kv` is
    the pool of a layer or of all of them."""
    layout, page_size = kv.layout, kv.words_PSJL.shape[-3]
    decode_work = prefill_work = None
    if len(decode[0]):
        blocks = choose_decode_blocks(layout, page_size, 1, chip)
        decode_work = list_decode_work(table_XW, *decode, blocks=blocks, interpret=interpret)
    if len(prefill[0]):
        blocks = choose_blocks(layout, page_size, num_tokens, num_heads, chip)
        prefill_work = list_prefill_work(
            table_XW, *prefill, num_tokens=num_tokens, blocks=blocks, interpret=interpret
        )
    return StepWork(decode_work, prefill_work)
