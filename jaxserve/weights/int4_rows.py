"""Rows of matrices of 4-bit values in groups, on the host: unpacked, packed as they are served, or made.

A weight is scale * (value - zero); values and zeros are 0 to 15, and a row's inputs share a scale and a zero
in groups. Called by building.py and packed_int4.py. Knows nothing of checkpoints or of jax.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RUN = 128  # inputs whose values are packed together: see kernels_pallas/int4_matmul/ref.py
HALF = RUN // 2
MIDDLE = 8  # what high bits are less
LARGEST = 15


class GroupedRows(NamedTuple):
    """Rows of a matrix, a value at a time."""

    q_FD: np.ndarray  # uint8, 0 to 15
    scale_FG: np.ndarray  # float32
    zero_FG: np.ndarray  # uint8, 0 to 15
    group_D: np.ndarray | None = None  # of each input; None: groups of equal length, in order

    def has_groups_of(self, group_size: int) -> bool:
        return self.group_D is None and self.q_FD.shape[1] == group_size * self.scale_FG.shape[1]


def quantize_rows(w_FD: np.ndarray, group_size: int) -> GroupedRows:
    """The nearest values of each group, whose scale spans its least and largest weight, and zero.

    Scales are rounded to float16, as they are served, before values are found. Float32 [F, D]; what is not
    finite gives a scale that is not.
    """
    w_FGD = w_FD.astype(np.float32, copy=False).reshape(len(w_FD), -1, group_size)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        least_FG = np.minimum(w_FGD.min(axis=2), 0)
        scale_FG = (np.maximum(w_FGD.max(axis=2), 0) - least_FG) / np.float32(LARGEST)
        scale_FG = scale_FG.astype(np.float16).astype(np.float32)
        per_weight_FG = np.where(scale_FG > 0, 1 / scale_FG, np.float32(0))
        zero_FG = np.clip(np.rint(-least_FG * per_weight_FG), 0, LARGEST)
        q_FGD = np.rint(w_FGD * per_weight_FG[:, :, None]) + zero_FG[:, :, None]
        q_FD = np.clip(q_FGD, 0, LARGEST).astype(np.uint8).reshape(w_FD.shape)
        return GroupedRows(q_FD, scale_FG, zero_FG.astype(np.uint8))


def dequantize(rows: GroupedRows) -> np.ndarray:
    """scale * (value - zero), float32 [F, D]."""
    if rows.group_D is not None:
        zero_FD, scale_FD = rows.zero_FG[:, rows.group_D], rows.scale_FG[:, rows.group_D]
        return (rows.q_FD.astype(np.float32) - zero_FD) * scale_FD
    num_rows, num_groups = rows.scale_FG.shape
    w_FGD = rows.q_FD.reshape(num_rows, num_groups, -1).astype(np.float32)
    w_FGD -= rows.zero_FG[:, :, None]
    w_FGD *= rows.scale_FG[:, :, None]
    return w_FGD.reshape(num_rows, -1)


def pack_runs(q_FD: np.ndarray) -> np.ndarray:
    """Values two a byte, int8 [F, D / 2]: of each run of 128 inputs the first half in low bits, the second,
    less 8, in high ones."""
    q_FRD = q_FD.reshape(len(q_FD), -1, RUN)
    high_FRH = q_FRD[:, :, HALF:] ^ np.uint8(MIDDLE)  # less 8, of four bits
    return (q_FRD[:, :, :HALF] | high_FRH << 4).view(np.int8).reshape(len(q_FD), -1)


def join_rows(pieces: list[GroupedRows]) -> GroupedRows:
    """The rows of several, one after another."""
    if len(pieces) == 1:
        return pieces[0]
    q_FD, scale_FG, zero_FG = (np.concatenate([piece[field] for piece in pieces]) for field in range(3))
    return GroupedRows(q_FD, scale_FG, zero_FG)
