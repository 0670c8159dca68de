"""The first sampling kernel: reads every logit once, notes what each line holds, and draws for uncut rows.

The next launch (gpu_choose.py) looks at the lines that can hold a kept token. For rows that nothing is cut
from, greedy ones among them, the draw is done here; noise is computed only for slabs that could still win.
Letters: U lines of a slab, G lines of a group, C slots of line statistics, Z blocks of a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.sampling.division import LINE, LOG2_E, SLAB_LINES, Geometry, Rows
from jaxserve.kernels_pallas.sampling.noise import LARGEST_NOISE, gumbel

GROUP_LINES = 4  # lines that random numbers are computed for at once: one for each warp

# Lines lie across a warpgroup so that each warp holds whole ones, four neighbouring logits a lane.
LINES_LAYOUT = mosaic.tiled_layout(((4, LINE), (4,)), warp_dims=(-3,), lane_dims=(-2,))


def scan(geometry: Geometry, interpret: Any) -> Any:
    """(logits [B, L, 128], *Rows) -> line maxima and masses [B, C], best value and id of each block [B, Z].

    Slot s of a row is line s, except in the last slabs, which end with the last line and hold -inf and 0
    for the lines that came before. A line's mass is relative to its own largest logit, and is written only
    for rows that need it. Cut rows have no best value.
    """
    num_rows, num_blocks = geometry.num_rows, geometry.num_blocks
    block_slots = geometry.slabs_per_block * SLAB_LINES

    def body(logits_ref, *refs):
        rows_ref, outs = Rows(*refs[:8]), refs[8:12]
        max_ref, mass_ref, best_ref, id_ref, max_smem, mass_smem = *outs, *refs[12:]
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")

        def scan_slab(index, best):
            return _scan_slab(
                geometry, logits_ref.at[row], rows_ref, max_smem, mass_smem, row, block, index, best
            )

        start = (jnp.float32(-jnp.inf), jnp.int32(0))
        best, best_id = jax.lax.fori_loop(0, geometry.slabs_per_block, scan_slab, start)
        best_ref[row, block] = best
        id_ref[row, block] = best_id
        mosaic.commit_smem()
        slots = mosaic.ds(block * block_slots, block_slots)
        mosaic.copy_smem_to_gmem(max_smem, max_ref.at[row, slots])

        @mosaic.when(_needs_masses(rows_ref, row))
        def _():
            mosaic.copy_smem_to_gmem(mass_smem, mass_ref.at[row, slots])

        mosaic.wait_smem_to_gmem(0)

    slots = jax.ShapeDtypeStruct((num_rows, geometry.num_slots), jnp.float32)
    return mosaic.kernel(
        body,
        out_type=[
            slots,
            slots,
            jax.ShapeDtypeStruct((num_rows, num_blocks), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, num_blocks), jnp.int32),
        ],
        scratch_types=[mosaic.SMEM((block_slots,), jnp.float32)] * 2,
        grid=(num_rows, num_blocks),
        grid_names=("row", "block"),
        kernel_name="sampling_scan",
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Lane),
        interpret=interpret,
    )


def _scan_slab(geometry, logits_ref, rows_ref, max_smem, mass_smem, row, block, index, best):
    """Note the statistics of one slab of lines; the best token so far and its value, with this slab's."""
    slab_first = (block * geometry.slabs_per_block + index) * SLAB_LINES
    first = jnp.minimum(slab_first, geometry.num_lines - SLAB_LINES)
    x_UV = _read_lines(logits_ref, first, SLAB_LINES)
    line_UV = first + _iota((SLAB_LINES, LINE), 0)
    x_UV = jnp.where(line_UV >= slab_first, x_UV, -jnp.inf)
    per_temperature = 1 / rows_ref.temperature[row]
    max_U = jnp.max(x_UV, axis=1)
    here = mosaic.ds(index * SLAB_LINES, SLAB_LINES)
    mosaic.store(max_smem.at[here], max_U)

    @mosaic.when(_needs_masses(rows_ref, row))
    def _():
        origin_U = jnp.where(max_U == -jnp.inf, 0.0, max_U)
        origin_UV = mosaic.layout_cast(jax.lax.broadcast_in_dim(origin_U, x_UV.shape, (0,)), LINES_LAYOUT)
        weight_UV = jnp.exp2((x_UV - origin_UV) * (LOG2_E * per_temperature))
        mosaic.store(mass_smem.at[here], jnp.sum(weight_UV, axis=1))

    largest = jnp.max(max_U)
    is_greedy = rows_ref.is_greedy[row] > 0
    bound = jnp.where(is_greedy, largest, largest * per_temperature + LARGEST_NOISE)
    bound = jnp.where(rows_ref.is_cut[row] > 0, -jnp.inf, bound)

    def draw(best, best_id):
        value, value_id = _draw_from_slab(logits_ref, rows_ref, row, first, slab_first, is_greedy)
        is_better = value > best
        return jnp.where(is_better, value, best), jnp.where(is_better, value_id, best_id)

    return jax.lax.cond(bound > best[0], draw, lambda best, best_id: (best, best_id), *best)


def _draw_from_slab(logits_ref, rows_ref, row, first, slab_first, is_greedy):
    """The largest value among a slab's tokens, scaled logits with noise or the logits themselves, and its id.

    The slab is read again, four lines at a time: its numbers would fill the registers until here.
    """
    offset_GV = _iota((GROUP_LINES, LINE), 0) * LINE + _iota((GROUP_LINES, LINE), 1)

    def draw_group(index, best):
        value_GV, best_id_GV = best
        line = first + index * GROUP_LINES
        x_GV = _read_lines(logits_ref, line, GROUP_LINES)
        id_GV = line * LINE + offset_GV

        def perturb(x_GV):
            noise_GV = gumbel(rows_ref.key_0[row], rows_ref.key_1[row], id_GV.astype(jnp.uint32))
            return x_GV / rows_ref.temperature[row] + noise_GV

        drawn_GV = jax.lax.cond(is_greedy, lambda x_GV: x_GV, perturb, x_GV)
        is_better_GV = (drawn_GV > value_GV) & (id_GV >= slab_first * LINE)
        return jnp.where(is_better_GV, drawn_GV, value_GV), jnp.where(is_better_GV, id_GV, best_id_GV)

    nothing_GV = mosaic.layout_cast(jnp.full((GROUP_LINES, LINE), -jnp.inf, jnp.float32), LINES_LAYOUT)
    start = (nothing_GV, offset_GV)
    value_GV, id_GV = jax.lax.fori_loop(0, SLAB_LINES // GROUP_LINES, draw_group, start)
    value = jnp.max(jnp.max(value_GV, axis=1))
    id_GV = jnp.where(value_GV == value, id_GV, jnp.iinfo(jnp.int32).max)
    return value, jnp.min(jnp.min(id_GV, axis=1))


def _needs_masses(rows_ref, row):
    """Whether the next kernel asks for the masses of a row's lines: for top-p of all tokens."""
    return (rows_ref.is_cut[row] > 0) & (rows_ref.top_p[row] < 1) & (rows_ref.top_k[row] == 0)


def _read_lines(logits_ref, first, num_lines):
    """Lines as float32, each in one warp."""
    lines_ref = logits_ref.at[mosaic.ds(first, num_lines)]
    return mosaic.load(lines_ref, layout=LINES_LAYOUT, optimized=False).astype(jnp.float32)


def _iota(shape, axis, layout=LINES_LAYOUT):
    return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
