"""Which matrices are served as 4-bit values in groups, and whether they can be: known before one is read.

Of an AWQ or GPTQ checkpoint those that it packs, as the names of its tensors say, or its config where there
are no files. Of any other the matrices of the layers, which are then quantised while they are loaded. Called
by blueprint.py. Knows nothing of the products themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.kernels_pallas.int4_matmul.limits import find_int4_limit, find_packing_limit
from jaxserve.models.interface import ParamSpec, TensorSource
from jaxserve.weights.layout import count_own_columns, find_group_size
from jaxserve.weights.packed_int4 import METHODS, read_packing
from jaxserve.weights.resolve import ModelFiles
from jaxserve.weights.safetensors import open_safetensors

GROUP_SIZE = 128  # of what is quantised here


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Inputs that share a scale, by path of each matrix; `limit` is why they cannot be served so."""

    is_packed: bool  # by the checkpoint
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    limit: str = ""


def find_grouping(files: ModelFiles, specs: Sequence[ParamSpec]) -> Grouping:
    """What 4 bits would mean for these files. Raises WeightError for a packing that is not served."""
    words = files.hf_config.get("quantization_config") or {}
    if words.get("quant_method") not in METHODS:
        return Grouping(is_packed=False, group_sizes=group_layers(specs))
    packing = read_packing(files.hf_config)
    assert packing is not None
    is_packed = _find_packed_names(files) if files.kind == "safetensors" else _guess_packed_names(words)
    sizes = {
        spec.path: spec.shape[1] if packing.group_size < 0 else packing.group_size
        for spec in specs
        if spec.kind == "matrix" and all(is_packed(source) for source in spec.sources)
    }
    if packing.reorders_groups:
        limit = "its groups are of inputs in an order of their own (desc_act)"
    else:
        limit = "" if sizes else "none of its matrices are packed"
    return Grouping(is_packed=True, group_sizes=sizes, limit=limit)


def group_layers(specs: Sequence[ParamSpec]) -> dict[str, int]:
    """Group sizes of what is quantised here: all matrices but the head."""
    return {spec.path: GROUP_SIZE for spec in specs if spec.kind == "matrix" and "vocab" not in spec.axes}


def mark_groups(specs: Sequence[ParamSpec], group_sizes: Mapping[str, int]) -> list[ParamSpec]:
    """The specs with those served in 4 bits marked as such."""
    return [replace(spec, group_size=group_sizes.get(spec.path, 0)) for spec in specs]


def find_grouping_limit(specs: Sequence[ParamSpec], *, by_kernel: bool) -> str:
    """Why a matrix that is marked, as it is cut over devices, cannot be packed, or not be multiplied by the
    GPU's kernel; empty if all can."""
    for spec in specs:
        if not spec.group_size:
            continue
        num_inputs, group_size = count_own_columns(spec), find_group_size(spec)
        limit = find_packing_limit(num_inputs, group_size)
        if by_kernel and not limit:
            cut = spec.cuts[0] if spec.cuts else None
            limit = find_int4_limit(cut.own_length if cut else spec.shape[0], num_inputs, group_size)
        if limit:
            return f"of {spec.path}, {limit}"
    return ""


def _find_packed_names(files: ModelFiles) -> Callable[[TensorSource], bool]:
    with contextlib.closing(open_safetensors(files.local_dir)) as checkpoint:
        present = set(checkpoint.tensor_names())

    def is_packed(source: TensorSource) -> bool:
        names = (source.name, *source.other_names)
        return any(f"{name.removesuffix('.weight')}.qweight" in present for name in names)

    return is_packed


def _guess_packed_names(words: Mapping[str, Any]) -> Callable[[TensorSource], bool]:
    skipped = [*(words.get("modules_to_not_convert") or ()), *([] if words.get("lm_head") else ["lm_head"])]
    return lambda source: not any(part in source.name for part in skipped)
