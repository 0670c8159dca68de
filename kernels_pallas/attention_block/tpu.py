"""The attention block of a layer for few decode rows on a TPU, in one launch (Pallas).

In decode of few rows each launch is short, and what lies between two of them counts: starting one takes a
microsecond, its first copy two, and what one leaves in HBM the next brings back. Here q, k, v, queries and
outputs stay in VMEM, K and V of the rows leave for the pool while queries are put in order, and blocks of o,
as many as there is room for, are asked for behind those of q, k and v, so that they are there when attention
is done. It was never run on a TPU.

    HBM in    blocks of q, k, v    blocks of o     pages
    core      norm, q, k, v        rotate, pack    attend    o
    HBM out                        words of K, V             what the block adds

For chips of one core a device: o of a row wants all heads, which two cores share by rows. Composed of what
the launches of each part do; letters as there, and Z rows of lanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.add_norm.tpu_rows import add_norm_rows, find_vector, vector_tile
from jaxserve.kernels_pallas.attention_block.ref import BlockForm, BlockWeights
from jaxserve.kernels_pallas.attention_block.tpu_rows import RowAttention, list_rows_scratch, make_shape
from jaxserve.kernels_pallas.kv_pages import LANES, KVPages
from jaxserve.kernels_pallas.kv_write.tpu_heads import HeadNorms
from jaxserve.kernels_pallas.paged_attention.tpu_decode_shape import DecodeShape
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Chip
from jaxserve.kernels_pallas.paged_attention.tpu_work import Work
from jaxserve.kernels_pallas.stacked_matmul.blocks import Blocks, choose_blocks, serves
from jaxserve.kernels_pallas.stacked_matmul.ref import FLOAT32
from jaxserve.kernels_pallas.stacked_matmul.tpu import (
    MOST_BUFFER_BYTES,
    VMEM_LIMIT_BYTES,
    choose_buffer_bytes,
)
from jaxserve.kernels_pallas.stacked_matmul.tpu_stream import (
    Outputs,
    begin_stream,
    list_stream_scratch,
    multiply_stream,
    repeat,
)


def make_form(chip: Chip) -> BlockForm | None:
    """The block for a chip; None for one of two cores a device."""
    if chip.num_cores > 1:
        return None
    return BlockForm(_serves, partial(attend, chip=chip))


def _serves(num_rows: int, w_qkv_LFD: Any, w_o_LDF: Any, kv: Any) -> bool:
    is_bf16 = isinstance(kv, KVPages) and kv.layout.kv_dtype == "bfloat16"
    return is_bf16 and serves(num_rows, w_qkv_LFD) and serves(num_rows, w_o_LDF)


def attend(
    x_RD: jax.Array,
    y_RD: jax.Array,
    weights: BlockWeights,
    layer: jax.Array,
    kv: KVPages,
    rope: tuple[jax.Array, jax.Array],
    write_index_R: jax.Array,
    work: Work,
    *,
    num_heads: int,
    scale: float,
    eps: float,
    dtype: jnp.dtype = FLOAT32,
    chip: Chip,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, KVPages]:
    """As ref.attend, of a pool of KVPages, whose page 0 is left as it is. `work` is what `list_decode_work`
    gives for the rows, with the layer's first page, behind which its places are counted."""
    shape = make_shape(kv, num_heads, scale, chip)
    stacks = [w_LFD[:, None] for w_LFD in (weights.w_qkv_LFD, weights.w_o_LDF)]
    cuts = [_cut(w_LPFD) for w_LPFD in stacks]
    named = zip(("norm", "bias", "q_norm", "k_norm"), weights.list_vectors(), strict=True)
    vectors = {name: stack for name, stack in named if stack is not None}
    pool_Z1L = kv.words_PSJL.reshape(-1, 1, LANES)
    scalars = (layer[None], work.first_page_1, *work.tiles, write_index_R)
    outs = {
        "sum": jax.ShapeDtypeStruct(x_RD.shape, jnp.float32),
        "pool": jax.ShapeDtypeStruct(pool_Z1L.shape, pool_Z1L.dtype),
        "out": jax.ShapeDtypeStruct(x_RD.shape, dtype),
    }
    whole = [pl.BlockSpec(a.shape, lambda i, *_, rank=a.ndim: (0,) * rank) for a in (x_RD, y_RD, *rope)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    operands = [x_RD, y_RD, *rope, vectors, stacks, work.table_C1W, pool_Z1L]
    in_specs = [*whole, jax.tree.map(vector_tile, vectors), [anywhere] * 2, anywhere, anywhere]
    num_operands = len(jax.tree.leaves(operands))
    new = pl.pallas_call(
        partial(_run, shape=shape, cuts=cuts, num_heads=num_heads, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=in_specs,
            out_specs=[dict.fromkeys(outs, anywhere)],
            scratch_shapes=[_list_scratch(shape, cuts, x_RD, dtype, chip)],
        ),
        out_shape=[outs],
        # Outputs are in the order of their names.
        input_output_aliases={len(scalars): 2, len(scalars) + num_operands - 1: 1},
        cost_estimate=_estimate_cost(outs, cuts, kv, y_RD),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            disable_bounds_checks=not interpret,
        ),
        name="attention_block",
        interpret=interpret,
    )(*scalars, *operands)[0]
    return new["sum"], new["out"], KVPages(new["pool"].reshape(kv.words_PSJL.shape), None, kv.layout)


