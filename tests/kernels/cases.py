"""The shared case lists of the kernel triples, and their float64 oracles in NumPy.

Every form of a kernel (ref, tpu, gpu) is run against the same cases. Pages lie in random order, tables
hold stale ids behind their sequence, and pages of nobody hold NaN: a kernel that reads what it should
not gives NaN or a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.kv_layer import KVLayer


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


HEADS = [Heads(1, 1, 8), Heads(4, 4, 16), Heads(14, 2, 64), Heads(8, 1, 32)]

# Heads, type of the pool and page size: every form of heads in float32, then the other types.
POOLS = [(heads, "float32", page_size) for heads in HEADS for page_size in (4, 16, 128)]
POOLS += [(HEADS[1], "bfloat16", 16), (HEADS[2], "int8", 16), (HEADS[3], "int8", 128)]

# Prefill is slower to test: fewer page sizes.
PREFILL_POOLS = [pool for pool in POOLS if pool[1] != "float32" or pool[2] != 16]

# Tokens each decode row attends to; 0 is padding.
DECODE_LENGTHS = [
    [1],
    [16],
    [17, 0, 63],
    [64, 65, 128, 0, 1, 300],
    [0, 0],
    [513] + [3] * 32,
]

# (tokens in the chunk, tokens of its sequence up to and with the chunk); (0, 0) is padding.
PREFILL_RUNS = [
    [(1, 1)],
    [(16, 16)],
    [(70, 70)],
    [(5, 200)],
    [(64, 64), (65, 129), (0, 0), (1, 40)],
    [(130, 300), (3, 3), (17, 256), (0, 0)],
]


@dataclass(frozen=True)
class Pool:
    """A paged pool of random K and V, with the block tables of some sequences."""

    kv: KVLayer  # of NumPy arrays
    table_XW: np.ndarray
    slots: list[int]  # of each sequence

    def read(self, sequence: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a sequence's first tokens as the pool holds them, float64 [length, K, H]."""
        page_size = self.kv.k_PSKH.shape[1]
        pages = self.table_XW[self.slots[sequence], : -(-length // page_size)]
        k, v = (pool[pages].reshape(-1, *pool.shape[2:])[:length] for pool in dequantize(self.kv))
        return k, v


def make_pool(
    heads: Heads, lengths: list[int], page_size: int, dtype: str = "float32", seed: int = 0
) -> Pool:
    rng = np.random.default_rng(seed)
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of) + 4
    shape = (num_pages, page_size, heads.num_kv_heads, heads.head_dim)
    kv = store(rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32), dtype)
    order = rng.permutation(np.arange(1, num_pages))
    slots = rng.permutation(len(lengths) + 2)[: len(lengths)].tolist()
    width = max([*pages_of, 1]) + 3
    unused = order[sum(pages_of) :]
    table = rng.choice(unused, (len(lengths) + 2, width)).astype(np.int32)
    floats_k, floats_v = [array for array in kv if array is not None and array.dtype != np.int8][-2:]
    floats_k[unused], floats_v[unused] = np.nan, np.nan
    first = 0
    for slot, count, length in zip(slots, pages_of, lengths, strict=True):
        pages = order[first : first + count]
        table[slot, :count] = pages
        first += count
        if length % page_size:  # what lies behind the sequence in its last page is stale
            floats_v[pages[-1], length % page_size :] = np.nan
    return Pool(kv, table, slots)


def store(k_PSKH: Any, v_PSKH: Any, dtype: str) -> KVLayer:
    """Float32 K and V as a pool of a type: int8 is rounded to 1/127 of the largest that shares a scale."""
    if dtype != "int8":
        return KVLayer(k_PSKH.astype(jnp.dtype(dtype)), v_PSKH.astype(jnp.dtype(dtype)))
    head_dim = k_PSKH.shape[3]
    k_scale: Any = (
        np.stack([np.abs(k_PSKH[..., pairs]).max(-1) for pairs in shared_channels(head_dim)], -1) / 127
    )
    v_scale: Any = np.abs(v_PSKH).max(-1) / np.float32(127)
    k_int8: Any = np.rint(k_PSKH / spread(k_scale, head_dim)).astype(np.int8)
    v_int8: Any = np.rint(v_PSKH / v_scale[..., None]).astype(np.int8)
    return KVLayer(k_int8, v_int8, k_scale.astype(np.float32), v_scale)


def shared_channels(head_dim: int) -> list[list[int]]:
    """The channels of K that each scale is for: 8 rotary pairs (i, i + H / 2), or half of all."""
    half = head_dim // 2
    num_pairs = min(8, half // 2)
    return [
        [i + side for side in (0, half) for i in range(first, first + num_pairs)]
        for first in range(0, half, num_pairs)
    ]


def spread(k_scale_PSKQ: np.ndarray, head_dim: int) -> np.ndarray:
    """The scale of each channel of K, [P, S, K, H]."""
    k_scale_PSKH = np.empty((*k_scale_PSKQ.shape[:3], head_dim), k_scale_PSKQ.dtype)
    for index, channels in enumerate(shared_channels(head_dim)):
        k_scale_PSKH[..., channels] = k_scale_PSKQ[..., index : index + 1]
    return k_scale_PSKH


def dequantize(kv: KVLayer) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a whole pool, float64 [P, S, K, H]."""
    k, v = np.asarray(kv.k_PSKH).astype(np.float64), np.asarray(kv.v_PSKH).astype(np.float64)
    if kv.k_scale_PSKQ is None:
        return k, v
    return k * spread(np.asarray(kv.k_scale_PSKQ), k.shape[3]), v * np.asarray(kv.v_scale_PSK)[..., None]


def attend_exactly(q_NH: np.ndarray, k_AKH: np.ndarray, v_AKH: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of one query token, float64 [N, H]."""
    group = q_NH.shape[0] // k_AKH.shape[1]
    out = np.empty(q_NH.shape, np.float64)
    for head in range(q_NH.shape[0]):
        score = k_AKH[:, head // group] @ q_NH[head].astype(np.float64) * scale
        weight = np.exp(score - score.max())
        out[head] = (weight / weight.sum()) @ v_AKH[:, head // group]
    return out
