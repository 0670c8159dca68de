"""The sampler's Gumbel noise inside a kernel: the bits of jax.random, computed where they are needed.

jax's default generator is a pure function of (key, index): Threefry 2x32 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") of the counter (0, index), its two words combined by exclusive or. So
the noise of a token needs neither its neighbours nor memory, and a kernel may skip the tokens that cannot
be drawn. `row_keys` and `gumbel` together give `jax.random.gumbel(fold_in(key(seed), position), (V,))[id]`,
bit by bit up to the logarithm of the platform. Arrays of any shape; no Pallas in here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
SMALLEST_UNIFORM = np.finfo(np.float32).tiny
# Uniforms are multiples of 2^-23 below 1, so the noise has a largest value, -log(-log(1 - 2^-23)) = 15.943:
# a token that lies further than this behind another with its noise cannot be drawn.
LARGEST_NOISE = 15.95
SMALLEST_NOISE = -4.48  # -log(-log(tiny))


def row_keys(seed_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The generator's key of each row, uint32 [B, 2], from its seed and its token's position (int32)."""

    def row_key(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))

    return jax.vmap(row_key)(seed_B, position_B)


def random_bits(key_0: jax.Array, key_1: jax.Array, index: jax.Array) -> jax.Array:
    """32 random bits for each index (uint32), under one key of two uint32 scalars."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ PARITY)
    x, y = jnp.full_like(index, key_0), index + key_1
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x = x + keys[(group + 1) % 3]
        y = y + (keys[(group + 2) % 3] + np.uint32(group + 1))
    return x ^ y


def gumbel(key_0: jax.Array, key_1: jax.Array, index: jax.Array) -> jax.Array:
    """Standard Gumbel noise, float32, for each index (uint32)."""
    bits = (random_bits(key_0, key_1, index) >> np.uint32(9)) | np.uint32(0x3F800000)
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0  # 23 random bits in [0, 1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, SMALLEST_UNIFORM)))