def _cut(w_LPFD: jax.Array) -> Blocks:
    _, num_parts, num_outputs, num_inputs = w_LPFD.shape
    blocks = choose_blocks(num_outputs, num_inputs, num_parts, 1)
    assert blocks is not None, "asked for what is not served"
    return blocks


def _estimate_cost(outs: dict[str, Any], cuts: list[Blocks], kv: KVPages, y_RD: jax.Array) -> pl.CostEstimate:
    """What a launch is declared to move: the blocks of both matrices, of which the second's first is under
    way before it is waited for, rows in and out, and K and V of the rows. Not what attention reads."""
    num_bytes = sum(blocks.declared_bytes for blocks in cuts) - cuts[1].block_bytes
    num_bytes += 4 * LANES * kv.layout.num_rows * len(y_RD) + y_RD.nbytes
    # The residual stream goes in and out.
    num_bytes += sum(outs[name].size * outs[name].dtype.itemsize for name in ("sum", "sum", "out"))
    num_weights = sum(blocks.num_outputs * blocks.num_inputs for blocks in cuts)
    return pl.CostEstimate(flops=2 * len(y_RD) * num_weights, bytes_accessed=num_bytes, transcendentals=0)


def _list_scratch(
    shape: DecodeShape, cuts: list[Blocks], x_RD: jax.Array, dtype: jnp.dtype, chip: Chip
) -> dict[str, Any]:
    qkv, o = cuts
    num_rows = len(x_RD)
    in_flight = list_stream_scratch([qkv], choose_buffer_bytes(chip.bytes_per_s))
    waiting = list_stream_scratch([o], MOST_BUFFER_BYTES)
    return {
        "normed": pltpu.VMEM(x_RD.shape, jnp.bfloat16),
        "sum": pltpu.VMEM(x_RD.shape, jnp.float32),
        "qkv": pltpu.VMEM((num_rows, qkv.num_outputs), jnp.float32),
        "heads": pltpu.VMEM((num_rows, o.num_inputs), jnp.bfloat16),
        "leaving": pltpu.VMEM((o.num_visits, num_rows, o.block_outputs), dtype),
        "left": pltpu.SemaphoreType.DMA((2,)),
        "attention": list_rows_scratch(shape, num_rows),
        "arriving": in_flight["arriving"] + waiting["arriving"],
        "arrived": in_flight["arrived"] + waiting["arrived"],
    }


class _Refs(NamedTuple):
    """In SMEM, in VMEM, in HBM; what is written, by name; and the scratch of `_list_scratch`."""

    layer_1: Any
    first_page_1: Any
    tiles_FL: Any
    cores_2C: Any
    write_index_R: Any
    x_RD: Any
    y_RD: Any
    cos_R1I: Any
    sin_R1I: Any
    vectors: dict[str, Any]
    stacks: list[Any]
    table_R1W: Any
    pool_Z1L: Any  # the same as is written
    outs: dict[str, Any]
    scratch: dict[str, Any]


def _run(*args: Any, shape: DecodeShape, cuts: list[Blocks], num_heads: int, eps: float) -> None:
    refs = _Refs(*args)
    outs, scratch, layer = refs.outs, refs.scratch, refs.layer_1[0]
    own = zip(cuts, refs.stacks, scratch["arriving"], scratch["arrived"], strict=True)
    qkv, o = (begin_stream(blocks, 0, layer, *buffers) for blocks, *buffers in own)
    sum_left, out_left = (scratch["left"].at[i] for i in range(2))
    outputs = Outputs(stream=o, leaving_VTR=scratch["leaving"], left=out_left, out_TF=outs["out"])
    vectors = {name: find_vector(tile, layer) for name, tile in refs.vectors.items()}
    norms = None
    if "q_norm" in vectors:
        norms = HeadNorms(vectors["q_norm"], vectors["k_norm"], num_heads, eps)
    attention = RowAttention(
        shape=shape,
        num_heads=num_heads,
        norms=norms,
        tiles_FL=refs.tiles_FL,
        cores_2C=refs.cores_2C,
        first_page_1=refs.first_page_1,
        write_index_R=refs.write_index_R,
        table_R1W=refs.table_R1W,
        pool_Z1L=outs["pool"],
        scratch=scratch["attention"],
    )

    repeat(qkv.depth, qkv.start)
    cursor = attention.announce()
    add_norm_rows(refs.x_RD, refs.y_RD, vectors["norm"], scratch["sum"], scratch["normed"], eps=eps)
    sum_leaves = pltpu.make_async_copy(scratch["sum"], outs["sum"], sum_left)
    sum_leaves.start()

    def keep_qkv(visit: Any, sums: list[jax.Array]) -> None:
        scratch["qkv"][:, qkv.find_outputs(visit)] = sums[0]

    multiply_stream(qkv, scratch["normed"], keep_qkv, o)
    repeat(o.depth - qkv.depth, lambda i: o.start(qkv.depth + i))
    if "bias" in vectors:
        scratch["qkv"][...] += vectors["bias"]
    attention.run(cursor, scratch["qkv"], refs.cos_R1I, refs.sin_R1I, scratch["heads"])
    multiply_stream(o, scratch["heads"], lambda visit, sums: outputs.send(visit, sums[0]), None)
    outputs.wait()
    sum_leaves.wait()
