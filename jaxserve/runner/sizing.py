"""Turns "auto" into numbers: one pure function from the settings, the model and the machine.

Called by blueprint.py. Plain Python: asks no device and allocates nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels_pallas.paged_attention.tpu_plan import TunedBlocks
from jaxserve.weights.saved_form import name_form

GIB = 1 << 30
PAGE_SIZE = {"tpu": 128, "gpu": 64, "cpu": 16}
MIN_ROWS = {"tpu": 8, "gpu": 8, "cpu": 1}  # of the smallest decode program
MAX_ROWS = {"tpu": 256, "gpu": 256, "cpu": 64}
MEMORY_SHARE = 0.88  # of a device for weights, pool and sampling state; the rest is for programs
CPU_KV_BYTES = 2 * GIB  # a laptop's share for the pool when nothing is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What sizing needs to know of the hardware."""

    platform: str  # "cpu", "gpu" or "tpu"
    num_devices: int
    memory_bytes: int  # of one device; of the machine on the CPU
    free_bytes: int  # before the weights are loaded
    compute_capability: str = ""  # of a GPU, as in "9.0"
    device_kind: str = ""  # as JAX calls it
    updates_bf16_in_place: bool = True  # or a step copies the whole pool, if it is bfloat16
    tuned: tuple[TunedBlocks, ...] = ()  # sizes of kernels' blocks that were timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    dtype: str  # of weights that are not quantised: "float32" or "bfloat16"
    quantization: str  # "none", "int8", "fp8" or "int4"
    kv_dtype: str

    @property
    def served_as(self) -> str:
        return name_form(self.dtype, self.quantization)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    context_length: int
    page_size: int
    num_pages: int  # the trash page included
    max_rows: int
    chunk_tokens: int
    mixed_chunk_tokens: int  # in a step that has decode rows too
    min_rows: int  # of the smallest decode program
    mixes: bool  # whether decode rows and prefill share a program

    @property
    def num_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def table_width(self) -> int:
        return math.ceil(self.context_length / self.page_size)


def choose_precision(
    config: ServerConfig, machine: Machine, checkpoint_bits: float, *, reads_packed: bool = False
) -> Precision:
    """Types of weights and pool. `checkpoint_bits` is what a weight takes in the files, on average.

    A checkpoint of 8 bits or fewer (8.6 with scales and metadata) is served in int8 on the CPU, where
    that is the fastest product and loses little that the file has not lost already. One that is packed in 4
    bits stays so where a kernel reads it (`reads_packed`). Nothing else is quantised unasked.
    """
    quantization = config.quantization
    if quantization == "auto":
        quantization = "int8" if machine.platform == "cpu" and checkpoint_bits < 12 else "none"
        if reads_packed:
            quantization = "int4"
    dtype = choose_dtype(config, checkpoint_bits)
    kv_dtype = config.kv_cache_dtype
    if kv_dtype == "auto":
        kv_dtype = dtype if machine.updates_bf16_in_place else "float32"
    return Precision(dtype=dtype, quantization=quantization, kv_dtype=kv_dtype)


def choose_dtype(config: ServerConfig, checkpoint_bits: float) -> str:
    """The type of weights that are not quantised."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if checkpoint_bits > 24 else "bfloat16"


def keep_form(config: ServerConfig, *, dtype: str, quantization: str) -> ServerConfig:
    """The settings for a model that was converted to these types. Raises ConfigError where a flag asks for
    others: what is not in the folder cannot be had from it."""
    for name, saved in (("dtype", dtype), ("quantization", quantization)):
        wanted = getattr(config, name)
        if wanted not in ("auto", saved):
            raise ConfigError(
                f"{name} is {wanted}, and {config.model_path} was converted with {name} {saved}. Leave the "
                "flag out, or convert the model again.",
                param=name,
            )
    return replace(config, dtype=dtype, quantization=quantization)


def check_devices(config: ServerConfig, machine: Machine) -> None:
    """Raise ConfigError for more devices than there are. They are those of one engine of dp_size."""
    if config.tp_size > machine.num_devices:
        remedy = "Lower it, or make more devices visible to this process."
        if machine.platform == "cpu":
            remedy = (
                "To try it out, let JAX see the CPU as so many: set JAX_NUM_CPU_DEVICES="
                f"{config.tp_size} or XLA_FLAGS=--xla_force_host_platform_device_count={config.tp_size}."
            )
        raise ConfigError(
            f"tp_size is {config.tp_size}, and JAX finds {machine.num_devices} "
            f"{machine.platform} device{'s' if machine.num_devices > 1 else ''}. {remedy}",
            param="tp_size",
        )


def share_machine(machine: Machine, num_devices: int) -> Machine:
    """The machine as each of all engines' devices has it: several that are one CPU share its memory."""
    if machine.platform != "cpu":
        return machine
    return replace(
        machine,
        memory_bytes=machine.memory_bytes // num_devices,
        free_bytes=machine.free_bytes // num_devices,
    )


