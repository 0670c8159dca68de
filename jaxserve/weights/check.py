"""Whether a checkpoint's tensors are those that a model's parameters are made of. Called by loader.py.

Both directions are checked, by name and shape: what is missing, and what nobody uses. Knows nothing of
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.interface import ParamSpec, TensorSource

# Buffers that some writers save beside the weights, and that are computed here.
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip


class CheckpointTensors(Protocol):
    """What a checkpoint offers: tensors under Hugging Face names, read by rows of axis 0."""

    def tensor_names(self) -> list[str]: ...
    def shape_of(self, name: str) -> tuple[int, ...]: ...
    def file_of(self, name: str) -> Path: ...
    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray: ...
    def close(self) -> None: ...


def check_checkpoint(checkpoint: CheckpointTensors, specs: list[ParamSpec], *, is_tied: bool) -> None:
    """Raise WeightError for tensors that are missing, of another shape, or used by no spec."""
    names = checkpoint.tensor_names()
    present = set(names)
    sources = [source for spec in specs for source in spec.sources]
    missing = [source.name for source in sources if source.name not in present]
    if missing:
        raise WeightError(
            f"The checkpoint lacks {_list_names(missing)}. It is incomplete, or of another architecture than "
            "its config says."
        )
    for source in sources:
        shape = checkpoint.shape_of(source.name)
        if shape != source.shape:
            raise WeightError(
                f"Tensor {source.name} of {checkpoint.file_of(source.name)} has the shape {list(shape)}; the "
                f"model's config asks for {list(source.shape)}."
            )
    used = {source.name for source in sources}
    left_over = [
        name
        for name in names
        if name not in used
        and not name.endswith(_IGNORED_SUFFIXES)
        and not (is_tied and name == "lm_head.weight")
    ]
    if left_over:
        raise WeightError(
            f"The checkpoint holds {_list_names(left_over)}, which the model does not use: the config names "
            "another architecture than the weights are of."
        )


def find_names(specs: list[ParamSpec], names: list[str]) -> list[ParamSpec]:
    """The specs with each source under the one of its names that the checkpoint has."""
    present = set(names)

    def find(source: TensorSource) -> TensorSource:
        found = next((name for name in (source.name, *source.other_names) if name in present), source.name)
        return replace(source, name=found)

    return [replace(spec, sources=tuple(map(find, spec.sources))) for spec in specs]


def is_tied(hf_config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding; models that see images may say so with their language side."""
    configs = (hf_config, hf_config.get("text_config") or {})
    return any(config.get("tie_word_embeddings") for config in configs)


def _list_names(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{rest}"
