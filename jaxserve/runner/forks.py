"""Forks on the device: block tables of slots whose sequences change, and copies of pages.

A program of its own, compiled once, that runs before the step whose plan asks for it: beams that share a
prefix share its pages, so a fork is a row of the block table and at most one page. Called by runner.py
(pack, on the host) and programs.py (write, traced). Knows nothing of beams or scores.

One launch takes MAX_FORKS tables and MAX_FORKS copies; a step with more of them takes several. Its array:

    packed   [MAX_FORKS, 3 + W]   slot | source page | target page | block table of the slot

Padding names the trash slot and copies the trash page to itself. On the CPU such a launch takes 0.6 to 0.8 ms
on the 0.5B model (24 layers, pages of 16), padding included. A loop that copies page by page was measured at
0.1 to 0.5 ms, but it is slower to compile (2 to 5 s, where this takes less than 1), and on a GPU a loop of
unknown length has to ask the host at every turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxserve.runner.device_state import DeviceState
from jaxserve.scheduler.plan import PageCopy, PageTable

MAX_FORKS = 8


def forks_shape(table_width: int) -> tuple[int, int]:
    return MAX_FORKS, 3 + table_width


def pack_forks(
    tables: Sequence[PageTable], copies: Sequence[PageCopy], trash_slot: int, table_width: int
) -> list[np.ndarray]:
    """The packed array of each launch, in order; none if there is nothing to do."""
    sources = {copy.source for copy in copies}
    assert sources.isdisjoint(copy.target for copy in copies), f"copies that depend on their order: {copies}"
    launches = []
    for first in range(0, max(len(tables), len(copies)), MAX_FORKS):
        packed = np.zeros(forks_shape(table_width), np.int32)
        packed[:, 0] = trash_slot
        for row, table in enumerate(tables[first : first + MAX_FORKS]):
            packed[row, 0] = table.slot
            packed[row, 3 : 3 + len(table.page_ids)] = table.page_ids
        for row, copy in enumerate(copies[first : first + MAX_FORKS]):
            packed[row, 1:3] = copy.source, copy.target
        launches.append(packed)
    return launches


def write_forks(state: DeviceState, packed: jax.Array) -> DeviceState:
    """The state with tables written and pages copied; a program of its own, which donates `state`."""
    slot_F, source_F, target_F, table_FW = packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3:]
    # All sources are read at once, so no write can come before a read.
    if isinstance(state.kv, list):
        kv = jax.tree.map(lambda pool_PSKH: pool_PSKH.at[target_F].set(pool_PSKH[source_F]), state.kv)
    else:
        kv = jax.tree.map(lambda pool: pool.at[:, target_F].set(pool[:, source_F]), state.kv)
    return state._replace(kv=kv, table_XW=state.table_XW.at[slot_F].set(table_FW))
