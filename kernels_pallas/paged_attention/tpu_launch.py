"""The launch that both kernels of a TPU's attention are: cores, operands and scratch of a stream of blocks.

Knows nothing of what a core does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import LANES, KVPages
from jaxserve.kernels_pallas.paged_attention.tpu_plan import VMEM_LIMIT_BYTES
from jaxserve.kernels_pallas.paged_attention.tpu_stream import Stream, StreamShape
from jaxserve.kernels_pallas.paged_attention.tpu_work import Work

RunCore = Callable[..., None]  # of the stream, queries, sinks or None, outputs, and scratch by name


def launch_cores(
    name: str,
    run_core: RunCore,
    shape: StreamShape,
    work: Work,
    queries: jax.Array,
    sinks: list[jax.Array],
    kv: KVPages,
    scratch: Mapping[str, Any],
    *,
    checks_bounds: bool,
    interpret: Any,
) -> jax.Array:
    """What the cores write, float32 of the shape of `queries`. These stay in HBM, `sinks` (one or none) come
    to VMEM. `scratch` is beside that of the stream."""
    pools = [pool for pool in (kv.words_PSJL, kv.scales_PSJL) if pool is not None]
    pools = [pool.reshape(-1, 1, LANES) for pool in pools]  # no copy: rows of 128 lie in order
    scratch = {**shape.list_scratch(), **scratch}

    def body(tiles_FL, cores_2C, first_page_1, queries_ref, *refs):
        sinks_ref = refs[0] if sinks else None
        table_R1W, *refs = refs[len(sinks) :]
        pool_refs, (out_ref, *scratch_refs) = refs[: len(pools)], refs[len(pools) :]
        own = dict(zip(scratch, scratch_refs, strict=True))
        stream = Stream(
            tiles_FL,
            cores_2C,
            first_page_1,
            table_R1W,
            *(*pool_refs, None)[:2],
            **{name: own.pop(name, None) for name in Stream._fields[6:]},
        )
        run_core(stream, queries_ref, sinks_ref, out_ref, **own)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(shape.blocks.num_cores,),
            in_specs=[
                anywhere,
                *[pl.BlockSpec(memory_space=pltpu.VMEM) for _ in sinks],
                *[anywhere] * (1 + len(pools)),
            ],
            out_specs=anywhere,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            disable_bounds_checks=not checks_bounds,
        ),
        name=name,
        interpret=interpret,
    )(*work.tiles, work.first_page_1, queries, *sinks, work.table_C1W, *pools)
