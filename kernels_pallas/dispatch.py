"""Which form of each kernel runs: decided once, from the platform, and told to the log.

Called once by the composition root. A model holds the chosen functions as one static value,
so nothing is looked up while a step runs and nothing falls back behind anyone's back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax

from jaxserve.kernels_pallas.kv_write import ref as kv_write_ref
from jaxserve.kernels_pallas.kv_write.limits import find_write_limit
from jaxserve.kernels_pallas.paged_attention import ref as paged_attention_ref
from jaxserve.kernels_pallas.paged_attention.decode_plan import find_decode_limit
from jaxserve.kernels_pallas.paged_attention.prefill_plan import find_prefill_limit
from jaxserve.kernels_pallas.sampling import ref as sampling_ref
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The operations on the paged pool, the choice of a token, and the name of their forms for the log.

    All are of one device's part: `shards` are the devices that share the model.
    """

    name: str
    rope_write: Callable
    paged_decode: Callable
    paged_prefill: Callable
    choose_tokens: Callable
    shards: Shards = ONE_DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTarget:
    """What kernels are to run on, and the pool that they are to read and write."""

    platform: str  # "cpu", "gpu" or "tpu"
    head_dim: int
    num_kv_heads: int  # of one device
    page_size: int
    kv_dtype: str
    compute_capability: str = ""  # of a GPU, as in "9.0"
    num_devices: int = 1  # that share each layer


XLA_KERNELS = KernelSet(
    name="xla",
    rope_write=kv_write_ref.rope_write,
    paged_decode=paged_attention_ref.paged_decode,
    paged_prefill=paged_attention_ref.paged_prefill,
    choose_tokens=sampling_ref.choose_tokens,
)


def choose_kernels(target: KernelTarget) -> KernelSet:
    """The kernels for a target. Devices that share the vocabulary choose their tokens in XLA's form."""
    kernels = _choose_for_one(target)
    if target.num_devices == 1:
        return kernels
    shards = Shards(target.num_devices)
    return replace(kernels, shards=shards, choose_tokens=partial(sampling_ref.choose_tokens, shards=shards))


def _choose_for_one(target: KernelTarget) -> KernelSet:
    """The kernels for a target: XLA's form serves every one, Pallas forms the GPUs they were built for.

    The name of the set says what was chosen, and why not where a GPU gets XLA's form. Raises ValueError for a
    platform that is none of ours.
    """
    if target.platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"no kernels are known for platform {target.platform!r}; use cpu, gpu or tpu")
    if target.platform != "gpu":
        return XLA_KERNELS
    limit = _find_gpu_limit(target)
    if limit:
        return replace(XLA_KERNELS, name=f"xla ({limit})")
    # Below jax 0.11 these imports fail, so they wait until they are known to be wanted.
    from jaxserve.kernels_pallas.kv_write.gpu import rope_write
    from jaxserve.kernels_pallas.paged_attention.gpu_decode import paged_decode
    from jaxserve.kernels_pallas.paged_attention.gpu_prefill import paged_prefill
    from jaxserve.kernels_pallas.sampling.gpu import choose_tokens

    write_limit = find_write_limit(target.head_dim, target.num_kv_heads, target.kv_dtype)
    decode_limit = find_decode_limit(target.head_dim, target.page_size, target.kv_dtype)
    prefill_limit = find_prefill_limit(target.head_dim, target.page_size, target.kv_dtype)
    limits = [limit for limit in (write_limit, decode_limit, prefill_limit) if limit]
    return KernelSet(
        name="mosaic" + "".join(f"; xla, as {limit}" for limit in limits),
        rope_write=XLA_KERNELS.rope_write if write_limit else rope_write,
        paged_decode=XLA_KERNELS.paged_decode if decode_limit else paged_decode,
        paged_prefill=XLA_KERNELS.paged_prefill if prefill_limit else paged_prefill,
        choose_tokens=choose_tokens,
    )


def _find_gpu_limit(target: KernelTarget) -> str:
    """Why no kernel of ours can run there; empty if one can."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} is older than 0.11"
    if target.compute_capability != "9.0":
        return f"compute capability {target.compute_capability} is not that of Hopper, 9.0"
    return ""
