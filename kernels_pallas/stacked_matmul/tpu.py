"""Products of few rows on a TPU (Pallas): a layer's matrices come from their stack block by block, many of
them under way at once; the add, the norm, the gate and the matrix behind are in the same launch.

Of few rows a product takes as long as its matrix takes to arrive. XLA's begins with nothing under way, so
that the first of its large blocks is waited for in every product. Here a block is half a megabyte, the rows
are normed while the first ones arrive, and blocks of `down` are asked for before those of gate and up end.
It was never run on a TPU.

A step multiplies R outputs by K of the inputs; a visit is the steps of R outputs. Of a chip with two cores
each has half of the outputs, so an MLP, whose second product reads all of the first, is two launches there.

Letters beside the usual ones: P parts (gate and up), R outputs and K inputs of a block, S blocks under way, W
rows of a tile of the stack of norms, C visits of a core.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.add_norm.tpu_rows import add_norm_rows, find_vector, vector_tile
from jaxserve.kernels_pallas.stacked_matmul.blocks import LANES, Blocks, choose_blocks, serves
from jaxserve.kernels_pallas.stacked_matmul.ref import FLOAT32, StackedForm
from jaxserve.kernels_pallas.stacked_matmul.tpu_stream import (
    Outputs,
    begin_stream,
    list_stream_scratch,
    multiply_stream,
    repeat,
)

VMEM_LIMIT_BYTES = 48 << 20  # the smallest of the chips has 64 MiB
MOST_BUFFER_BYTES = 8 << 20
BUFFERED_S = 4e-6  # twice what a copy from HBM is guessed to take until it is there


def make_form(num_cores: int, bytes_per_s: float) -> StackedForm:
    """The products for a chip of so many cores a device, each of which reads so much from HBM."""
    sizes: Any = {"num_cores": num_cores, "buffer_bytes": choose_buffer_bytes(bytes_per_s)}
    return StackedForm(
        serves=partial(serves, num_cores=num_cores),
        multiply=partial(multiply, **sizes),
        norm_multiply=partial(norm_multiply, **sizes),
        norm_mlp=partial(norm_mlp, **sizes),
    )


def choose_buffer_bytes(bytes_per_s: float) -> int:
    """For the blocks that are under way to a core that reads so much from HBM."""
    return min(round(bytes_per_s * BUFFERED_S), MOST_BUFFER_BYTES)


def multiply(
    x_TD: jax.Array,
    w_LFD: jax.Array,
    layer: jax.Array,
    *,
    dtype: jnp.dtype = FLOAT32,
    num_cores: int,
    buffer_bytes: int,
    interpret: Any = False,
) -> jax.Array:
    """As ref.multiply; of several arrays x, [C, T, D], their sum is meant."""
    sizes: Any = {
        "num_cores": num_cores,
        "buffer_bytes": buffer_bytes,
        "dtype": dtype,
        "interpret": interpret,
    }
    return _launch(x_TD, None, None, (w_LFD,), None, layer, **sizes)[0]


def norm_multiply(
    x_TD: jax.Array,
    y_TD: jax.Array,
    norm_LD: jax.Array,
    w_LFD: jax.Array,
    bias_LF: jax.Array | None,
    layer: jax.Array,
    *,
    eps: float,
    num_cores: int,
    buffer_bytes: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As ref.norm_multiply."""
    sizes: Any = {"num_cores": num_cores, "buffer_bytes": buffer_bytes, "interpret": interpret}
    out_TF, x_TD = _launch(x_TD, y_TD, norm_LD, (w_LFD,), bias_LF, layer, eps=eps, **sizes)
    return x_TD, out_TF


