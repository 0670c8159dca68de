"""Where rows and columns of a checkpoint's parameter go among those of the served one. Used by loader.py.

One device is served what the checkpoint holds. Where devices share a parameter, the parts of all lie behind
each other along the axis that is cut (models/sharding.py), so that each device's part is a slice. Every block
of a checkpoint is read once, whoever holds it: rows that several devices hold are written several times.

Where hosts share a parameter, each holds the parts of its own devices, `ParamSpec.held`, and reads the rows
that they are made of. Columns are picked from whole rows: that is what a scale is of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jaxserve.models.interface import Cut, ParamSpec


def place_rows(host: np.ndarray, spec: ParamSpec, first_row: int, block: np.ndarray) -> None:
    """Write rows `first_row` and following of the checkpoint's parameter to their places in `host`, which
    holds the served one, or its scales; `block` has the served columns."""
    cut = _find_cut(spec, 0)
    if cut is None:
        host[first_row : first_row + len(block)] = block
        return
    for source, target, length in list_pieces(cut.pick(spec.held)):
        start, end = max(first_row, source), min(first_row + len(block), source + length)
        if start < end:
            host[target + start - source : target + end - source] = block[start - first_row : end - first_row]


def pick_columns(block: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Rows of the checkpoint's parameter with the served columns: those of each device together."""
    cut = _find_cut(spec, 1)
    if cut is None:
        return block
    served = np.zeros((len(block), cut.served_length), block.dtype)
    for source, target, length in list_pieces(cut):
        served[:, target : target + length] = block[:, source : source + length]
    return served


def pick_groups(block_FG: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """What each group of the checkpoint's columns has, by group of the served ones: zeros where those are."""
    cut = _find_cut(spec, 1)
    if cut is None:
        return block_FG
    group_size = find_group_size(spec)
    served_FG = np.zeros((len(block_FG), count_served_groups(spec)), block_FG.dtype)
    for source, target, length in list_pieces(cut):
        groups = np.arange(source, source + length, group_size) // spec.group_size
        served_FG[:, target // group_size : (target + length) // group_size] = block_FG[:, groups]
    return served_FG


def find_group_size(spec: ParamSpec) -> int:
    """Columns of a group as it is served: no group reaches over what a device holds of others."""
    cut = _find_cut(spec, 1)
    if cut is None:
        return spec.group_size
    bounds = [
        number for runs in cut.runs_by_device for run in runs for number in (run.start or 0, run.length)
    ]
    return math.gcd(spec.group_size, *bounds)


def count_served_groups(spec: ParamSpec) -> int:
    """Of the parts of all devices together."""
    return spec.served_shape[1] // find_group_size(spec)


def keep_columns(block: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Of the served columns, those that this process holds."""
    return block if block.ndim == 1 else block[:, find_held(spec, 1)]


def find_held(spec: ParamSpec, axis: int) -> slice:
    """Of a served axis, the part that this process holds."""
    cut = _find_cut(spec, axis)
    if cut is None or spec.held is None:
        return slice(None)
    return slice(spec.held.start * cut.own_length, spec.held.stop * cut.own_length)


def holds_rows(spec: ParamSpec, first_row: int, num_rows: int) -> bool:
    """Whether this process holds anything of some rows of the checkpoint's parameter."""
    cut = _find_cut(spec, 0)
    if cut is None or spec.held is None:
        return True
    pieces = list_pieces(cut.pick(spec.held))
    return any(first_row < source + length and source < first_row + num_rows for source, _, length in pieces)


def count_own_columns(spec: ParamSpec) -> int:
    """Columns of a matrix that one device holds."""
    cut = _find_cut(spec, 1)
    return spec.shape[1] if cut is None else cut.own_length


def _find_cut(spec: ParamSpec, axis: int) -> Cut | None:
    return spec.cuts[axis] if len(spec.cuts) > axis else None


def list_pieces(cut: Cut) -> Iterator[tuple[int, int, int]]:
    """(first index in the checkpoint's axis, first index in the served one, length) of all but the zeros."""
    target = 0
    for runs in cut.runs_by_device:
        for run in runs:
            if run.start is not None:
                yield run.start, target, run.length
            target += run.length
