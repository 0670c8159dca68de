"""Choosing one token a row from its logits, on an NVIDIA GPU (Pallas Mosaic GPU): two launches, no sort.

The row is seen as lines of 128 logits. The first launch reads every logit once: it notes each line's largest
logit and its mass, and draws for the rows that nothing is cut from. The second looks only at the lines that
can hold a kept token: with top-k those are at most about k of 1187 lines, because the k-th largest of the
lines' maxima bounds the threshold from below; with top-p alone, lines whose maxima together already hold the
mass. There it finds the thresholds by a search over the floats in between, three pivots a pass, which ends
when a single logit is left between the bounds, and draws among the kept tokens.

    scan     grid (B, splits)   logits -> line maxima, line masses, the best of each block
    choose   grid (B,)          live lines -> top-k floor -> top-p floor -> draw

Flat rows with top-p alone have many live lines, and every pass of the second launch reads them again (from
the L2 cache, mostly): right, but slower. The noise is the reference's, bit by bit (noise.py), and is
computed only where a token could still win. Letters beside the usual ones: L lines, U lines of a slab, G of
a group, C the slots that hold line statistics (L, and some of an overlapping last slab), Z blocks of a row
in the scan.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.sampling.division import LINE, Rows, plan
from jaxserve.kernels_pallas.sampling.gpu_choose import choose
from jaxserve.kernels_pallas.sampling.gpu_scan import scan
from jaxserve.kernels_pallas.sampling.noise import row_keys


def choose_tokens(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    seed_B: jax.Array,
    position_B: jax.Array,
    *,
    slabs_per_block: int | None = None,
    num_teams: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As ref.choose_tokens. A vocabulary that is no multiple of 128 costs one more copy of the logits.

    `slabs_per_block` and `num_teams` are for tuning: see `plan`.
    """
    num_rows, vocab_size = logits_BV.shape
    geometry = plan(num_rows, vocab_size, slabs_per_block=slabs_per_block, num_teams=num_teams)
    padding = geometry.num_lines * LINE - vocab_size
    if padding:
        logits_BV = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    logits_BLV = logits_BV.reshape(num_rows, geometry.num_lines, LINE)
    is_greedy_B = temperature_B == 0
    is_cut_B = ~is_greedy_B & (((top_k_B > 0) & (top_k_B < vocab_size)) | (top_p_B < 1) | (min_p_B > 0))
    key_B2 = row_keys(seed_B, position_B)
    rows = Rows(
        temperature=jnp.where(is_greedy_B, 1.0, temperature_B),
        top_k=jnp.where(top_k_B < vocab_size, top_k_B, 0),
        top_p=top_p_B,
        log_min_p=jnp.log(min_p_B),
        is_greedy=is_greedy_B.astype(jnp.int32),
        is_cut=is_cut_B.astype(jnp.int32),
        key_0=key_B2[:, 0],
        key_1=key_B2[:, 1],
    )
    max_BC, mass_BC, best_BZ, id_BZ = scan(geometry, interpret)(logits_BLV, *rows)
    cut_token_B, largest_B = choose(geometry, interpret)(logits_BLV, max_BC, mass_BC, *rows)
    best_B1 = jnp.max(best_BZ, axis=1, keepdims=True)
    token_B = jnp.min(jnp.where(best_BZ == best_B1, id_BZ, vocab_size - 1), axis=1)
    return jnp.where(is_cut_B, cut_token_B, token_B), largest_B
