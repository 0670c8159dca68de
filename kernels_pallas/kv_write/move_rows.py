"""Rows of tokens to their places in a TPU's pool, by copies within a Pallas kernel.

Eight tokens with one copy where their places follow one another, as those of a chunk do, otherwise a copy a
token. All are under way together. Padding tokens, whose place is in page 0, are written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TOGETHER = 8  # tokens of one copy


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMoves:
    """Token t of each source to place `first_place + index_T[first_token + t]` of its pool.

    A token is one entry of both, or a number of them that follow one another. `moved` is a semaphore. Of
    `own_tokens`, a first one and the one behind the last, if they are told, others stay.
    """

    sources: Sequence[Any]
    pools: Sequence[Any]
    num_tokens: int
    index_T: Any
    first_place: Any
    page_size: int
    moved: Any
    first_token: Any = 0
    own_tokens: tuple[Any, Any] | None = None

    def start(self) -> None:
        self._act(lambda copy: copy.start())

    def wait(self) -> None:
        """Until all is there."""
        self._act(lambda copy: copy.wait())

    def _act(self, act: Callable[[Any], None]) -> None:
        num_groups = self.num_tokens // TOGETHER
        jax.lax.fori_loop(0, num_groups, lambda group, _: self._act_on_group(group, act), None)
        for token in range(num_groups * TOGETHER, self.num_tokens):
            self._act_on_token(token, act)

    def _act_on_group(self, group: Any, act: Callable[[Any], None]) -> None:
        token = group * TOGETHER
        first = self.index_T[self.first_token + token]
        follow = first >= self.page_size
        if self.own_tokens is not None:
            follow &= self._is_own(token) & self._is_own(token + TOGETHER - 1)
        for i in range(1, TOGETHER):
            follow &= self.index_T[self.first_token + token + i] == first + i

        @pl.when(follow)
        def _():
            for copy in self._list_copies(token, TOGETHER):
                act(copy)

        @pl.when(jnp.logical_not(follow))
        def _():
            for i in range(TOGETHER):
                self._act_on_token(token + i, act)

    def _act_on_token(self, token: Any, act: Callable[[Any], None]) -> None:
        moves = self.index_T[self.first_token + token] >= self.page_size
        if self.own_tokens is not None:
            moves &= self._is_own(token)

        @pl.when(moves)
        def _():
            for copy in self._list_copies(token, 1):
                act(copy)

    def _is_own(self, token: Any) -> Any:
        assert self.own_tokens is not None
        first, end = self.own_tokens
        return (token >= first) & (token < end)

    def _list_copies(self, token: Any, num_together: int) -> list[Any]:
        place = self.first_place + self.index_T[self.first_token + token]
        copies = []
        for source, pool in zip(self.sources, self.pools, strict=True):
            per_token = source.shape[0] // self.num_tokens
            here, there = (pl.ds(first * per_token, num_together * per_token) for first in (token, place))
            copies.append(pltpu.make_async_copy(source.at[here], pool.at[there], self.moved))
        return copies
