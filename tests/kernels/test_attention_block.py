"""A layer's attention block of few decode rows in one launch, and attention with its write in one: the TPU's
kernels and the reference against float64, in the interpreter, and compiled for every chip that has them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.attention_block import ref
from jaxserve.kernels_pallas.attention_block.ref import BlockWeights
from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.kv_pages import make_pages
from jaxserve.kernels_pallas.paged_attention.tpu_plan import CHIPS, Chip, choose_decode_blocks
from jaxserve.kernels_pallas.paged_attention.tpu_work import list_decode_work
from tests.kernels.cases import Heads, Pool, attend_exactly, dequantize, make_pool
from tests.kernels.pages import from_pages, to_pages
from tests.kernels.test_rope_write import rotate_exactly
from tests.kernels.tpu import compile_for_tpu, device_kind

EPS, BF16_STEP = 1e-5, 2.0**-8
PAGE_SIZE, NUM_LAYERS, LAYER = 128, 3, 1
# Tokens that each row attends to, its own among them; 0 is padding. Of a page the first token and the last.
LENGTHS = [300, 1, 128, 0, 129, 5, 640, 77]
# Heads of a device, width, whether there are biases or norms of heads, and the type of y. Two heads in a
# chunk and one; a unit of two chunks.
CASES = [
    (Heads(4, 2, 128), 512, "biases", "bfloat16"),
    (Heads(14, 2, 64), 896, "biases", "float32"),
    (Heads(8, 1, 64), 512, "norms", "float32"),
    (Heads(4, 2, 256), 512, "norms", "bfloat16"),
    (Heads(16, 8, 128), 512, "", "float32"),
    (Heads(8, 2, 128), 512, "norms", "float32"),
]


def make_weights(heads: Heads, width: int, extras: str = "") -> BlockWeights:
    rng = np.random.default_rng(width)
    channels = heads.num_heads * heads.head_dim
    outputs = channels + 2 * heads.num_kv_heads * heads.head_dim

    def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(rng.standard_normal((NUM_LAYERS, *shape)), dtype)

    bf16 = jnp.bfloat16
    w_qkv_LFD, w_o_LDF = draw(outputs, width, dtype=bf16) / 32, draw(width, channels, dtype=bf16)
    bias_LF = draw(outputs) if extras == "biases" else None
    head_norms = [draw(heads.head_dim) if extras == "norms" else None for _ in "qk"]
    return BlockWeights(draw(width), w_qkv_LFD, bias_LF, w_o_LDF, *head_norms)


def make_rows(num_rows: int, width: int, head_dim: int, y_dtype: str) -> tuple[jax.Array, jax.Array, Any]:
    """x and y, and an angle for each row and pair."""
    rng = np.random.default_rng(num_rows)
    x, y = (jnp.asarray(rng.standard_normal((num_rows, width)), jnp.float32) for _ in "xy")
    return x * 4, y.astype(y_dtype), rng.uniform(0, 6, (num_rows, 1, head_dim // 2))


def find_places(pool: Pool, lengths: list[int]) -> np.ndarray:
    """Where the last token of each row goes."""
    places = np.zeros(len(lengths), np.int32)
    for row, length in enumerate(lengths):
        if length:
            page = pool.table_XW[pool.slots[row], (length - 1) // PAGE_SIZE]
            places[row] = page * PAGE_SIZE + (length - 1) % PAGE_SIZE
    return places


def project_exactly(heads: Heads, weights: BlockWeights, x: jax.Array, y: jax.Array) -> np.ndarray:
    """q, k and v, [R, F]."""
    norm_D = np.asarray(weights.norm_LD[LAYER], np.float64)
    w_qkv_FD = np.asarray(weights.w_qkv_LFD[LAYER], np.float64)
    added = np.asarray(x, np.float64) + np.asarray(y, np.float64)
    h = added / np.sqrt((added**2).mean(axis=1, keepdims=True) + EPS) * norm_D
    qkv_RF = h @ w_qkv_FD.T + (0 if weights.bias_LF is None else np.asarray(weights.bias_LF[LAYER]))
    if weights.q_norm_LH is None or weights.k_norm_LH is None:
        return qkv_RF
    q_norm_H, k_norm_H = (np.asarray(stack)[LAYER] for stack in (weights.q_norm_LH, weights.k_norm_LH))
    qkv_RAH = qkv_RF.reshape(len(qkv_RF), -1, heads.head_dim)
    size_RA1 = np.sqrt((qkv_RAH**2).mean(axis=2, keepdims=True) + EPS)
    first_k, first_v = heads.num_heads, heads.num_heads + heads.num_kv_heads
    qkv_RAH[:, :first_k] *= q_norm_H / size_RA1[:, :first_k]
    qkv_RAH[:, first_k:first_v] *= k_norm_H / size_RA1[:, first_k:first_v]
    return qkv_RF


def attend_to_all(
    heads: Heads, qkv_RF: np.ndarray, angle_R1I: np.ndarray, pool: Pool, lengths: list[int]
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """The outputs [R, F], and K and V of each live row, [K, H], in float64."""
    qkv_RAH = qkv_RF.astype(np.float64).reshape(len(qkv_RF), -1, heads.head_dim)
    first_v = heads.num_heads + heads.num_kv_heads
    turned = rotate_exactly(qkv_RAH[:, :first_v], angle_R1I)
    out_RNH, new = np.zeros((len(qkv_RF), heads.num_heads, heads.head_dim)), {}
    for row, length in enumerate(lengths):
        if length:
            new[row] = turned[row, heads.num_heads :], qkv_RAH[row, first_v:]
            past = pool.read(row, length - 1)
            k, v = (np.concatenate([old, own[None]]) for old, own in zip(past, new[row], strict=True))
            out_RNH[row] = attend_exactly(turned[row, : heads.num_heads], k, v, heads.head_dim**-0.5)
    return out_RNH.reshape(len(qkv_RF), -1), new


@pytest.mark.parametrize("form", ["ref", "tpu"])
@pytest.mark.parametrize(("heads", "width", "extras", "y_dtype"), CASES, ids=str)
def test_a_block_is_what_its_parts_are(form, heads, width, extras, y_dtype, capfd):
    pool = make_pool(heads, LENGTHS, PAGE_SIZE, "bfloat16")
    weights = make_weights(heads, width, extras)
    x_RD, y_RD, angle_R1I = make_rows(len(LENGTHS), width, heads.head_dim, y_dtype)
    rope = jnp.asarray(np.cos(angle_R1I), jnp.float32), jnp.asarray(np.sin(angle_R1I), jnp.float32)
    places = find_places(pool, LENGTHS)
    rows = pool.table_XW, np.asarray(pool.slots), np.asarray(LENGTHS)
    sizes: Any = {
        "num_heads": heads.num_heads,
        "scale": heads.head_dim**-0.5,
        "eps": EPS,
        "dtype": y_RD.dtype,
    }
    operands = x_RD, y_RD, weights, jnp.int32(LAYER)
    if form == "ref":
        kv: Any = jax.tree.map(jnp.asarray, pool.kv)
        sum_RD, out_RD, new_kv = jax.jit(partial(ref.attend, **sizes))(*operands, kv, rope, places, *rows)
    else:
        sum_RD, out_RD, new_kv = run_tpu(operands, pool, rope, places, rows, sizes)
        assert "RACE DETECTED" not in capfd.readouterr().out
    qkv_RF = project_exactly(heads, weights, x_RD, y_RD)
    out_RF, new = attend_to_all(heads, qkv_RF, angle_R1I, pool, LENGTHS)
    exact_RD = out_RF @ np.asarray(weights.w_o_LDF[LAYER], np.float64).T
    np.testing.assert_array_equal(sum_RD, x_RD + y_RD)
    assert out_RD.dtype == y_RD.dtype
    live = sorted(new)
    error = np.abs(np.asarray(out_RD, np.float64) - exact_RD)[live]
    assert error.max() < 6 * BF16_STEP * exact_RD[live].std()
    assert not np.asarray(out_RD)[LENGTHS.index(0)].any()
    check_pool(pool, new_kv, new, places)


def check_pool(pool: Pool, new_kv: Any, new: dict[int, tuple[np.ndarray, np.ndarray]], places: Any) -> None:
    """The rows' K and V are where they belong, and nothing else has changed."""
    live = sorted(new)
    old_pool = dequantize(pool.kv)
    new_pool = dequantize(new_kv) if isinstance(new_kv, KVLayer) else from_pages(new_kv)
    others = np.setdiff1d(np.arange(PAGE_SIZE, old_pool[0].shape[0] * PAGE_SIZE), places)
    for i, (old, after) in enumerate(zip(old_pool, new_pool, strict=True)):
        old, after = (x.reshape(-1, *x.shape[2:]) for x in (old, after))
        want = np.stack([new[row][i] for row in live])
        np.testing.assert_allclose(after[places[live]], want, atol=3 * BF16_STEP * np.abs(want).max())
        np.testing.assert_array_equal(after[others], old[others])


