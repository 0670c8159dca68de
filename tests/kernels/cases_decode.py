"""The cases of paged decode that its forms are run against besides those of cases.py, and their oracle.

Everything that a form must not read is NaN: pages of nobody, what a last page holds behind its sequence, and
pages that a sliding window has left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.kernels.cases import Heads, Pool, make_pool


@dataclass(frozen=True)
class DecodeCase:
    """Rows of consecutive tokens: (tokens that the last one sees, tokens); (0, 0) is padding."""

    name: str
    heads: Heads
    rows: tuple[tuple[int, int], ...]
    tokens_per_row: int = 1
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    page_size: int = 64
    dtype: str = "bfloat16"
    num_blocks: int = 3  # of the grid, where a form has one
    num_places: int = 2  # pages under way


def single(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((length, min(length, 1)) for length in lengths)


DECODE_CASES = [
    DecodeCase("one token", Heads(2, 2, 64), single(1)),
    DecodeCase("nothing", Heads(2, 2, 64), single(0, 0)),
    DecodeCase("group of 1, last page of one token", Heads(2, 2, 64), single(65, 0, 64)),
    DecodeCase("group of 4", Heads(8, 2, 128), single(0, 130, 1, 0, 64)),
    DecodeCase("group of 7, one row over all blocks", Heads(7, 1, 64), single(769), num_blocks=4),
    DecodeCase("group of 8, many rows in one block", Heads(8, 1, 64), single(*[3] * 5, 0, 70), num_blocks=2),
    DecodeCase("group of 16", Heads(16, 1, 128), single(200, 63), num_places=3),
    DecodeCase("wide heads", Heads(4, 2, 256), single(129, 20)),
    DecodeCase("more partials than places", Heads(1, 1, 64), single(40 * 64), num_blocks=10),
    DecodeCase("window", Heads(4, 1, 64), single(500, 40, 400), window=100),
    DecodeCase("window of one token", Heads(1, 1, 64), single(200, 65), window=1),
    DecodeCase("sinks", Heads(8, 2, 64), single(170, 0, 3), has_sinks=True),
    DecodeCase(
        "wide heads, window, soft cap and sinks",
        Heads(2, 1, 256),
        single(300, 6),
        window=70,
        soft_cap=5.0,
        has_sinks=True,
    ),
    DecodeCase("drafts", Heads(8, 2, 64), ((130, 3), (66, 3), (0, 0), (3, 3)), tokens_per_row=3),
    DecodeCase("drafts, some missing", Heads(4, 1, 128), ((65, 2), (64, 1), (100, 4)), tokens_per_row=4),
    DecodeCase("drafts that need two tiles", Heads(16, 1, 128), ((140, 4), (7, 2)), tokens_per_row=4),
    DecodeCase(
        "drafts, window and sinks",
        Heads(6, 2, 64),
        ((200, 5), (70, 2)),
        tokens_per_row=5,
        window=64,
        has_sinks=True,
    ),
    DecodeCase("int8", Heads(8, 2, 128), single(130, 0, 64), dtype="int8"),
    DecodeCase("int8, narrow heads, window", Heads(14, 2, 64), single(150, 1), dtype="int8", window=70),
    DecodeCase("int8, wide heads in two tiles", Heads(10, 1, 256), single(70), dtype="int8"),
    DecodeCase("int8, drafts", Heads(4, 1, 64), ((66, 3), (20, 1)), dtype="int8", tokens_per_row=3),
    DecodeCase("fp8", Heads(8, 2, 128), single(130, 0, 64), dtype="float8_e4m3fn"),
    DecodeCase("fp8, drafts", Heads(4, 1, 64), ((66, 3), (20, 1)), dtype="float8_e4m3fn", tokens_per_row=3),
]


@dataclass(frozen=True)
class DecodeInput:
    """The arguments of one case, as a form takes them: R counts tokens, padding included."""

    q_RNH: Any
    pool: Pool
    slot_R: Any
    kv_len_R: Any
    scale: float
    sinks_N: Any


def make_input(case: DecodeCase) -> DecodeInput:
    heads, tokens = case.heads, case.tokens_per_row
    pool = make_pool(heads, [kv_len for kv_len, _ in case.rows], case.page_size, case.dtype)
    num_rows = len(case.rows) * tokens
    kv_len_R = np.zeros(num_rows, np.int32)
    for index, (kv_len, length) in enumerate(case.rows):
        kv_len_R[index * tokens : index * tokens + length] = np.arange(kv_len - length, kv_len) + 1
        spoil(case, pool, index, kv_len, kv_len - length + 1)
    rng = np.random.default_rng(1)
    q_RNH = rng.standard_normal((num_rows, heads.num_heads, heads.head_dim), np.float32)
    return DecodeInput(
        # In bf16 from the start: what differs then is arithmetic.
        q_RNH=q_RNH.astype(jnp.bfloat16).astype(np.float32),
        pool=pool,
        slot_R=np.repeat(np.asarray(pool.slots, np.int32), tokens),
        kv_len_R=kv_len_R,
        scale=heads.head_dim**-0.5,
        sinks_N=rng.standard_normal(heads.num_heads).astype(np.float32) * 2 if case.has_sinks else None,
    )


def spoil(case: DecodeCase, pool: Pool, sequence: int, kv_len: int, first_len: int) -> None:
    """NaN where nothing may be read; an int8 pool has it in its scales."""
    k: Any = pool.kv.k_PSKH
    v: Any = pool.kv.v_PSKH
    if pool.kv.k_scale_PSKQ is not None and pool.kv.v_scale_PSK is not None:
        k, v = pool.kv.k_scale_PSKQ, pool.kv.v_scale_PSK
    pages = pool.table_XW[pool.slots[sequence], : -(-kv_len // case.page_size)]
    for array in (k, v):
        if kv_len % case.page_size:
            array[pages[-1], kv_len % case.page_size :] = np.nan
        if case.window is not None:
            array[pages[: max(first_len - case.window, 0) // case.page_size]] = np.nan


def attend_exactly(case: DecodeCase, given: DecodeInput) -> np.ndarray:
    """float64 [R, N, H], zeros for padding."""
    out_RNH = np.zeros(given.q_RNH.shape, np.float64)
    for row, kv_len in enumerate(given.kv_len_R):
        if kv_len:
            k_AKH, v_AKH = given.pool.read(row // case.tokens_per_row, kv_len)
            first = 0 if case.window is None else max(kv_len - case.window, 0)
            out_RNH[row] = _attend_row(case, given, row, k_AKH[first:], v_AKH[first:])
    return out_RNH


def _attend_row(case: DecodeCase, given: DecodeInput, row: int, k_AKH: np.ndarray, v_AKH: np.ndarray):
    group = case.heads.num_heads // case.heads.num_kv_heads
    out_NH = np.empty(given.q_RNH.shape[1:])
    for head in range(case.heads.num_heads):
        score_A = k_AKH[:, head // group] @ given.q_RNH[row, head].astype(np.float64) * given.scale
        if case.soft_cap is not None:
            score_A = case.soft_cap * np.tanh(score_A / case.soft_cap)
        sink = -np.inf if given.sinks_N is None else float(given.sinks_N[head])
        largest = max(score_A.max(), sink)
        weight_A = np.exp(score_A - largest)
        out_NH[head] = weight_A / (weight_A.sum() + np.exp(sink - largest)) @ v_AKH[:, head // group]
    return out_NH
