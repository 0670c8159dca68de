"""The shared case lists of the kernel triples, and their float64 oracles in NumPy.

Every form of a kernel (ref, tpu, gpu) is run against the same cases. Pages lie in random order, tables
hold stale ids behind their sequence, and pages of nobody hold NaN: a kernel that reads what it should
not gives NaN or a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


HEADS = [Heads(1, 1, 8), Heads(4, 4, 16), Heads(14, 2, 64), Heads(8, 1, 32)]

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

    k_PSKH: np.ndarray
    v_PSKH: np.ndarray
    table_XW: np.ndarray
    slots: list[int]  # of each sequence

    def read(self, sequence: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a sequence's first tokens, float64 [length, K, H]."""
        page_size = self.k_PSKH.shape[1]
        pages = self.table_XW[self.slots[sequence], : -(-length // page_size)]
        k = self.k_PSKH[pages].reshape(-1, *self.k_PSKH.shape[2:])[:length]
        v = self.v_PSKH[pages].reshape(-1, *self.v_PSKH.shape[2:])[:length]
        return k.astype(np.float64), v.astype(np.float64)


def make_pool(heads: Heads, lengths: list[int], page_size: int, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of) + 4
    shape = (num_pages, page_size, heads.num_kv_heads, heads.head_dim)
    k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    order = rng.permutation(np.arange(1, num_pages))
    slots = rng.permutation(len(lengths) + 2)[: len(lengths)].tolist()
    width = max([*pages_of, 1]) + 3
    unused = order[sum(pages_of) :]
    table = rng.choice(unused, (len(lengths) + 2, width)).astype(np.int32)
    k[unused], v[unused] = np.nan, np.nan
    first = 0
    for slot, count, length in zip(slots, pages_of, lengths, strict=True):
        pages = order[first : first + count]
        table[slot, :count] = pages
        first += count
        if length % page_size:  # what lies behind the sequence in its last page is stale
            v[pages[-1], length % page_size :] = np.nan
    return Pool(k, v, table, slots)


def attend_exactly(q_NH: np.ndarray, k_AKH: np.ndarray, v_AKH: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of one query token, float64 [N, H]."""
    group = q_NH.shape[0] // k_AKH.shape[1]
    out = np.empty(q_NH.shape, np.float64)
    for head in range(q_NH.shape[0]):
        score = k_AKH[:, head // group] @ q_NH[head].astype(np.float64) * scale
        weight = np.exp(score - score.max())
        out[head] = (weight / weight.sum()) @ v_AKH[:, head // group]
    return out
