"""The shared cases of the sampling kernels, and their oracle: float64, with the sorts that the kernels avoid.

The noise is jax.random's, in float64 from its float32 bits, so the oracle knows which token must be drawn.
Where two tokens come closer than float32 can tell, either is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

TOO_CLOSE = 1e-5  # values of tokens, whose scale is that of the noise


@dataclass(frozen=True)
class Row:
    """One row: what its logits look like, and its parameters. Temperature 0 is greedy."""

    logits: str = "normal"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ROWS = [
    Row(temperature=0.0),
    Row(logits="ties", temperature=0.0),
    Row(),
    Row(temperature=1.7),
    Row(top_k=1),
    Row(top_k=20),
    Row(logits="peaked", top_k=50, top_p=0.95, temperature=0.7),
    Row(top_k=20, top_p=0.9, temperature=1.3),
    Row(logits="ties", top_k=7),
    Row(logits="ties", top_k=40, top_p=0.5),
    Row(top_p=0.9),
    Row(logits="flat", top_p=0.6, temperature=2.0),
    Row(logits="peaked", top_p=0.5),
    Row(top_p=1e-6),
    Row(min_p=0.1),
    Row(logits="flat", min_p=0.9, top_p=0.8, top_k=600),
    Row(logits="equal", top_k=3, top_p=0.7),
    Row(logits="few", top_k=20),
    Row(logits="few", top_p=0.7),
    Row(logits="few", temperature=0.9),
    Row(top_k=1 << 30),
    Row(logits="one", top_k=5, top_p=0.5, min_p=0.5),
    Row(logits="large", top_k=9, top_p=0.8, temperature=0.1),
]
# Rows whose largest logit must not be finite.
BAD_ROWS = [Row("infinite"), Row("nothing", top_k=4), Row("nan", top_k=4), Row("nan")]

# Vocabulary, type of the logits, the rows of ROWS that a simulated GPU gets (a row takes it a second or two),
# and how it divides them: an overlapping slab, several in a block; padding; a row alone that is shared.
BATCHES = [
    (19 * 128, "float32", slice(0, None, 2), {"slabs_per_block": 4}),
    (1000, "bfloat16", slice(1, None, 2), {}),
    (40 * 128, "float32", slice(7, 8), {"num_teams": 2}),
]


def make_logits(rows: list[Row], vocab_size: int, dtype: str) -> np.ndarray:
    """Logits [B, V], rounded to what `dtype` can hold, as float32."""
    rng = np.random.default_rng(vocab_size)
    logits_BV = np.stack([_make_row(rng, row.logits, vocab_size) for row in rows]).astype(np.float32)
    return np.asarray(jax.numpy.asarray(logits_BV).astype(dtype).astype(np.float32))


def _make_row(rng: np.random.Generator, kind: str, vocab_size: int) -> np.ndarray:
    normal_V = 3 * rng.standard_normal(vocab_size)
    some = rng.choice(vocab_size, 5, replace=False)
    if kind == "peaked":
        normal_V[some] += (12, 11, 10, 9, 8)
    elif kind == "ties":
        normal_V = np.round(normal_V)
    elif kind == "flat":
        normal_V /= 10
    elif kind == "equal":
        normal_V = np.zeros(vocab_size)
    elif kind in ("few", "one"):
        allowed_V = np.isin(np.arange(vocab_size), some[: 1 if kind == "one" else 5])
        normal_V = np.where(allowed_V, normal_V, -np.inf)
    elif kind == "large":
        normal_V = normal_V * 100 - 1000
    elif kind == "nan":
        normal_V[some[0]] = np.nan
    elif kind == "infinite":
        normal_V[some[0]] = np.inf
    elif kind == "nothing":
        normal_V[:] = -np.inf
    return normal_V


def draw_exactly(logits_V: np.ndarray, row: Row, seed: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The value of each token, float64, -inf where it is cut; and which tokens only just are kept or cut.

    Those at the edge of top-p: the sums of float32 may tell otherwise.
    """
    logits_V = logits_V.astype(np.float64)
    if row.temperature == 0:
        return logits_V, np.zeros(len(logits_V), bool)
    scaled_V = logits_V / np.float64(np.float32(row.temperature))
    scaled_V -= scaled_V.max()
    kept_V = np.ones(len(scaled_V), bool)
    if 0 < row.top_k < len(scaled_V):
        kept_V = scaled_V >= np.sort(scaled_V)[-row.top_k]
    unsure_V = np.zeros(len(scaled_V), bool)
    if row.top_p < 1:
        mass_V = np.where(kept_V, np.exp(scaled_V), 0.0)
        order = np.argsort(-scaled_V, kind="stable")
        _, first_of_tie = np.unique(-scaled_V[order], return_index=True)
        before = (np.cumsum(mass_V[order]) - mass_V[order])[first_of_tie]  # of strictly larger tokens
        mass_before_V = np.empty(len(scaled_V))
        mass_before_V[order] = np.repeat(before, np.diff(np.append(first_of_tie, len(order))))
        wanted = row.top_p * mass_V.sum()
        unsure_V = kept_V & (np.abs(mass_before_V - wanted) < 1e-6 * mass_V.sum())
        kept_V &= mass_before_V < wanted
    if row.min_p > 0:
        kept_V &= scaled_V >= np.log(row.min_p)
    key = jax.random.fold_in(jax.random.key(seed), position)
    uniform_V = np.asarray(jax.random.uniform(key, logits_V.shape, minval=np.finfo(np.float32).tiny))
    value_V = scaled_V - np.log(-np.log(uniform_V.astype(np.float64)))
    return np.where(kept_V | unsure_V, value_V, -np.inf), unsure_V


def allowed_tokens(logits_V: np.ndarray, row: Row, seed: int, position: int) -> set[int]:
    """The tokens that may come out: one, but for near ties and the edge of top-p."""
    value_V, unsure_V = draw_exactly(logits_V, row, seed, position)
    if row.temperature == 0:
        return {int(np.argmax(value_V))}
    best = np.where(unsure_V, -np.inf, value_V).max()
    return set(np.flatnonzero(value_V >= best - TOO_CLOSE).tolist())
