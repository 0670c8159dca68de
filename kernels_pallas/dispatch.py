"""Which form of each kernel runs: decided once, from the platform, and told to the log.

Called once by the composition root. A model holds the chosen functions as one static value,
so nothing is looked up while a step runs and nothing falls back behind anyone's back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.kernels_pallas.kv_write import ref as kv_write_ref
from jaxserve.kernels_pallas.paged_attention import ref as paged_attention_ref


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The three operations that touch the paged pool, and the name of their form for the log."""

    name: str
    kv_write: Callable
    paged_decode: Callable
    paged_prefill: Callable


XLA_KERNELS = KernelSet(
    name="xla",
    kv_write=kv_write_ref.kv_write,
    paged_decode=paged_attention_ref.paged_decode,
    paged_prefill=paged_attention_ref.paged_prefill,
)


def choose_kernels(platform: str) -> KernelSet:
    """The kernels for a platform ("cpu", "gpu", "tpu"). XLA's form serves all three so far."""
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"no kernels are known for platform {platform!r}; use cpu, gpu or tpu")
    return XLA_KERNELS
