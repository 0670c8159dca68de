"""RoPE with KV write, every form of it, against float64 rotations and the places they must go to."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.kv_layer import KVLayer, num_k_scales
from jaxserve.kernels_pallas.kv_pages import KVPages, PagesLayout, make_pages
from jaxserve.kernels_pallas.kv_write import ref
from jaxserve.kernels_pallas.paged_attention.tpu_queries import UnitQueries, from_units, order_queries
from tests.kernels.cases import Heads, dequantize, store
from tests.kernels.h200 import assert_fits, compile_for_h200, require_h200_compiler
from tests.kernels.pages import from_pages, to_pages
from tests.kernels.tpu import compile_for_tpu, require_tpu_compiler

FORMS = ["ref", "gpu", "tpu"]
# Heads, type of q, k and v, and of the pool. 0 in a list of places is a padding token.
CASES = [
    (Heads(8, 2, 128), "float32", "bfloat16"),
    (Heads(14, 2, 64), "bfloat16", "bfloat16"),
    (Heads(9, 3, 64), "float32", "bfloat16"),
    (Heads(4, 2, 256), "float32", "bfloat16"),
    (Heads(3, 1, 256), "float32", "float32"),
    (Heads(4, 4, 64), "float32", "int8"),
    (Heads(4, 4, 128), "bfloat16", "float8_e4m3fn"),
]
PLACES = [[70], [0, 64, 191, 0, 127], [65, 66, 67, 130]]
PAGE_SIZE, NUM_PAGES = 64, 3


def rope_write(form: str, num_heads: int, **tuning: int):
    if form == "ref":
        return jax.jit(partial(ref.rope_write, num_heads=num_heads))
    if form == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        from jaxserve.kernels_pallas.kv_write import tpu

        interpret: Any = jax.default_backend() != "tpu" and pltpu.InterpretParams(detect_races=True)
        return jax.jit(partial(tpu.rope_write, num_heads=num_heads, interpret=interpret))
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    from jaxserve.kernels_pallas import mosaic
    from jaxserve.kernels_pallas.kv_write import gpu

    return jax.jit(partial(gpu.rope_write, num_heads=num_heads, interpret=mosaic.simulate(), **tuning))


def make_case(
    heads: Heads, dtype: str, pool_dtype: str, num_tokens: int
) -> tuple[KVLayer, jax.Array, np.ndarray]:
    """A pool of random numbers, random heads, and an angle for each token and pair."""
    rng = np.random.default_rng(num_tokens)
    pool_shape = (NUM_PAGES, PAGE_SIZE, heads.num_kv_heads, heads.head_dim)
    k_PSKH, v_PSKH = (rng.standard_normal(pool_shape, np.float32) for _ in "kv")
    kv = store(k_PSKH, v_PSKH, pool_dtype)
    width = heads.num_heads + 2 * heads.num_kv_heads
    qkv_TAH = jnp.asarray(rng.standard_normal((num_tokens, width, heads.head_dim)), dtype)
    angle_T1I = rng.uniform(0, 6, (num_tokens, 1, heads.head_dim // 2)).astype(np.float32)
    return jax.tree.map(jnp.asarray, kv), qkv_TAH, angle_T1I


def read_pool(kv: KVLayer | KVPages) -> tuple[np.ndarray, np.ndarray]:
    return from_pages(kv) if isinstance(kv, KVPages) else dequantize(kv)


def read_queries(queries: UnitQueries, layout: PagesLayout) -> jax.Array:
    """[T, N, H], where each is alone in its row: nothing in rows and lanes of others."""
    num_heads = queries.num_heads
    heads = layout.heads_per_unit * (num_heads // layout.num_kv_heads)
    q_TUYAL = queries.q_TUAML[:, :, :, :heads].transpose(0, 1, 3, 2, 4)
    q_TNH = from_units(q_TUYAL, num_heads, layout)
    np.testing.assert_array_equal(order_queries(q_TNH, layout).q_TUAML, queries.q_TUAML)
    return q_TNH


def rotate_exactly(x_TNH: np.ndarray, angle_T1I: np.ndarray) -> np.ndarray:
    first_TNI, second_TNI = np.split(x_TNH.astype(np.float64), 2, axis=-1)
    turned = (first_TNI + 1j * second_TNI) * np.exp(1j * angle_T1I.astype(np.float64))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "dtype", "pool_dtype"), CASES, ids=str)
def test_heads_are_rotated_and_written_to_their_places(form, heads, dtype, pool_dtype):
    tolerance = {
        "float32": 4e-6,
        "bfloat16": 2.0**-6,
        "int8": 0.51 / 127 * 5,
        "float8_e4m3fn": 0.31,
    }  # of values up to 5
    if form == "tpu" and pool_dtype == "float32":
        pytest.skip("The TPU's pools are of bf16, int8 or fp8.")
    for places in PLACES + [[*range(120, 130), 0, *range(70, 80)]] * (form == "tpu"):
        write = rope_write(form, heads.num_heads, tokens_per_block=2 - len(places) % 2)
        kv, qkv_TAH, angle_T1I = make_case(heads, dtype, pool_dtype, len(places))
        if form == "tpu":
            kv = to_pages(jax.tree.map(np.asarray, kv))
        q_TNH, new_kv = write(kv, qkv_TAH, np.cos(angle_T1I), np.sin(angle_T1I), np.asarray(places, np.int32))
        first_k, first_v = heads.num_heads, heads.num_heads + heads.num_kv_heads
        exact_TAH = np.asarray(qkv_TAH).astype(np.float64)
        exact_TAH[:, :first_v] = rotate_exactly(exact_TAH[:, :first_v], angle_T1I)
        if isinstance(q_TNH, UnitQueries):
            q_TNH = read_queries(q_TNH, new_kv.layout)
        else:
            assert q_TNH.dtype == qkv_TAH.dtype
        np.testing.assert_allclose(
            np.asarray(q_TNH).astype(np.float64), exact_TAH[:, :first_k], atol=tolerance[dtype]
        )
        live = np.flatnonzero(places)
        written = np.asarray(places)[live]
        others = np.setdiff1d(np.arange(PAGE_SIZE, NUM_PAGES * PAGE_SIZE), written)  # page 0 is trash
        exact = exact_TAH[:, first_k:first_v], exact_TAH[:, first_v:]
        assert [x.dtype for x in jax.tree.leaves(new_kv)] == [x.dtype for x in jax.tree.leaves(kv)]
        for new, old, exact_TKH in zip(read_pool(new_kv), read_pool(kv), exact, strict=True):
            new, old = (x.reshape(-1, *x.shape[2:]) for x in (new, old))
            np.testing.assert_allclose(new[written], exact_TKH[live], atol=tolerance[pool_dtype])
            np.testing.assert_array_equal(new[others], old[others])


@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_a_kernel_leaves_even_the_trash_page_alone(form):
    heads = CASES[0][0]
    kv, qkv_TAH, angle_T1I = make_case(heads, "float32", "bfloat16", 3)
    places = np.asarray([0, 5, 63], np.int32)
    if form == "tpu":
        kv = to_pages(jax.tree.map(np.asarray, kv))
    _, new_kv = rope_write(form, heads.num_heads)(kv, qkv_TAH, np.cos(angle_T1I), np.sin(angle_T1I), places)
    for new, old in zip(read_pool(new_kv), read_pool(kv), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_layer_behind_others_in_a_pool_is_written_where_its_pages_begin():
    heads, _, pool_dtype = CASES[5]
    kv, qkv_TAH, angle_T1I = make_case(heads, "float32", pool_dtype, 3)
    pages = to_pages(jax.tree.map(np.asarray, kv))
    both = jax.tree.map(lambda pool: jnp.concatenate([pool, pool]), pages)
    rest = qkv_TAH, np.cos(angle_T1I), np.sin(angle_T1I), np.asarray([70, 0, 191], np.int32)
    write = rope_write("tpu", heads.num_heads)
    _, alone = write(pages, *rest)
    _, shared = write(both, *rest, first_page=jnp.int32(NUM_PAGES))
    expected = jax.tree.map(lambda *pools: jnp.concatenate(pools), pages, alone)
    jax.tree.map(np.testing.assert_array_equal, shared, expected)


@pytest.mark.parametrize(
    ("heads", "num_tokens", "dtype", "pool_dtype"),
    [
        (Heads(28, 4, 128), 256, "float32", "bfloat16"),
        (Heads(32, 8, 128), 8192, "bfloat16", "bfloat16"),
        (Heads(14, 2, 64), 1, "float32", "bfloat16"),
        (Heads(32, 8, 128), 256, "bfloat16", "int8"),
        (Heads(32, 8, 128), 256, "bfloat16", "float8_e4m3fn"),
    ],
    ids=str,
)
def test_it_compiles_for_an_h200_in_place(heads, num_tokens, dtype, pool_dtype):
    require_h200_compiler()
    from jaxserve.kernels_pallas.kv_write import gpu

    places = (4096, PAGE_SIZE, heads.num_kv_heads)
    pool: Any = jax.ShapeDtypeStruct((*places, heads.head_dim), jnp.dtype(pool_dtype))
    scale_shapes = [(*places, num_k_scales(heads.head_dim)), places] if pool_dtype == "int8" else []
    scales: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in scale_shapes]
    width = heads.num_heads + 2 * heads.num_kv_heads
    qkv = jax.ShapeDtypeStruct((num_tokens, width, heads.head_dim), jnp.dtype(dtype))
    table = jax.ShapeDtypeStruct((num_tokens, 1, heads.head_dim // 2), jnp.float32)
    index = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    report = compile_for_h200(
        partial(gpu.rope_write, num_heads=heads.num_heads),
        KVLayer(pool, pool, *scales),
        qkv,
        table,
        table,
        index,
        donate_argnums=0,
    )
    assert_fits(report.kernel("rope_write"), max_registers=80, blocks_per_sm=2)
    assert report.alias_bytes == sum(x.size * x.dtype.itemsize for x in (pool, pool, *scales))
    assert report.temp_bytes < 65536
    assert " copy(" not in report.hlo


@pytest.mark.parametrize(
    ("chip", "heads", "num_tokens", "pool_dtype"),
    [
        ("v5e", Heads(28, 4, 128), 1, "bfloat16"),
        ("v5p", Heads(14, 2, 64), 64, "bfloat16"),
        ("v6e", Heads(32, 8, 128), 2048, "int8"),
        ("tpu7x", Heads(8, 4, 256), 256, "float8_e4m3fn"),
    ],
    ids=str,
)
def test_it_compiles_for_tpus_in_place(chip, heads, num_tokens, pool_dtype):
    require_tpu_compiler()
    from jaxserve.kernels_pallas.kv_write import tpu

    kv = jax.eval_shape(partial(make_pages, 4096, 128, heads.num_kv_heads, heads.head_dim, pool_dtype))
    width = heads.num_heads + 2 * heads.num_kv_heads
    table = jax.ShapeDtypeStruct((num_tokens, 1, heads.head_dim // 2), jnp.float32)
    report = compile_for_tpu(
        chip,
        partial(tpu.rope_write, num_heads=heads.num_heads),
        kv,
        jax.ShapeDtypeStruct((num_tokens, width, heads.head_dim), jnp.bfloat16),
        table,
        table,
        jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
        donate_argnums=0,
    )
    pool_bytes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv)]
    assert report.alias_bytes == sum(pool_bytes)
    assert report.temp_bytes < min(pool_bytes) / 8 + 4 * num_tokens * width * heads.head_dim  # the rows