def find_chip(kind: str) -> tuple[Chip, Any]:
    """What runs the kernels, and the `interpret` that it wants: an interpreter of that chip; or the TPU that
    is there, if it has as many cores a device."""
    from jax.experimental.pallas import tpu as pltpu

    if jax.default_backend() != "tpu":
        return CHIPS[kind], pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    own = CHIPS[jax.devices()[0].device_kind]
    if own.num_cores != CHIPS[kind].num_cores:
        pytest.skip(f"A device of this TPU has {own.num_cores} cores.")
    return own, False


def run_tpu(operands: Any, pool: Pool, rope: Any, places: np.ndarray, rows: Any, sizes: Any) -> Any:
    """The kernel in a pool of two layers, of which the second is the one that is meant."""
    from jaxserve.kernels_pallas.attention_block import tpu

    chip, interpret = find_chip("TPU v6 lite")
    kv = to_pages(pool.kv)
    both = jax.tree.map(lambda pages: jnp.concatenate([pages, pages]), kv)
    num_pages = len(kv.words_PSJL)
    blocks = choose_decode_blocks(kv.layout, PAGE_SIZE, 1, chip)

    def run(operands, kv, rope, places, rows):
        work = list_decode_work(rows[0], rows[1], rows[2], blocks=blocks, interpret=interpret)
        work = work._replace(first_page_1=jnp.full(1, num_pages, jnp.int32))
        x_RD, y_RD, weights, layer = operands
        own = {**sizes, "chip": chip, "interpret": interpret}
        return tpu.attend(x_RD, y_RD, weights, layer, kv, rope, places, work, **own)

    sum_RD, out_RD, new_kv = jax.jit(run)(operands, both, rope, jnp.asarray(places), rows)
    first, second = (jax.tree.map(partial(cut_layer, num_pages, i), new_kv) for i in range(2))
    np.testing.assert_array_equal(first.words_PSJL, kv.words_PSJL)
    np.testing.assert_array_equal(second.words_PSJL[0], kv.words_PSJL[0])  # the trash page
    return sum_RD, out_RD, second