def choose_page_size(config: ServerConfig, platform: str) -> int:
    """Tokens of a page: what the platform's kernels read best, unless it is set."""
    return config.page_size or PAGE_SIZE[platform]


def choose_max_rows(config: ServerConfig, platform: str) -> int:
    """Sequences in one step, unless it is set."""
    return config.max_running_requests or MAX_ROWS[platform]


def choose_sizes(
    config: ServerConfig,
    machine: Machine,
    precision: Precision,
    *,
    model_context: int,
    param_bytes: int,
    kv_bytes_per_token: int,
    slot_bytes: int,
) -> Sizes:
    """Pool, rows and chunk, each from its flag or from the memory. Raises ConfigError if nothing fits.

    `slot_bytes` is what a running sequence costs beside its pages (sampling state). All bytes are of one
    device, those of `machine` too (`share_machine`).
    """
    platform = machine.platform
    context_length = config.context_length or model_context
    if context_length > model_context:
        raise ConfigError(
            f"context_length must be at most the model's own, {model_context}, got {context_length}.",
            param="context_length",
        )
    page_size = choose_page_size(config, platform)
    max_rows = choose_max_rows(config, platform)
    chunk_tokens, mixed_chunk_tokens = _choose_chunks(config, platform, context_length)
    num_tokens = config.max_total_tokens
    if num_tokens is None:
        budget = _pool_budget(config, machine, param_bytes) - (max_rows + 1) * slot_bytes
        most_pages = max(max_rows * math.ceil(context_length / page_size), 2)  # all rows full
        num_tokens = min(budget // kv_bytes_per_token, most_pages * page_size)
    elif num_tokens < 2 * page_size:
        raise ConfigError(
            f"max_total_tokens must hold at least two pages of {page_size} tokens, got {num_tokens}.",
            param="max_total_tokens",
        )
    num_pages = num_tokens // page_size
    if num_pages < 2:
        needed = 2 * page_size * kv_bytes_per_token + param_bytes + (max_rows + 1) * slot_bytes
        raise ConfigError(
            f"The KV pool would hold {max(num_tokens, 0)} tokens, less than two pages of {page_size}: the "
            f"model takes {param_bytes / GIB:.1f} GiB, {machine.free_bytes / GIB:.1f} GiB are free. At least "
            f"{needed / GIB:.1f} GiB are needed; raise mem_fraction_static, set max_total_tokens, lower "
            f"max_running_requests, or quantise the model.",
            param="mem_fraction_static",
        )
    return Sizes(
        context_length=context_length,
        page_size=page_size,
        num_pages=num_pages + 1,
        max_rows=max_rows,
        chunk_tokens=chunk_tokens,
        mixed_chunk_tokens=mixed_chunk_tokens,
        min_rows=min(MIN_ROWS[platform], max_rows),
        mixes=platform != "cpu",
    )


def _choose_chunks(config: ServerConfig, platform: str, context_length: int) -> tuple[int, int]:
    """Prefill tokens of a step, and of one with decode rows. A long chunk costs less a token, but whoever
    decodes waits for it: on two cores about 0.2 s for 256 tokens of a model of 0.5B."""
    chunk_tokens = config.chunked_prefill_size
    if chunk_tokens is None:
        most, most_mixed = (512, 256) if platform == "cpu" else (2048, 2048)
        return min(most, context_length), min(most_mixed, context_length)
    chunk_tokens = context_length if chunk_tokens == -1 else min(chunk_tokens, context_length)
    return chunk_tokens, chunk_tokens


def _pool_budget(config: ServerConfig, machine: Machine, param_bytes: int) -> int:
    """Bytes that the pool and the slots may take together. What others hold already is not ours to take."""
    if machine.platform == "cpu" and config.mem_fraction_static is None:
        share_bytes = CPU_KV_BYTES // (config.tp_size * config.dp_size)
        return min(share_bytes, (machine.free_bytes - param_bytes) // 2)
    wanted_bytes = int(machine.memory_bytes * (config.mem_fraction_static or MEMORY_SHARE))
    if machine.platform == "cpu":
        return min(wanted_bytes, machine.free_bytes) - param_bytes
    return wanted_bytes - (machine.memory_bytes - machine.free_bytes) - param_bytes
