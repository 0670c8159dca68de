"""Which experts the kernels serve. Needs no new jax, unlike the GPU's kernel."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GPU_ROWS, MOST_GPU_ROWS = 8, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What one device holds of every expert."""

    width: int
    expert_width: int
    weights: str  # "bfloat16", "float32", or the quantisation's name


def find_gpu_limit(experts: ExpertShape) -> str:
    """Why the GPU's kernel cannot multiply by them; empty if it can."""
    if experts.weights != "bfloat16":
        return f"the product by experts wants weights of bfloat16, not {experts.weights}"
    if experts.width % 64 or experts.expert_width % 64:
        return f"the product by experts wants widths in 64s, not {experts.width} and {experts.expert_width}"
    return ""
