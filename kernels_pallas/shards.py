"""What devices that run one step together tell each other, and which part of an axis each of them holds.

A step program is written as one device sees it: its heads, its MLP channels, its ids of the vocabulary
(models/sharding.py cuts them). Where the devices must agree, the program calls a method of `Shards`. For one
device these give their argument back, so that its programs hold nothing of this. Knows no mesh: whoever
compiles the program maps it over the devices of the axis `TENSOR` (weights/placement.py).

An axis of a length that the devices do not divide is cut as if it were longer: the last parts end early.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

TENSOR = "tensor"  # the mesh axis whose devices share each layer
# Numbers of a sum, up to about which hops take longer than bytes of float32 do (planning/chips.py has both).
MOST_EXACT_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Shards:
    """The devices that share a step. Every method but `count_own` is for use inside the step program."""

    num_devices: int = 1
    sends_bf16: bool = False  # outputs of many tokens, which halves the bytes

    def add(self, x: jax.Array) -> jax.Array:
        """The sum over the devices: an all-reduce."""
        return x if self.num_devices == 1 else jax.lax.psum(x, TENSOR)

    def add_outputs(self, y_TD: jax.Array) -> jax.Array:
        """The sum of what the devices' parts of a block add to the residual stream, in `output_dtype`."""
        return self.add(self.round_outputs(y_TD))

    def round_outputs(self, y_TD: jax.Array) -> jax.Array:
        """A device's part as it is sent, in `output_dtype`."""
        return y_TD.astype(self.output_dtype(*y_TD.shape))

    def output_dtype(self, num_tokens: int, width: int) -> jnp.dtype:
        """What a block's outputs are added up in: each device's part is rounded to it first."""
        is_rounded = self.sends_bf16 and num_tokens * width > MOST_EXACT_NUMBERS
        return jnp.dtype(jnp.bfloat16 if is_rounded else jnp.float32)

    def find_largest(self, x: jax.Array) -> jax.Array:
        """The largest over the devices, element by element."""
        return x if self.num_devices == 1 else jax.lax.pmax(x, TENSOR)

    def stack(self, x: jax.Array) -> jax.Array:
        """Every device's x, along a new first axis."""
        return x[None] if self.num_devices == 1 else jax.lax.all_gather(x, TENSOR)

    def join(self, x_BV: jax.Array) -> jax.Array:
        """The parts of all devices behind each other along the second axis, what sticks out included."""
        return x_BV if self.num_devices == 1 else jax.lax.all_gather(x_BV, TENSOR, axis=1, tiled=True)

    def count_own(self, length: int) -> int:
        """The size of a part, its end included that may stick out of the axis."""
        return -(-length // self.num_devices)

    def find_first(self, num_own: int) -> jax.Array | int:
        """The index in the whole axis of the first of a part of `num_own`, int32."""
        return 0 if self.num_devices == 1 else jax.lax.axis_index(TENSOR) * num_own

    def find_own(self, index: jax.Array, num_own: int) -> jax.Array:
        """Indices in the whole axis as indices in the part of `num_own`; `num_own`, so that reading and
        writing there can be left out, where another device has them."""
        if self.num_devices == 1:
            return index
        own = index - self.find_first(num_own)
        return jnp.where((own >= 0) & (own < num_own), own, num_own)


ONE_DEVICE = Shards()
