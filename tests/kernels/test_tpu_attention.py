"""Paged attention for TPUs: in the interpreter against float64, and compiled for four generations.

The interpreter watches for races, and gives NaN for what nothing wrote.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import PagesLayout, make_pages
from jaxserve.kernels_pallas.paged_attention.tpu_block import Words, find_tokens
from jaxserve.kernels_pallas.paged_attention.tpu_decode import paged_decode
from jaxserve.kernels_pallas.paged_attention.tpu_plan import CHIPS, Blocks, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_prefill import paged_prefill
from jaxserve.kernels_pallas.paged_attention.tpu_work import (
    END_BLOCK,
    FIRST_BLOCK,
    LIVE,
    RUN,
    TOKEN,
    list_run_tiles,
)
from tests.kernels import cases_decode, cases_prefill
from tests.kernels.cases import Heads, attend_exactly, dequantize, make_pool
from tests.kernels.cases_decode import DECODE_CASES, DecodeCase
from tests.kernels.cases_prefill import PREFILL_CASES
from tests.kernels.pages import from_pages, to_pages
from tests.kernels.tpu import TOPOLOGIES, compile_for_tpu, device_kind

# The interpreter takes seconds a case, so of the shared lists those that take ways of their own here.
DECODE_NAMES = [
    "nothing",
    "group of 4",
    "group of 7, one row over all blocks",
    "window",
    "wide heads, window, soft cap and sinks",
    "drafts, window and sinks",
    "int8, narrow heads, window",
    "int8, wide heads in two tiles",
    "fp8",
]
PREFILL_NAMES = [
    "nothing",
    "ragged, group of 7",
    "behind prefixes, reversed",
    "window",
    "wide heads, window, soft cap and sinks",
]
TOLERANCE = 1e-2  # of numbers near 1: queries and probabilities are rounded to bf16


def simulate() -> Any:
    """What `interpret=` takes: on a TPU the kernels run as they are."""
    if jax.default_backend() == "tpu":
        return False
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize("name", DECODE_NAMES)
def test_decode_attends_exactly(name, capfd):
    (case,) = [case for case in DECODE_CASES if case.name == name]
    given = cases_decode.make_input(case)
    blocks = Blocks(
        block_tokens=128, num_items=case.num_blocks - 1, tile_tokens=case.tokens_per_row, num_cores=2
    )
    options: dict[str, Any] = {"scale": given.scale, "window": case.window, "soft_cap": case.soft_cap}
    decode = jax.jit(
        partial(
            paged_decode,
            **options,
            tokens_per_row=case.tokens_per_row,
            blocks=blocks,
            interpret=simulate(),
        )
    )
    arguments = given.q_RNH, to_pages(given.pool.kv), given.pool.table_XW, given.slot_R, given.kv_len_R
    out_RNH = decode(*arguments, sinks_N=given.sinks_N)
    assert out_RNH.dtype == jnp.float32
    np.testing.assert_allclose(out_RNH, cases_decode.attend_exactly(case, given), atol=TOLERANCE)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_table_longer_than_what_memory_holds_is_read_in_pieces():
    """More pages than the 128 ids that come at a time, and heads that do not fill their last chunk."""
    case = DecodeCase("", Heads(3, 3, 64), cases_decode.single(2200, 30), page_size=16)
    given = cases_decode.make_input(case)
    blocks = Blocks(block_tokens=256, num_items=2, tile_tokens=1, num_cores=1)
    arguments = given.q_RNH, to_pages(given.pool.kv), given.pool.table_XW, given.slot_R, given.kv_len_R
    decode = jax.jit(partial(paged_decode, scale=given.scale, blocks=blocks, interpret=simulate()))
    np.testing.assert_allclose(decode(*arguments), cases_decode.attend_exactly(case, given), atol=TOLERANCE)


@pytest.mark.parametrize("name", PREFILL_NAMES)
def test_prefill_attends_exactly(name, capfd):
    (case,) = [case for case in PREFILL_CASES if case.name == name]
    given = cases_prefill.make_input(case)
    options: dict[str, Any] = {"scale": given.scale, "window": case.window, "soft_cap": case.soft_cap}
    blocks = Blocks(block_tokens=128, num_items=1, tile_tokens=32, num_cores=2)
    prefill = jax.jit(partial(paged_prefill, **options, blocks=blocks, interpret=simulate()))
    arguments = given.slot_C, given.token_C, given.len_C, given.kv_len_C
    out_TNH = prefill(
        given.q_TNH, to_pages(given.pool.kv), given.pool.table_XW, *arguments, sinks_N=given.sinks_N
    )
    assert out_TNH.dtype == jnp.float32
    np.testing.assert_allclose(out_TNH, cases_prefill.attend_exactly(case, given), atol=TOLERANCE)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_prefill_of_a_pool_of_bytes(dtype):
    heads, length, kv_len = Heads(10, 5, 128), 40, 150  # an odd number of chunks
    pool = make_pool(heads, [kv_len], 64, dtype)
    q_TNH = np.random.default_rng(1).standard_normal((length, heads.num_heads, heads.head_dim), np.float32)
    scale = heads.head_dim**-0.5
    blocks = Blocks(block_tokens=128, num_items=1, tile_tokens=16, num_cores=1)
    prefill = jax.jit(partial(paged_prefill, scale=scale, blocks=blocks, interpret=simulate()))
    run = (np.asarray([number], np.int32) for number in (pool.slots[0], 0, length, kv_len))
    out_TNH = prefill(q_TNH, to_pages(pool.kv), pool.table_XW, *run)
    k_AKH, v_AKH = pool.read(0, kv_len)
    for token in range(0, length, 13):
        seen = kv_len - length + token + 1
        want_NH = attend_exactly(q_TNH[token], k_AKH[:seen], v_AKH[:seen], scale)
        np.testing.assert_allclose(out_TNH[token], want_NH, atol=2 * TOLERANCE)  # int8 is rounded twice


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "heads", [Heads(1, 1, 64), Heads(3, 3, 64), Heads(5, 5, 128), Heads(2, 2, 256)], ids=str
)
def test_a_pool_comes_back_from_words(heads, dtype):
    pool = make_pool(heads, [40], 16, dtype)
    pages = to_pages(pool.kv)
    fresh = make_pages(*pool.kv.k_PSKH.shape, kv_dtype=dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), pages
    )
    used = pool.table_XW[pool.slots[0], :2]
    for held, read in zip(from_pages(pages), dequantize(pool.kv), strict=True):
        largest = np.abs(read[used]).max(-1, keepdims=True)
        rounding = 1.01 / 127 if dtype == "int8" else 0.0
        assert (np.abs(held[used] - read[used]) <= rounding * largest).all()


@pytest.mark.parametrize("adds_bf16", [False, True])
def test_every_number_of_fp8_is_widened_exactly(adds_bf16):
    """Also the smallest, which TPUs have no float32 for; a NaN is the number behind the largest."""
    layout = PagesLayout(num_kv_heads=2, head_dim=128, kv_dtype="float8_e4m3fn")
    token_B1 = np.arange(256, dtype=np.uint8)[:, None]
    bytes_B4 = token_B1 + np.arange(4, dtype=np.uint8) * 64
    words_BL = np.repeat(bytes_B4.view(np.int32), 128, axis=1)

    def body(words_ref, out_ref):
        words = Words(words_ref, layout, adds_bf16)
        k, v = words.load_k(0, 2), words.load_v(0, 2, jnp.ones((256, 1), bool))
        for i, (chunk_BL,) in enumerate([*k, *v]):
            out_ref[i] = chunk_BL.astype(jnp.float32)

    read = pl.pallas_call(body, jax.ShapeDtypeStruct((4, 256, 128), jnp.float32), interpret=simulate())
    tokens = np.asarray(find_tokens(jnp.arange(256), 256, layout))
    wanted_4B = bytes_B4.T.copy().view(jnp.float8_e4m3fn)[:, tokens].astype(np.float32)
    wanted_4B = np.where(np.isnan(wanted_4B), np.copysign(480, wanted_4B), wanted_4B)
    np.testing.assert_array_equal(read(words_BL), np.repeat(wanted_4B[:, :, None], 128, axis=2))


@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("window", [None, 100])
def test_the_plan_gives_every_block_to_one_core(num_cores, window):
    runs = [(0, 0, 0), (3, 40, 300), (50, 0, 0), (43, 7, 7), (60, 16, 16)]  # token, tokens, tokens seen
    token_C, len_C, kv_len_C = (jnp.asarray(column, jnp.int32) for column in zip(*runs, strict=True))
    blocks = Blocks(block_tokens=128, num_items=1, tile_tokens=16, num_cores=num_cores)
    sizes: Any = {"max_tiles": 9, "blocks": blocks, "window": window, "interpret": simulate()}
    tiles = list_run_tiles(token_C, len_C, kv_len_C, **sizes)
    fields, cores = np.asarray(tiles.tiles_FL), np.asarray(tiles.cores_2C)
    walked, wanted = [], []
    for tile, num_items in cores.T:
        block = fields[FIRST_BLOCK, tile]
        for _ in range(num_items):
            walked.append((fields[RUN, tile], fields[TOKEN, tile], fields[LIVE, tile], block))
            block += 1
            if block == fields[END_BLOCK, tile]:
                tile += 1
                block = fields[FIRST_BLOCK, tile] if tile < 9 else 0
    for run, (token, length, kv_len) in enumerate(runs):
        for offset in range(0, length, 16):
            live, position = min(length - offset, 16), kv_len - length + offset
            first = 0 if window is None else max(position + 1 - window, 0) // 128
            wanted += [
                (run, token + offset, live, block) for block in range(first, -(-(position + live) // 128))
            ]
    assert walked == wanted
    if num_cores == 2:
        assert abs(int(cores[1, 0]) - int(cores[1, 1])) <= 3  # as equal as tiles allow


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("heads", [Heads(1, 1, 64), Heads(8, 8, 128), Heads(32, 32, 128)], ids=str)
def test_a_trip_covers_the_latency_of_its_copies_in_little_memory(chip, heads):
    layout = PagesLayout(num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, kv_dtype="bfloat16")
    blocks = choose_decode_blocks(layout, 128, 1, CHIPS[chip])
    trip_bytes = blocks.num_items * blocks.block_tokens * layout.num_rows * 512
    assert trip_bytes <= 8 << 20
    assert trip_bytes >= min(CHIPS[chip].bytes_per_s * 1e-6, 8 * 512 * 512)


# Chip, heads, type of the pool, and what is asked for beside it.
COMPILED = [
    ("v5e", Heads(28, 4, 128), "bfloat16", {}),
    ("v5p", Heads(32, 8, 128), "int8", {}),
    ("v6e", Heads(8, 4, 256), "bfloat16", {"window": 4096, "soft_cap": 50.0}),
    ("tpu7x", Heads(64, 8, 64), "float8_e4m3fn", {"window": 128}),
]


def spec(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("operation", ["decode", "prefill"])
@pytest.mark.parametrize(("chip", "heads", "dtype", "options"), COMPILED, ids=str)
def test_the_kernels_compile(operation, chip, heads, dtype, options):
    kind = device_kind(chip)
    num_tokens = 64 if operation == "decode" else 512
    kv = jax.eval_shape(partial(make_pages, 4096, 128, heads.num_kv_heads, heads.head_dim, dtype))
    form, num_runs = (paged_decode, num_tokens) if operation == "decode" else (paged_prefill, 8)
    report = compile_for_tpu(
        chip,
        partial(form, scale=0.1, chip=CHIPS[kind], **options),
        spec(jnp.bfloat16, num_tokens, heads.num_heads, heads.head_dim),
        kv,
        spec(jnp.int32, 64, 1024),
        *[spec(jnp.int32, num_runs)] * (2 if operation == "decode" else 4),
    )
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))
    assert report.temp_bytes < pool_bytes / 8  # no copy of it
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 2  # the list of its work, and it
    assert set(TOPOLOGIES) == {chip for chip, *_ in COMPILED}
