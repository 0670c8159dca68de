"""Which experts the kernels serve. Needs no new jax, unlike the GPU's kernel."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GPU_ROWS, MOST_GPU_ROWS = 8, 128
LEAST_TPU_ROWS, MOST_TPU_ROWS = 16, 128  # a tile of bf16, and a side of the smallest matrix unit
WEIGHTS = ("bfloat16", "int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What one device holds of every expert."""

    width: int
    expert_width: int
    weights: str  # "bfloat16", "float32", or the quantisation's name


def find_gpu_limit(experts: ExpertShape) -> str:
    """Why the GPU's kernel cannot multiply by them; empty if it can."""
    return _find_limit(experts, 64)


def find_tpu_limit(experts: ExpertShape) -> str:
    """Why the TPU's kernel cannot multiply by them; empty if it can."""
    return _find_limit(experts, 128)


def _find_limit(experts: ExpertShape, width_unit: int) -> str:
    if experts.weights not in WEIGHTS:
        return f"the product by experts wants weights of bfloat16, int8 or fp8, not {experts.weights}"
    if experts.width % width_unit or experts.expert_width % 64:
        units = "64s" if width_unit == 64 else f"{width_unit}s and 64s"
        widths = f"{experts.width} and {experts.expert_width}"
        return f"the product by experts wants widths in {units}, not {widths}"
    return ""