def cut_layer(num_pages: int, layer: int, pages: jax.Array) -> jax.Array:
    return pages[layer * num_pages :][:num_pages]


@pytest.mark.parametrize(
    ("kind", "heads", "lengths"),
    [
        ("TPU v6 lite", Heads(8, 2, 128), LENGTHS),
        ("TPU v5", Heads(14, 2, 64), LENGTHS),
        ("TPU v5", Heads(8, 2, 128), [40]),  # nothing is left for the second core
        ("TPU v5", Heads(8, 2, 128), [0, 0]),
    ],
    ids=str,
)
def test_write_and_attention_in_one(kind, heads, lengths, capfd):
    """By one core, and by two of which each leaves some rows."""
    from jaxserve.kernels_pallas.attention_block.tpu_attend import attend_rows

    chip, interpret = find_chip(kind)
    pool = make_pool(heads, lengths, PAGE_SIZE, "bfloat16")
    channels = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    _, qkv_RF, angle_R1I = make_rows(len(lengths), channels, heads.head_dim, "float32")
    rope = jnp.asarray(np.cos(angle_R1I), jnp.float32), jnp.asarray(np.sin(angle_R1I), jnp.float32)
    places, kv = find_places(pool, lengths), to_pages(pool.kv)
    rows = pool.table_XW, np.asarray(pool.slots), np.asarray(lengths)
    blocks = choose_decode_blocks(kv.layout, PAGE_SIZE, 1, chip)
    work = jax.jit(partial(list_decode_work, blocks=blocks, interpret=interpret))(*rows)
    sizes: Any = {"num_heads": heads.num_heads, "scale": heads.head_dim**-0.5, "chip": chip}
    run = jax.jit(partial(attend_rows, **sizes, interpret=interpret))
    out, new_kv = run(qkv_RF, kv, rope, jnp.asarray(places), work)
    assert "RACE DETECTED" not in capfd.readouterr().out
    exact_RF, new = attend_to_all(heads, np.asarray(qkv_RF), angle_R1I, pool, lengths)
    assert out.dtype == jnp.bfloat16
    assert out.shape == (exact_RF.shape if chip.num_cores == 1 else (2, *exact_RF.shape))
    out_RF = np.asarray(out, np.float64).reshape(-1, *exact_RF.shape).sum(axis=0)
    np.testing.assert_allclose(out_RF, exact_RF, rtol=BF16_STEP, atol=6 * BF16_STEP * exact_RF.std())
    if new:
        check_pool(pool, new_kv, new, places)
    else:
        np.testing.assert_array_equal(new_kv.words_PSJL, kv.words_PSJL)


