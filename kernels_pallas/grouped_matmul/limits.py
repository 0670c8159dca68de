"""Which experts the kernels serve. Needs no new jax, unlike the GPU's kernel."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GPU_ROWS, MOST_GPU_ROWS = 8, 128
LEAST_TPU_ROWS, MOST_TPU_ROWS = 16, 128  # a tile of bf16, and a side of the smallest matrix unit
TPU_WEIGHTS = ("bfloat16", "int8", "fp8")
GPU_WEIGHTS = (*TPU_WEIGHTS, "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What one device holds of every expert."""

    width: int
    expert_width: int
    weights: str  # "bfloat16", "float32", or the quantisation's name


def find_gpu_limit(experts: ExpertShape) -> str:
    """Why the GPU's kernel cannot multiply by them; empty if it can."""
    if experts.weights == "int4":  # inputs are packed in runs
        return _find_limit(experts, GPU_WEIGHTS, 128, 128)
    return _find_limit(experts, GPU_WEIGHTS, 64, 64)


def find_tpu_limit(experts: ExpertShape) -> str:
    """Why the TPU's kernel cannot multiply by them; empty if it can."""
    return _find_limit(experts, TPU_WEIGHTS, 128, 64)


def _find_limit(experts: ExpertShape, weights: tuple[str, ...], width_unit: int, expert_unit: int) -> str:
    if experts.weights not in weights:
        *others, last = weights
        wanted = f"{', '.join(others)} or {last}"
        return f"the product by experts wants weights of {wanted}, not {experts.weights}"
    if experts.width % width_unit or experts.expert_width % expert_unit:
        units = f"{width_unit}s" if width_unit == expert_unit else f"{width_unit}s and {expert_unit}s"
        widths = f"{experts.width} and {experts.expert_width}"
        return f"the product by experts wants widths in {units}, not {widths}"
    return ""
