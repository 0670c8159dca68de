"""The cases of paged prefill that every form of it is run against, and their float64 oracle in NumPy.

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
class Run:
    """`length` query tokens at the end of a sequence of `kv_len`, `gap` tokens behind the run before."""

    length: int
    kv_len: int
    gap: int = 0


@dataclass(frozen=True)
class PrefillCase:
    name: str
    heads: Heads
    runs: tuple[Run, ...]
    tail: int = 0  # tokens of no run at the end
    page_size: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    is_reversed: bool = False  # list the runs from the last one to the first


RAGGED = (Run(64, 64), Run(65, 129), Run(0, 0), Run(1, 40), Run(5, 257))
BEHIND_PREFIX = (Run(70, 300, gap=3), Run(3, 3), Run(0, 0, gap=2), Run(17, 193, gap=9))

PREFILL_CASES = [
    PrefillCase("one token", Heads(2, 2, 64), (Run(1, 1),)),
    PrefillCase("nothing", Heads(2, 2, 64), (Run(0, 0), Run(0, 0)), tail=11),
    PrefillCase("ragged, group of 4", Heads(8, 2, 64), RAGGED, tail=7),
    PrefillCase("ragged, group of 7", Heads(7, 1, 64), RAGGED, tail=7),
    PrefillCase("behind prefixes, group of 2", Heads(4, 2, 128), BEHIND_PREFIX, tail=5),
    PrefillCase("behind prefixes, reversed", Heads(2, 2, 128), BEHIND_PREFIX, is_reversed=True),
    PrefillCase("long run, group of 8", Heads(8, 1, 128), (Run(150, 450),)),
    PrefillCase("group of 16", Heads(16, 1, 64), (Run(19, 129), Run(9, 9)), tail=4),
    PrefillCase("pages of 128", Heads(4, 1, 128), (Run(33, 129), Run(40, 300)), page_size=128),
    PrefillCase("wide heads", Heads(2, 1, 256), (Run(70, 130), Run(2, 65)), tail=3),
    PrefillCase("window", Heads(4, 1, 64), (Run(90, 500), Run(40, 40), Run(1, 400)), window=100),
    PrefillCase("window of one token", Heads(1, 1, 64), (Run(20, 200),), window=1),
    PrefillCase("window wider than all", Heads(4, 1, 128), (Run(30, 90),), window=4096),
    PrefillCase("soft cap", Heads(4, 2, 128), (Run(40, 170),), soft_cap=5.0),
    PrefillCase("sinks", Heads(8, 2, 64), (Run(40, 170), Run(3, 3)), tail=2, has_sinks=True),
    PrefillCase(
        "wide heads, window, soft cap and sinks",
        Heads(2, 1, 256),
        (Run(20, 300), Run(6, 6)),
        window=70,
        soft_cap=20.0,
        has_sinks=True,
    ),
]
# Of K and V that a kernel has to widen, as it may treat them otherwise.
PREFILL_CASES += [
    case
    for dtype in ("int8", "float8_e4m3fn")
    for case in (
        PrefillCase(f"{dtype}, group of 7", Heads(7, 1, 64), (Run(9, 193), Run(1, 40)), tail=3, dtype=dtype),
        PrefillCase(f"{dtype}, window", Heads(8, 1, 128), (Run(5, 300), Run(3, 3)), window=70, dtype=dtype),
        PrefillCase(f"{dtype}, pages of 128", Heads(2, 2, 128), (Run(2, 257),), page_size=128, dtype=dtype),
        PrefillCase(f"{dtype}, wide heads", Heads(2, 1, 256), (Run(4, 129),), soft_cap=5.0, dtype=dtype),
    )
]


@dataclass(frozen=True)
class PrefillInput:
    """The arguments of one case, as a form takes them."""

    q_TNH: np.ndarray
    pool: Pool
    slot_C: np.ndarray
    token_C: np.ndarray
    len_C: np.ndarray
    kv_len_C: np.ndarray
    scale: float
    sinks_N: np.ndarray | None


def make_input(case: PrefillCase) -> PrefillInput:
    heads, runs = case.heads, case.runs
    ends = np.cumsum([run.gap + run.length for run in runs])
    tokens = ends - [run.length for run in runs]
    pool = make_pool(heads, [run.kv_len for run in runs], case.page_size, case.dtype)
    k: Any = pool.kv.k_PSKH
    v: Any = pool.kv.v_PSKH
    if pool.kv.k_scale_PSKQ is not None and pool.kv.v_scale_PSK is not None:  # int8 has no NaN
        k, v = pool.kv.k_scale_PSKQ, pool.kv.v_scale_PSK
    for index, run in enumerate(runs):
        pages = pool.table_XW[pool.slots[index], : -(-run.kv_len // case.page_size)]
        if run.kv_len % case.page_size:
            k[pages[-1], run.kv_len % case.page_size :] = np.nan
        first_seen = 0 if case.window is None else max(run.kv_len - run.length + 1 - case.window, 0)
        k[pages[: first_seen // case.page_size]] = np.nan
        v[pages[: first_seen // case.page_size]] = np.nan
    rng = np.random.default_rng(1)
    shape = (int(ends[-1]) + case.tail, heads.num_heads, heads.head_dim)
    order = slice(None, None, -1 if case.is_reversed else 1)
    return PrefillInput(
        # In bf16 from the start: what differs then is arithmetic.
        q_TNH=rng.standard_normal(shape, np.float32).astype(jnp.bfloat16).astype(np.float32),
        pool=pool,
        slot_C=np.asarray(pool.slots, np.int32)[order],
        token_C=tokens.astype(np.int32)[order],
        len_C=np.asarray([run.length for run in runs], np.int32)[order],
        kv_len_C=np.asarray([run.kv_len for run in runs], np.int32)[order],
        scale=heads.head_dim**-0.5,
        sinks_N=rng.standard_normal(heads.num_heads).astype(np.float32) * 2 if case.has_sinks else None,
    )


def attend_exactly(case: PrefillCase, given: PrefillInput) -> np.ndarray:
    """float64 [T, N, H], zeros for tokens of no run."""
    out_TNH = np.zeros(given.q_TNH.shape, np.float64)
    runs = zip(given.slot_C, given.token_C, given.len_C, given.kv_len_C, strict=True)
    for slot, token, length, kv_len in runs:
        if length:
            k_AKH, v_AKH = given.pool.read(given.pool.slots.index(slot), kv_len)
            q_INH = given.q_TNH[token : token + length].astype(np.float64)
            out_TNH[token : token + length] = _attend_run(case, given, q_INH, k_AKH, v_AKH)
    return out_TNH


def _attend_run(case: PrefillCase, given: PrefillInput, q_INH, k_AKH, v_AKH):
    length, kv_len = len(q_INH), len(k_AKH)
    group = case.heads.num_heads // case.heads.num_kv_heads
    pos_I1 = np.arange(kv_len - length, kv_len)[:, None]
    is_seen_IA = np.arange(kv_len) <= pos_I1
    if case.window is not None:
        is_seen_IA &= np.arange(kv_len) > pos_I1 - case.window
    is_used_A = np.any(is_seen_IA, axis=0)
    k_AKH, v_AKH = (np.where(is_used_A[:, None, None], x_AKH, 0.0) for x_AKH in (k_AKH, v_AKH))
    out_INH = np.empty(q_INH.shape)
    for head in range(case.heads.num_heads):
        score_IA = q_INH[:, head] @ k_AKH[:, head // group].T * given.scale
        if case.soft_cap is not None:
            score_IA = case.soft_cap * np.tanh(score_IA / case.soft_cap)
        score_IA = np.where(is_seen_IA, score_IA, -np.inf)
        sink = -np.inf if given.sinks_N is None else given.sinks_N[head]
        max_I1 = np.maximum(score_IA.max(axis=1, keepdims=True), sink)
        weight_IA = np.exp(score_IA - max_I1)
        sum_I1 = weight_IA.sum(axis=1, keepdims=True) + np.exp(sink - max_I1)
        out_INH[:, head] = weight_IA / sum_I1 @ v_AKH[:, head // group]
    return out_INH