def norm_mlp(
    x_TD: jax.Array,
    y_TD: jax.Array,
    norm_LD: jax.Array,
    w_gate_up_LFD: jax.Array,
    w_down_LDF: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    dtype: jnp.dtype = FLOAT32,
    num_cores: int,
    buffer_bytes: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As ref.norm_mlp; what the gate gives is rounded to bf16."""
    sizes: Any = {"num_cores": num_cores, "buffer_bytes": buffer_bytes, "interpret": interpret}
    launch = partial(_launch, dtype=dtype, **sizes)
    num_layers, num_gated, width = w_gate_up_LFD.shape
    gate_up_LPFD = w_gate_up_LFD.reshape(num_layers, 2, num_gated // 2, width)
    if num_cores == 1:
        y_TD, x_TD = launch(x_TD, y_TD, norm_LD, (gate_up_LPFD, w_down_LDF), None, layer, eps=eps)
        return x_TD, y_TD
    gated_TF, x_TD = launch(x_TD, y_TD, norm_LD, (gate_up_LPFD,), None, layer, eps=eps)
    return x_TD, launch(gated_TF, None, None, (w_down_LDF,), None, layer)[0]


def _launch(
    x_TD: jax.Array,
    y_TD: jax.Array | None,
    norm_LD: jax.Array | None,
    stacks: tuple[jax.Array, ...],
    bias_LF: jax.Array | None,
    layer: jax.Array,
    *,
    eps: float = 0.0,
    dtype: jnp.dtype = FLOAT32,
    num_cores: int,
    buffer_bytes: int,
    interpret: Any,
) -> list[jax.Array]:
    """The product by the last of `stacks`, [L, F, D] or, of what is gated, [L, 2, F, D]; and x + y.

    The product is in `dtype`, but bf16 where the last is of what is gated."""
    stacks = tuple(w if w.ndim == 4 else w[:, None] for w in stacks)
    cuts = []
    for w_LPFD in stacks:
        _, num_parts, num_outputs, num_inputs = w_LPFD.shape
        blocks = choose_blocks(num_outputs, num_inputs, num_parts, num_cores)
        assert blocks is not None, "asked for what is not served"
        cuts.append(blocks)
    rows = (x_TD,) if y_TD is None else (x_TD, y_TD)
    vectors = {"norm": norm_LD, "bias": bias_LF}
    vectors = {name: stack for name, stack in vectors.items() if stack is not None}
    out_dtype = jnp.bfloat16 if cuts[-1].num_parts == 2 else dtype
    num_rows = x_TD.shape[-2]
    outs = [jax.ShapeDtypeStruct((num_rows, cuts[-1].num_outputs), out_dtype)]
    outs += [jax.ShapeDtypeStruct(x_TD.shape, jnp.float32)] * (y_TD is not None)
    return pl.pallas_call(
        partial(_run, cuts=cuts, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_cores,),
            in_specs=[
                tuple(pl.BlockSpec(a.shape, lambda i, _, rank=a.ndim: (0,) * rank) for a in rows),
                {name: vector_tile(stack) for name, stack in vectors.items()},
                tuple(pl.BlockSpec(memory_space=pltpu.HBM) for _ in stacks),
            ],
            out_specs=[[pl.BlockSpec(memory_space=pl.ANY) for _ in outs]],
            scratch_shapes=[_list_scratch(cuts, buffer_bytes, outs[0], x_TD, bias_LF)],
        ),
        out_shape=[outs],
        # Of two cores one may add after the other has written.
        input_output_aliases={1: 1} if y_TD is not None and num_cores == 1 else {},
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * sum(w.size // len(w) for w in stacks),
            bytes_accessed=_count_bytes([*rows, *outs], cuts, num_cores),
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            disable_bounds_checks=not interpret,
        ),
        name="stacked_matmul",
        interpret=interpret,
    )(layer[None], rows, vectors, stacks)[0]


def _count_bytes(arrays: list[Any], cuts: list[Blocks], num_cores: int) -> int:
    """What a launch is declared to move: rows in and out, and the blocks of matrices."""
    num_bytes = sum(a.size * a.dtype.itemsize for a in arrays)
    num_bytes += sum(blocks.declared_bytes for blocks in cuts)
    # The first block of a second matrix is under way before it is waited for.
    return num_bytes - sum(blocks.block_bytes * num_cores for blocks in cuts[1:])


def _list_scratch(
    cuts: list[Blocks], buffer_bytes: int, out_TF: Any, x_TD: jax.Array, bias_LF: jax.Array | None
) -> dict[str, Any]:
    num_rows, last = x_TD.shape[-2], cuts[-1]
    scratch: dict[str, Any] = {
        "sum": pltpu.VMEM(x_TD.shape[-2:], jnp.float32),
        "normed": pltpu.VMEM(x_TD.shape[-2:], jnp.bfloat16),
        "gated": pltpu.VMEM((num_rows, last.num_inputs if len(cuts) == 2 else LANES), jnp.bfloat16),
        "bias": pltpu.VMEM((1, LANES if bias_LF is None else last.num_outputs), jnp.float32),
        "leaving": pltpu.VMEM((last.core_visits, num_rows, last.block_outputs), out_TF.dtype),
        "left": pltpu.SemaphoreType.DMA((2,)),
    }
    return scratch | list_stream_scratch(cuts, buffer_bytes)


def _run(
    layer_1: Any,
    rows: tuple[Any, ...],
    vectors: dict[str, Any],
    stacks: tuple[Any, ...],
    outs: list[Any],
    scratch: dict[str, Any],
    *,
    cuts: list[Blocks],
    eps: float,
) -> None:
    core, layer = pl.program_id(0), layer_1[0]
    streams = [
        begin_stream(blocks, core, layer, w_LPFD, arriving_SPRK, arrived_S)
        for blocks, w_LPFD, arriving_SPRK, arrived_S in zip(
            cuts, stacks, scratch["arriving"], scratch["arrived"], strict=True
        )
    ]
    repeat(streams[0].depth, streams[0].start)
    h_TD, last = scratch["normed"], streams[-1]
    if "norm" in vectors:
        weight_1D = find_vector(vectors["norm"], layer)
        add_norm_rows(*rows, weight_1D, scratch["sum"], h_TD, eps=eps)
        sum_leaves = pltpu.make_async_copy(scratch["sum"], outs[1], scratch["left"].at[1])
        pl.when(core == 0)(sum_leaves.start)
    else:
        h_TD[...] = _add_parts(rows[0]).astype(h_TD.dtype)
    if "bias" in vectors:  # as a row of its own, of which a part can be read
        scratch["bias"][...] = find_vector(vectors["bias"], layer)

    outputs = Outputs(stream=last, leaving_VTR=scratch["leaving"], left=scratch["left"].at[0], out_TF=outs[0])

    def finish(visit: Any, sums: list[jax.Array]) -> None:
        value_TR = _gate(sums)
        if "bias" in vectors:
            value_TR += scratch["bias"][:, last.find_outputs(visit)]
        outputs.send(visit, value_TR)

    def keep(visit: Any, sums: list[jax.Array]) -> None:
        scratch["gated"][:, streams[0].find_outputs(visit)] = _gate(sums).astype(jnp.bfloat16)

    if len(streams) == 2:
        multiply_stream(streams[0], h_TD, keep, last)
        h_TD = scratch["gated"]
    multiply_stream(last, h_TD, finish, None)
    outputs.wait()
    if "norm" in vectors:
        pl.when(core == 0)(sum_leaves.wait)


def _add_parts(x_TD: Any) -> jax.Array:
    """What is given as one array or as the sum of several, [C, T, D]."""
    if len(x_TD.shape) == 2:
        return x_TD[...]
    return sum((x_TD[i].astype(jnp.float32) for i in range(1, x_TD.shape[0])), x_TD[0].astype(jnp.float32))


def _gate(sums: list[jax.Array]) -> jax.Array:
    return jax.nn.silu(sums[0]) * sums[1] if len(sums) == 2 else sums[0]
