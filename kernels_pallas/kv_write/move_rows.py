"""Rows of tokens to their places in a TPU's pool, by copies within a Pallas kernel.

Eight tokens with one copy where their places follow one another, as those of a chunk do, otherwise a copy a
token. All are under way together. Padding tokens, whose place is in page 0, are written nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TOGETHER = 8  # tokens of one copy


def move_rows(
    sources: Sequence[Any],
    pools: Sequence[Any],
    moved: Any,
    index_T: Any,
    first_token: Any,
    first_place: Any,
    page_size: int,
) -> None:
    """Row t of each source, [tokens, rows, L], to place `first_place + index_T[first_token + t]` of its pool.

    `moved` is a semaphore; when this returns, all is there.
    """
    num_tokens = sources[0].shape[0]
    num_groups = num_tokens // TOGETHER

    def copies(token, num_together: int) -> list[Any]:
        place = first_place + index_T[first_token + token]
        return [
            pltpu.make_async_copy(
                source.at[pl.ds(token, num_together)], pool.at[pl.ds(place, num_together)], moved
            )
            for source, pool in zip(sources, pools, strict=True)
        ]

    def act_on_token(token, act) -> None:
        @pl.when(index_T[first_token + token] >= page_size)
        def _():
            for copy in copies(token, 1):
                act(copy)

    def act_on_group(group, act) -> None:
        token = group * TOGETHER
        first = index_T[first_token + token]
        follow = first >= page_size
        for i in range(1, TOGETHER):
            follow &= index_T[first_token + token + i] == first + i

        @pl.when(follow)
        def _():
            for copy in copies(token, TOGETHER):
                act(copy)

        @pl.when(jnp.logical_not(follow))
        def _():
            for i in range(TOGETHER):
                act_on_token(token + i, act)

    for act in (lambda copy: copy.start(), lambda copy: copy.wait()):
        jax.lax.fori_loop(0, num_groups, lambda group, _, act=act: act_on_group(group, act), None)
        for token in range(num_groups * TOGETHER, num_tokens):
            act_on_token(token, act)