# Of Qwen2.5 0.5B on two devices and 7B on four, and of Qwen3 8B on one.
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("heads", "width", "num_rows", "extras", "y_dtype"),
    [
        (Heads(8, 1, 64), 896, 8, "biases", "float32"),
        (Heads(7, 1, 128), 3584, 64, "biases", "bfloat16"),
        (Heads(32, 8, 128), 4096, 8, "norms", "float32"),
    ],
    ids=str,
)
def test_a_block_compiles_into_one_launch(chip, heads, width, num_rows, extras, y_dtype):
    from jaxserve.kernels_pallas.attention_block.tpu import make_form

    figures = CHIPS[device_kind(chip)]
    form = make_form(figures)
    assert form is not None
    shape = jax.ShapeDtypeStruct
    weights = jax.eval_shape(lambda: make_weights(heads, width, extras))
    size = (heads.num_kv_heads, heads.head_dim, "bfloat16")
    kv = jax.eval_shape(lambda: make_pages(2 * NUM_LAYERS, PAGE_SIZE, *size))
    assert form.serves(num_rows, weights.w_qkv_LFD, weights.w_o_LDF, kv)
    blocks = choose_decode_blocks(kv.layout, PAGE_SIZE, 1, figures)
    angle_R1I = shape((num_rows, 1, heads.head_dim // 2), jnp.float32)
    ints_R, table_RW = shape((num_rows,), jnp.int32), shape((num_rows, 64), jnp.int32)

    def run(kv, x_RD, y_RD, weights, layer, rope, places, table_RW, slot_R, kv_len_R):
        work = list_decode_work(table_RW, slot_R, kv_len_R, blocks=blocks)
        sizes: Any = {"num_heads": heads.num_heads, "scale": 0.1, "eps": EPS, "dtype": y_RD.dtype}
        return form.attend(x_RD, y_RD, weights, layer, kv, rope, places, work, **sizes)

    x_RD, y_RD = shape((num_rows, width), jnp.float32), shape((num_rows, width), jnp.dtype(y_dtype))
    operands = x_RD, y_RD, weights, shape((), jnp.int32), (angle_R1I, angle_R1I)
    report = compile_for_tpu(chip, run, kv, *operands, ints_R, table_RW, ints_R, ints_R, donate_argnums=0)
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 2  # and the list of its work
    assert report.alias_bytes == kv.words_PSJL.size * 4
    assert report.temp_bytes < 1 << 20  # no copy of a stack or of the pool


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_write_and_attention_compile_into_one_launch(chip):
    from jaxserve.kernels_pallas.attention_block.tpu_attend import make_rows_form

    figures, shape = CHIPS[device_kind(chip)], jax.ShapeDtypeStruct
    heads, num_rows = Heads(32, 8, 64), 256
    form = make_rows_form(figures)
    kv = jax.eval_shape(lambda: make_pages(8, PAGE_SIZE, heads.num_kv_heads, heads.head_dim, "bfloat16"))
    assert form.serves(num_rows, heads.num_heads, kv)
    blocks = choose_decode_blocks(kv.layout, PAGE_SIZE, 1, figures)

    def run(kv, qkv_RF, rope, places, table_RW, slot_R, kv_len_R):
        work = list_decode_work(table_RW, slot_R, kv_len_R, blocks=blocks)
        return form.attend(qkv_RF, kv, rope, places, work, num_heads=heads.num_heads, scale=0.1)

    channels = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv_RF, angle_R1I = (
        shape((num_rows, channels), jnp.float32),
        shape((num_rows, 1, heads.head_dim // 2), jnp.float32),
    )
    ints_R, table_RW = shape((num_rows,), jnp.int32), shape((num_rows, 64), jnp.int32)
    operands = qkv_RF, (angle_R1I, angle_R1I), ints_R, table_RW, ints_R, ints_R
    report = compile_for_tpu(chip, run, kv, *operands, donate_argnums=0)
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 2  # and the list of its work
    assert report.alias_bytes == kv.words_PSJL.size * 4
    assert report.temp_bytes < 8 << 20


def test_what_has_no_block():
    from jaxserve.kernels_pallas.attention_block.tpu import make_form

    assert make_form(CHIPS["TPU v5"]) is None  # a v5p, whose two cores share the rows
    form = make_form(CHIPS["TPU v5 lite"])
    assert form is not None
    weights = make_weights(Heads(4, 2, 128), 512)
    matrices = weights.w_qkv_LFD, weights.w_o_LDF
    assert form.serves(64, *matrices, make_pages(2, PAGE_SIZE, 2, 128, "bfloat16"))
    assert not form.serves(65, *matrices, make_pages(2, PAGE_SIZE, 2, 128, "bfloat16"))
    assert not form.serves(64, *matrices, make_pages(2, PAGE_SIZE, 2, 128, "int8"))
    assert not form.serves(
        64, *(w.astype(jnp.float32) for w in matrices), make_pages(2, 128, 2, 128, "bfloat16")
    )
