"""Paged decode for Hopper: in the interpreter against float64, and compiled for an H200.

The interpreter watches for races, and gives NaN for what nothing wrote.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.kv_layer import KVLayer, num_k_scales
from jaxserve.kernels_pallas.paged_attention import ref
from jaxserve.kernels_pallas.paged_attention.decode_plan import (
    NEXT_ROW,
    NUM_PAGES,
    PAGE_TOKENS,
    START,
    plan_decode,
)
from tests.kernels.cases import Heads
from tests.kernels.cases_decode import DECODE_CASES, DecodeCase, DecodeInput, attend_exactly, make_input
from tests.kernels.h200 import CompileReport, assert_fits, compile_for_h200, require_h200_compiler

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="The GPU kernels need jax 0.11.2 or later."
)
# Of outputs near 1: probabilities are rounded to bf16, or to float16 where the pool is fp8.
TOLERANCE = {"bfloat16": 1e-2, "int8": 1e-2, "float8_e4m3fn": 2e-3}


def arguments_of(given: DecodeInput) -> tuple[Any, ...]:
    return given.q_RNH, given.pool.kv, given.pool.table_XW, given.slot_R, given.kv_len_R


def options_of(case: DecodeCase, sinks_N: Any) -> dict[str, Any]:
    return {
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sinks_N": sinks_N,
        "tokens_per_row": case.tokens_per_row,
    }


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_the_reference_has_every_feature(case):
    given = make_input(case)
    arguments = arguments_of(given)
    decode = jax.jit(
        lambda *arguments, sinks_N: ref.paged_decode(
            *arguments, scale=given.scale, **options_of(case, sinks_N)
        )
    )
    out_RNH = decode(*arguments, sinks_N=given.sinks_N)
    np.testing.assert_allclose(out_RNH, attend_exactly(case, given), atol=TOLERANCE[case.dtype])


@needs_mosaic
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_the_kernel_attends_exactly(case):
    from jaxserve.kernels_pallas import mosaic
    from jaxserve.kernels_pallas.paged_attention.gpu_decode import DecodeTiles, paged_decode

    given = make_input(case)
    arguments = arguments_of(given)
    tiles = DecodeTiles(num_blocks=case.num_blocks, num_places=case.num_places)
    decode = jax.jit(
        lambda *arguments, sinks_N: paged_decode(
            *arguments,
            scale=given.scale,
            **options_of(case, sinks_N),
            tiles=tiles,
            interpret=mosaic.simulate(),
        )
    )
    out_RNH = decode(*arguments, sinks_N=given.sinks_N)
    np.testing.assert_allclose(out_RNH, attend_exactly(case, given), atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize(
    "lengths", [[320, 0, 128], [0, 0, 1], [0, 0], [192, 128], [513, *[3] * 9, 0]], ids=str
)
@pytest.mark.parametrize("num_blocks", [1, 3, 7])
def test_the_plan_gives_every_page_to_one_block(lengths, num_blocks):
    num_heads = 2
    slots = np.arange(len(lengths), dtype=np.int32)
    plan = jax.jit(plan_decode, static_argnums=(2, 3))(
        slots[:, None], np.asarray(lengths, np.int32)[:, None], num_heads, num_blocks
    )
    rows_RF, (share, num_pages) = np.asarray(plan.rows_RF), np.asarray(plan.share_2)
    visited, partials = [], set()
    for block, row in enumerate(np.asarray(plan.first_row_J)):
        first = block * share
        head, page = divmod(max(first - rows_RF[row, START], 0), max(rows_RF[row, NUM_PAGES], 1))
        for _ in range(min(share, num_pages - first)):
            visited.append((row, head, page))
            partials.add((block + row * num_heads + head, row, head, block))
            page += 1
            if page == rows_RF[row, NUM_PAGES]:
                head, page = head + 1, 0
            if head == num_heads:
                row, head = rows_RF[row, NEXT_ROW], 0
    assert visited == [
        (row, head, page)
        for row, length in enumerate(lengths)
        for head in range(num_heads)
        for page in range(-(-length // PAGE_TOKENS))
    ]
    assert len({index for index, *_ in partials}) == len(partials)


@needs_mosaic
@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [(Heads(4, 2, 64), 16, "bfloat16"), (Heads(4, 2, 96), 64, "bfloat16"), (Heads(4, 2, 64), 64, "float32")],
    ids=str,
)
def test_a_shape_that_the_kernel_does_not_serve_is_refused(heads, page_size, dtype):
    from jaxserve.kernels_pallas.paged_attention.gpu_decode import paged_decode

    given = make_input(DecodeCase("", heads, ((1, 1),), page_size=page_size, dtype=dtype))
    with pytest.raises(ValueError, match="This pool is not for the GPU's kernel: decode wants"):
        paged_decode(*arguments_of(given), scale=given.scale)


def compile_decode(heads: Heads, num_rows: int, kv_dtype: str = "bfloat16", **options) -> CompileReport:
    require_h200_compiler()
    from jaxserve.kernels_pallas.paged_attention.gpu_decode import paged_decode

    def spec(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = (4096, 64, heads.num_kv_heads)
    pool = spec(jnp.dtype(kv_dtype), *tokens, heads.head_dim)
    kv = KVLayer(pool, pool)
    if kv_dtype == "int8":
        k_scales = spec(jnp.float32, *tokens, num_k_scales(heads.head_dim))
        kv = KVLayer(pool, pool, k_scales, spec(jnp.float32, *tokens))
    return compile_for_h200(
        lambda *arguments: paged_decode(*arguments, scale=heads.head_dim**-0.5, **options),
        spec(jnp.bfloat16, num_rows, heads.num_heads, heads.head_dim),
        kv,
        spec(jnp.int32, num_rows, 512),
        spec(jnp.int32, num_rows),
        spec(jnp.int32, num_rows),
    )


# Heads, rows, options, registers a thread, blocks on one multiprocessor.
COMPILED = [
    (Heads(32, 8, 128), 1, {}, 128, 2),
    (Heads(32, 8, 128), 256, {}, 128, 2),
    (Heads(14, 2, 64), 64, {}, 128, 2),
    (Heads(16, 1, 128), 8, {}, 128, 1),
    (Heads(8, 4, 256), 32, {"window": 4096, "soft_cap": 50.0}, 192, 1),
    (Heads(64, 8, 64), 64, {"window": 128}, 128, 2),
    (Heads(28, 4, 128), 64, {"tokens_per_row": 4}, 192, 1),
    (Heads(28, 4, 128), 64, {"tokens_per_row": 8}, 192, 1),
    (Heads(64, 8, 64), 64, {"tokens_per_row": 4}, 128, 2),
    (Heads(64, 8, 64), 64, {"tokens_per_row": 8}, 240, 1),
    (Heads(32, 8, 128), 64, {"kv_dtype": "int8"}, 128, 2),
    (Heads(14, 2, 64), 64, {"kv_dtype": "int8"}, 128, 2),
    (Heads(16, 1, 128), 64, {"kv_dtype": "int8"}, 240, 1),
    (Heads(8, 4, 256), 64, {"kv_dtype": "int8"}, 240, 1),
    (Heads(32, 8, 128), 64, {"kv_dtype": "float8_e4m3fn"}, 128, 2),
    (Heads(8, 4, 256), 64, {"kv_dtype": "float8_e4m3fn"}, 192, 1),
]


@pytest.mark.parametrize(
    ("heads", "num_rows", "options", "max_registers", "blocks_per_sm"), COMPILED, ids=str
)
def test_the_kernels_compile_for_an_h200(heads, num_rows, options, max_registers, blocks_per_sm):
    report = compile_decode(heads, num_rows, **options)
    assert_fits(report.kernel("paged_decode"), max_registers=max_registers, blocks_per_sm=blocks_per_sm)
    for kernel in report.kernels:  # jax 0.12 does not report the other one of a shape that was there before
        if kernel.name.startswith("combine_partials"):
            assert_fits(kernel, max_registers=168)
    assert report.hlo.count("mosaic_gpu_v2") == 2
    pool_bytes = 4096 * 64 * heads.num_kv_heads * heads.head_dim
    assert report.temp_bytes < pool_bytes / 2  # no copy of it
