"""What this device can do at most: bytes a second of a copy, FLOPs a second of a product; and how to time.

    python scripts/device_rates.py

Every benchmark of kernels and steps measures these ceilings in its own process and gives its figures as
shares of them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

MOST_ROUND_S = 0.5  # of calls in a row, between two waits
NUM_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    copy_bytes_per_s: float  # read plus written
    matmul_flops: float  # a second

    def __str__(self) -> str:
        return (
            f"A copy moves {self.copy_bytes_per_s / 1e9:.0f} GB/s, a product of bf16 matrices does "
            f"{self.matmul_flops / 1e12:.1f} TFLOP/s."
        )


def measure_ceilings(copy_bytes: int, width: int) -> Ceilings:
    """Of a copy on the device, and of a product of two square bf16 matrices of random values."""
    x_N = jax.random.normal(jax.random.key(0), (copy_bytes // 2,), jnp.bfloat16)
    copy_s = time_calls(jax.jit(jnp.copy), x_N)
    del x_N
    keys = jax.random.split(jax.random.key(1))
    a_MK, b_KN = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys)
    matmul_s = time_calls(jax.jit(jnp.matmul), a_MK, b_KN)
    return Ceilings(copy_bytes_per_s=2 * copy_bytes / copy_s, matmul_flops=2 * width**3 / matmul_s)


def time_calls(call: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a call, of several rounds of calls in a row."""
    for _ in range(3):
        jax.block_until_ready(call(*arguments))
    start_s = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    count = max(1, min(50, int(MOST_ROUND_S / (time.perf_counter() - start_s))))
    rounds = []
    for _ in range(NUM_ROUNDS):
        start_s = time.perf_counter()
        for _ in range(count):
            result = call(*arguments)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start_s) / count)
    return statistics.median(rounds)


def add_ceiling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy-mib", type=int, default=4096, help="size of the copy [%(default)s]")
    parser.add_argument("--matmul-width", type=int, default=8192, help="of the product [%(default)s]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_ceiling_flags(parser)
    arguments = parser.parse_args()
    ceilings = measure_ceilings(arguments.copy_mib << 20, arguments.matmul_width)
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, **asdict(ceilings)}))


if __name__ == "__main__":
    main()
