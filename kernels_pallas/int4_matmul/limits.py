"""Which matrices of 4-bit values can be packed, and which the GPU's kernel serves. Needs no new jax, unlike
the kernel."""

from __future__ import annotations

MOST_TOKENS = 128  # more are limited by arithmetic, which XLA's product of bf16 is better at
GROUP_SIZES = (64, 128)


def find_packing_limit(num_inputs: int, group_size: int) -> str:
    """Why such a matrix cannot be packed as ref.py says; empty if it can."""
    if num_inputs % 128 or num_inputs % group_size:
        return f"4-bit matrices want inputs in 128s and in whole groups, not {num_inputs} in {group_size}s"
    return ""


def find_int4_limit(num_outputs: int, num_inputs: int, group_size: int) -> str:
    """Why the kernel cannot multiply by such a matrix; empty if it can."""
    if num_outputs % 64 or num_inputs % 128:
        return f"4-bit matrices want outputs in 64s and inputs in 128s, not {num_outputs} and {num_inputs}"
    if group_size % 128 and group_size not in GROUP_SIZES:
        return f"4-bit matrices want groups of 64 or multiples of 128 inputs, not {group_size}"
    return ""
