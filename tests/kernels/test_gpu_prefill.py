"""Paged prefill attention on GPU: simulated beside its reference, and compiled for H200."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels_pallas.kv_layer import KVLayer, num_k_scales
from jaxserve.kernels_pallas.paged_attention import ref
from jaxserve.kernels_pallas.paged_attention.prefill_plan import ALIGNMENT, list_tiles
from tests.kernels.cases import Heads
from tests.kernels.cases_prefill import PREFILL_CASES, PrefillCase, attend_exactly, make_input
from tests.kernels.h200 import assert_fits, compile_for_h200

TOLERANCE = 1e-2  # of numbers near 1, rounded to bf16; so are the probabilities
CASE_IDS = [case.name for case in PREFILL_CASES]


def import_gpu_form():
    if jax.__version_info__ < (0, 11):
        pytest.skip("The GPU kernels need jax 0.11.2 or later.")
    from jaxserve.kernels_pallas import mosaic
    from jaxserve.kernels_pallas.paged_attention import gpu_prefill

    return gpu_prefill, mosaic


def run_form(form, case: PrefillCase) -> None:
    given = make_input(case)
    out_TNH = jax.jit(partial(form, scale=given.scale, window=case.window, soft_cap=case.soft_cap))(
        given.q_TNH,
        given.pool.kv,
        given.pool.table_XW,
        given.slot_C,
        given.token_C,
        given.len_C,
        given.kv_len_C,
        sinks_N=given.sinks_N,
    )
    assert out_TNH.dtype == jnp.float32
    want_TNH = attend_exactly(case, given)
    np.testing.assert_allclose(np.asarray(out_TNH), want_TNH, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", PREFILL_CASES, ids=CASE_IDS)
def test_reference(case):
    run_form(ref.paged_prefill, case)


@pytest.mark.parametrize("case", PREFILL_CASES, ids=CASE_IDS)
def test_kernel_simulated(case, capfd):
    gpu_prefill, mosaic = import_gpu_form()
    tuning = replace(gpu_prefill.choose_tuning(case.heads.head_dim, case.dtype), num_sms=3)
    run_form(partial(gpu_prefill.paged_prefill, tuning=tuning, interpret=mosaic.simulate()), case)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("case", PREFILL_CASES, ids=CASE_IDS)
@pytest.mark.parametrize("tile_tokens", [8, 32, 128])
def test_tiles_cover_every_token_once(case, tile_tokens):
    given = make_input(case)
    num_tokens = len(given.q_TNH)
    runs = (jnp.asarray(x_C) for x_C in (given.token_C, given.len_C, given.kv_len_C, given.slot_C))
    tiles = list_tiles(*runs, num_tokens=num_tokens, tile_tokens=tile_tokens)
    owner = np.full(num_tokens, -1)
    for run, (token, length) in enumerate(zip(given.token_C, given.len_C, strict=True)):
        owner[token : token + length] = run
    times_covered = np.zeros(num_tokens, int)
    num_tiles = int(tiles.num_tiles_1[0])
    assert num_tiles <= len(tiles.slot_L)
    for token, first, end, pos, kv_len, slot in zip(*(field[:num_tiles] for field in tiles[:6]), strict=True):
        assert token % ALIGNMENT == 0
        assert 0 <= first < end <= tile_tokens
        times_covered[token + first : token + end] += 1
        (run,) = set(owner[token + first : token + end].tolist())
        if run == -1:
            assert kv_len == 0
            assert pos + tile_tokens <= 0  # sees nothing
        else:
            start = given.kv_len_C[run] - given.len_C[run] - given.token_C[run]
            assert (kv_len, slot, pos) == (given.kv_len_C[run], given.slot_C[run], token + start)
    assert (times_covered == 1).all()


@dataclass(frozen=True)
class Gate:
    """The attention of a model, to be compiled."""

    name: str
    heads: Heads
    kv_dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


GATES = [
    Gate("Llama 3.1 8B", Heads(32, 8, 128)),
    Gate("Qwen2.5 7B", Heads(28, 4, 128)),
    Gate("Qwen2.5 0.5B", Heads(14, 2, 64)),
    Gate("gpt-oss", Heads(64, 8, 64), window=128, has_sinks=True),
    Gate("Qwen2.5 7B, int8", Heads(28, 4, 128), "int8"),
    Gate("Qwen2.5 7B, fp8", Heads(28, 4, 128), "float8_e4m3fn"),
    Gate("gpt-oss, int8", Heads(64, 8, 64), "int8", window=128, has_sinks=True),
    Gate("window and soft cap", Heads(16, 8, 128), window=4096, soft_cap=50.0),
    Gate("Gemma 2 9B", Heads(16, 8, 256), window=4096, soft_cap=50.0),
    Gate("wide heads, int8", Heads(16, 8, 256), "int8"),
    Gate("wide heads, fp8", Heads(16, 8, 256), "float8_e4m3fn"),
]


@pytest.mark.parametrize("gate", GATES, ids=[gate.name for gate in GATES])
def test_kernel_compiles_for_h200(gate):
    gpu_prefill, _ = import_gpu_form()
    num_tokens, heads = 2048, gate.heads
    tokens = (512, 64, heads.num_kv_heads)
    pool: Any = jax.ShapeDtypeStruct((*tokens, heads.head_dim), jnp.dtype(gate.kv_dtype))
    k_scales: Any = jax.ShapeDtypeStruct((*tokens, num_k_scales(heads.head_dim)), jnp.float32)
    v_scales: Any = jax.ShapeDtypeStruct(tokens, jnp.float32)
    kv = KVLayer(pool, pool, k_scales, v_scales) if gate.kv_dtype == "int8" else KVLayer(pool, pool)
    q_TNH = jax.ShapeDtypeStruct((num_tokens, heads.num_heads, heads.head_dim), jnp.bfloat16)
    sinks_N = jax.ShapeDtypeStruct((heads.num_heads,), jnp.float32) if gate.has_sinks else None
    int32_C = jax.ShapeDtypeStruct((8,), jnp.int32)

    def run(sinks_N, *args):
        return gpu_prefill.paged_prefill(
            *args, scale=heads.head_dim**-0.5, window=gate.window, soft_cap=gate.soft_cap, sinks_N=sinks_N
        )

    table_XW = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    report = compile_for_h200(run, sinks_N, q_TNH, kv, table_XW, *[int32_C] * 4)
    assert_fits(report.kernel("paged_prefill"), max_registers=168)
    out_bytes = 2 * num_tokens * heads.num_heads * heads.head_dim
    assert report.temp_bytes <= out_bytes + 64 * 1024  # the output in bf16, and the list of tiles
