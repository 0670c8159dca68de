"""Rounding float32 to bf16, which kernels and products do to their operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_bf16(x: jax.Array) -> jax.Array:
    """float32 to the nearest bf16; ties go away from zero on the CPU, elsewhere to even.

    XLA's own conversion takes longer on the CPU than writing float32 does, because it looks for NaN. Here
    those that arithmetic yields stay NaN; the ones whose payload is all ones would not.
    """
    return jax.lax.platform_dependent(x, cpu=_round_up_halves, default=lambda x: x.astype(jnp.bfloat16))


def _round_up_halves(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
