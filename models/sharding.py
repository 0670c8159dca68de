"""Which part of each parameter a device holds when several share every layer (tensor parallelism).

A family says with `divide(cfg, num_devices)` how its logical axes are cut; ParamSpecs name those axes. Each
device then runs the family's forward pass as if its part were the whole model, and adds up with the others
behind the output projections of attention and MLP (Shoeybi et al. 2019, Megatron-LM). All devices must hold
the same shapes, so what does not divide is filled up with zeros: a head or a channel of zeros adds nothing.

Of fused matrices each device's parts lie together. Four query heads, two KV heads, two devices:

    checkpoint        q0 q1 q2 q3 | k0 k1 | v0 v1
    served            q0 q1  k0  v0 | q2 q3  k1  v1
                      `-device 0--'   `-device 1--'

Knows nothing of files, meshes or arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jaxserve.kernels_pallas.shards import TENSOR
from jaxserve.models.interface import Cut, ParamSpec, Run
from jaxserve.models.quant import hadamard

LANES = 128  # of a TPU's tile

# The one table of logical axes: the mesh axis that each is spread over.
MESH_AXES: Mapping[str, str] = {
    "vocab": TENSOR,
    "heads": TENSOR,  # channels of the query heads: what an output projection reads
    "qkv": TENSOR,  # channels of q, k and v as one projection leaves them
    "mlp": TENSOR,  # channels between the two halves of an MLP
    "gate_up": TENSOR,  # channels of gate and up, side by side
    "kv_heads": TENSOR,  # of the pool
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A model cut over devices: its config as one device sees it, and the cut of every logical axis."""

    num_devices: int
    local_cfg: Any  # the family's Config, with the heads and channels of one device; its vocabulary is whole
    cuts: Mapping[str, Cut]

    def cut_specs(self, specs: Sequence[ParamSpec]) -> list[ParamSpec]:
        """The family's ParamSpecs as they are served on these devices."""
        if self.num_devices == 1:
            return list(specs)
        return [
            replace(spec, cuts=tuple(None if axis is None else self.cuts[axis] for axis in spec.axes))
            for spec in specs
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCuts:
    """How attention is cut: heads of one device, and the cuts of the axes that are made of heads."""

    num_heads: int
    num_kv_heads: int
    heads: Cut
    qkv: Cut


def cut_evenly(length: int, num_devices: int, unit: int = 1) -> Cut:
    """Consecutive parts of one size, a multiple of `unit`; the last ones may end in zeros."""
    own = -(-length // (num_devices * unit)) * unit
    ends = [min(own * device, length) for device in range(num_devices + 1)]
    return Cut(tuple(_tidy([Run(start, end - start)], own) for start, end in pairwise(ends)))


def cut_channels(width: int, num_devices: int) -> Cut:
    """Even parts of an MLP's channels, of whole runs: what int8 mixes stays together (models/quant.py)."""
    return cut_evenly(width, num_devices, unit=hadamard(width).shape[0])


def repeat_cut(cut: Cut, length: int, count: int) -> Cut:
    """`count` axes of `length` behind each other, each cut alike: a device's parts of them lie together."""
    return Cut(
        tuple(
            _tidy([run for i in range(count) for run in _shift(runs, i * length)])
            for runs in cut.runs_by_device
        )
    )


def cut_heads(num_heads: int, num_kv_heads: int, head_dim: int, num_devices: int) -> HeadCuts:
    """Whole heads to each device, query heads with the KV head that they read.

    With fewer KV heads than devices, each is held by several devices, which share its query heads. Heads of
    zeros make up for what does not divide: 14 query heads and 2 KV heads on 4 devices are 4 and 1 on each. On
    2 devices they are 8 and 1, as seven heads of 64 are no whole lanes of a TPU (`_fill_lanes`).
    """
    group = num_heads // num_kv_heads
    own_kv = -(-num_kv_heads // num_devices)
    copies = [count for count in range(1, num_devices // num_kv_heads + 1) if num_devices % count == 0]
    num_copies = max(copies, default=1)  # of each KV head
    own_group = -(-group // num_copies)
    if num_devices > 1:
        own_group = _fill_lanes(own_group, own_kv * head_dim)
    q_parts, kv_parts = [], []
    for device in range(num_devices):
        first_kv = device // num_copies * own_kv
        kv_heads = range(first_kv, min(first_kv + own_kv, num_kv_heads))
        start = min(device % num_copies * own_group, group)
        count = min(own_group, group - start)
        q_runs = []
        for kv_head in kv_heads:
            q_runs.append(Run((kv_head * group + start) * head_dim, count * head_dim))
            q_runs.append(Run(None, (own_group - count) * head_dim))
        q_parts.append(_tidy(q_runs, own_kv * own_group * head_dim))
        kv_parts.append(_tidy([Run(first_kv * head_dim, len(kv_heads) * head_dim)], own_kv * head_dim))
    k_start, v_start = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    qkv_parts = [
        _tidy([*q_runs, *_shift(kv_runs, k_start), *_shift(kv_runs, v_start)])
        for q_runs, kv_runs in zip(q_parts, kv_parts, strict=True)
    ]
    return HeadCuts(
        num_heads=own_kv * own_group,
        num_kv_heads=own_kv,
        heads=Cut(tuple(q_parts)),
        qkv=Cut(tuple(qkv_parts)),
    )


def _fill_lanes(group: int, channels: int) -> int:
    """Query heads to a KV head, where a device's KV heads have so many `channels`: one more where that makes
    whole lanes and is a small part. A TPU lays out a matrix anew in every step whose rows are none."""
    is_whole = group * channels % LANES == 0
    return group + 1 if not is_whole and (group + 1) * channels % LANES == 0 and group >= 4 else group


def _shift(runs: Iterable[Run], offset: int) -> list[Run]:
    return [run if run.start is None else Run(run.start + offset, run.length) for run in runs]


def _tidy(runs: Iterable[Run], own: int | None = None) -> tuple[Run, ...]:
    """The same without empty runs and with neighbours in one, filled up with zeros to `own` indices."""
    tidy: list[Run] = []
    for run in runs:
        if not run.length:
            continue
        last = tidy[-1] if tidy else None
        end = None if last is None or last.start is None else last.start + last.length
        if last is not None and run.start == end:
            tidy[-1] = Run(last.start, last.length + run.length)
        else:
            tidy.append(run)
    missing = 0 if own is None else own - sum(run.length for run in tidy)
    return tuple(tidy) if not missing else _tidy([*tidy, Run(None, missing)])
