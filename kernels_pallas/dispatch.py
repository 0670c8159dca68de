"""Which form of each kernel runs: decided once, from the platform, and told to the log.

Called once by the composition root. A model holds the chosen functions as one static value,
so nothing is looked up while a step runs and nothing falls back behind anyone's back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax

from jaxserve.kernels_pallas.add_norm import ref as add_norm_ref
from jaxserve.kernels_pallas.attention_block.ref import BlockForm, RowsForm
from jaxserve.kernels_pallas.grouped_matmul.limits import (
    LEAST_GPU_ROWS,
    LEAST_TPU_ROWS,
    MOST_GPU_ROWS,
    MOST_TPU_ROWS,
    ExpertShape,
    find_gpu_limit,
    find_tpu_limit,
)
from jaxserve.kernels_pallas.grouped_matmul.ref import GroupedForm
from jaxserve.kernels_pallas.int4_matmul import ref as int4_matmul_ref
from jaxserve.kernels_pallas.kv_layer import make_layer
from jaxserve.kernels_pallas.kv_pages import make_pages
from jaxserve.kernels_pallas.kv_write import ref as kv_write_ref
from jaxserve.kernels_pallas.kv_write.limits import find_write_limit
from jaxserve.kernels_pallas.paged_attention import ref as paged_attention_ref
from jaxserve.kernels_pallas.paged_attention.decode_plan import find_decode_limit
from jaxserve.kernels_pallas.paged_attention.prefill_plan import find_prefill_limit
from jaxserve.kernels_pallas.paged_attention.tpu_plan import ANOTHER_CHIP, CHIPS, TunedBlocks, find_limit
from jaxserve.kernels_pallas.round_rows import ref as round_rows_ref
from jaxserve.kernels_pallas.round_rows.ref import RoundRows
from jaxserve.kernels_pallas.row_blocks import BLOCK_ROWS
from jaxserve.kernels_pallas.sampling import ref as sampling_ref
from jaxserve.kernels_pallas.shards import ONE_DEVICE, Shards
from jaxserve.kernels_pallas.stacked_matmul.ref import StackedForm

# Rows that a TPU takes at a time, whose code grows with them; 8 are one tile. Drawing is done for more, since
# devices that share the vocabulary wait for each other in every block.
TPU_BLOCK_ROWS = 8
TPU_DRAWN_ROWS = 16
# Tokens of prefill, from which on a step goes through the layers in two halves where TPUs share a layer
# (models/layer_loop.py): products of 512 tokens still take longer than their weights take to arrive.
LEAST_HALVED_TOKENS = 1024
# The fewest devices whose sums the compiler lets go on beside products. A v5p and a v6e want an option for it
# that waits for a chip (runner/xla_flags.py); of four devices each then.
LEAST_HALVING_DEVICES = {"TPU v5 lite": 2, "TPU7x": 8}
# More than a step has: each turn of a loop on a GPU waits until the host has read whether there is another.
GPU_BLOCK_ROWS = 4096
DRAWN_ROWS = {"cpu": BLOCK_ROWS, "gpu": GPU_BLOCK_ROWS, "tpu": TPU_DRAWN_ROWS}


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The operations on the paged pool, the choice of a token, and the name of their forms for the log.

    All are of one device's part: `shards` are the devices that share the model. `make_kv(num_pages,
    page_size, num_kv_heads, head_dim, kv_dtype)` makes a layer of the pool as they read it.
    """

    name: str
    rope_write: Callable
    paged_decode: Callable
    paged_prefill: Callable
    choose_tokens: Callable
    shards: Shards = ONE_DEVICE
    make_kv: Callable = make_layer
    begin_sum: Callable = add_norm_ref.begin_sum  # of the residual stream
    add_norm: Callable = add_norm_ref.add_norm
    int4_matmul: Callable = int4_matmul_ref.int4_matmul
    round_rows: RoundRows = round_rows_ref.round_rows  # of activations, for products of int8
    stacked: StackedForm | None = None  # products that read bf16 in a stack of layers; None: all cut it out
    attend_rows: RowsForm | None = None  # write and attention of decode rows, in one launch; None: in two
    attention_block: BlockForm | None = None  # of few decode rows, in one launch; None: part by part
    grouped_matmul: GroupedForm | None = None  # by matrices of experts; None where a loop has each run
    list_step_work: Callable | None = None  # of attention, for all layers at once; None where there is no use
    least_halved_tokens: int | None = None  # see `halves`; None: never
    block_rows: int = BLOCK_ROWS  # that logits are edited and scored for at a time

    @property
    def reads_int4(self) -> bool:
        """Whether products read 4-bit matrices as they are packed; XLA's form makes them bf16 first."""
        return self.int4_matmul is not int4_matmul_ref.int4_matmul

    def halves(self, num_tokens: int) -> bool:
        """Whether a step of so many prefill tokens goes through the layers in two halves."""
        return self.least_halved_tokens is not None and num_tokens >= self.least_halved_tokens


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
    dtype: str = "bfloat16"  # that the model is served in
    device_kind: str = ""  # as JAX calls it: which chip the sizes of a TPU's blocks are for
    experts: ExpertShape | None = None  # of a model that has any
    tuned: tuple[TunedBlocks, ...] = ()  # sizes that were timed, of any chip


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
    sends_bf16 = target.platform != "cpu" and target.dtype == "bfloat16"
    shards = Shards(target.num_devices, sends_bf16)
    drawn_rows = DRAWN_ROWS[target.platform]
    choose_tokens = partial(sampling_ref.choose_tokens, shards=shards, block_rows=drawn_rows)
    # Of a mixture's experts each has few tokens, and would be read for both halves.
    least_devices = LEAST_HALVING_DEVICES.get(target.device_kind, math.inf)
    may_halve = target.num_devices >= least_devices and target.experts is None
    least_tokens = LEAST_HALVED_TOKENS if may_halve else None
    return replace(kernels, shards=shards, choose_tokens=choose_tokens, least_halved_tokens=least_tokens)


def _choose_for_one(target: KernelTarget) -> KernelSet:
    """The kernels for a target: XLA's form serves every one, Pallas forms the chips they were built for.

    The name of the set says what was chosen, and why not where a GPU or TPU gets XLA's form. Raises
    ValueError for a platform that is none of ours.
    """
    if target.platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"no kernels are known for platform {target.platform!r}; use cpu, gpu or tpu")
    if target.platform == "tpu":
        return _choose_for_tpu(target)
    if target.platform == "cpu":
        return XLA_KERNELS
    limit = _find_gpu_limit(target.compute_capability)
    if limit:
        choose_tokens = partial(sampling_ref.choose_tokens, block_rows=GPU_BLOCK_ROWS)
        name = f"xla ({limit})"
        return replace(XLA_KERNELS, name=name, choose_tokens=choose_tokens, block_rows=GPU_BLOCK_ROWS)
    # Below jax 0.11 these imports fail, so they wait until they are known to be wanted.
    from jaxserve.kernels_pallas.grouped_matmul.gpu import grouped_matmul
    from jaxserve.kernels_pallas.int4_matmul.gpu import int4_matmul
    from jaxserve.kernels_pallas.kv_write.gpu import rope_write
    from jaxserve.kernels_pallas.paged_attention.gpu_decode import paged_decode
    from jaxserve.kernels_pallas.paged_attention.gpu_prefill import paged_prefill
    from jaxserve.kernels_pallas.sampling.gpu import choose_tokens

    write_limit = find_write_limit(target.head_dim, target.num_kv_heads, target.kv_dtype)
    decode_limit = find_decode_limit(target.head_dim, target.page_size, target.kv_dtype)
    prefill_limit = find_prefill_limit(target.head_dim, target.page_size, target.kv_dtype)
    grouped_limit = find_gpu_limit(target.experts) if target.experts else ""
    limits = [limit for limit in (write_limit, decode_limit, prefill_limit, grouped_limit) if limit]
    grouped_form = GroupedForm(grouped_matmul, LEAST_GPU_ROWS, MOST_GPU_ROWS)
    return KernelSet(
        name="mosaic" + "".join(f"; xla, as {limit}" for limit in limits),
        rope_write=XLA_KERNELS.rope_write if write_limit else rope_write,
        paged_decode=XLA_KERNELS.paged_decode if decode_limit else paged_decode,
        paged_prefill=XLA_KERNELS.paged_prefill if prefill_limit else paged_prefill,
        choose_tokens=choose_tokens,
        int4_matmul=int4_matmul,
        grouped_matmul=grouped_form if target.experts and not grouped_limit else None,
        block_rows=GPU_BLOCK_ROWS,
    )


def _choose_for_tpu(target: KernelTarget) -> KernelSet:
    """All or none, since they share a layout of the pool."""
    limit = find_limit(target.head_dim, target.page_size, target.kv_dtype)
    if limit:
        return replace(XLA_KERNELS, name=f"xla ({limit})")
    # Pallas for TPUs takes a second to import, so it waits until it is known to be wanted.
    from jaxserve.kernels_pallas.add_norm.tpu import add_norm, begin_sum
    from jaxserve.kernels_pallas.attention_block.tpu import make_form as make_block_form
    from jaxserve.kernels_pallas.attention_block.tpu_attend import make_rows_form
    from jaxserve.kernels_pallas.grouped_matmul.tpu import grouped_matmul
    from jaxserve.kernels_pallas.kv_write.tpu import rope_write
    from jaxserve.kernels_pallas.paged_attention.tpu_decode import paged_decode
    from jaxserve.kernels_pallas.paged_attention.tpu_prefill import paged_prefill
    from jaxserve.kernels_pallas.paged_attention.tpu_step import list_step_work
    from jaxserve.kernels_pallas.round_rows.tpu import round_rows
    from jaxserve.kernels_pallas.stacked_matmul.tpu import make_form

    tuned = tuple(row for row in target.tuned if row.device_kind == target.device_kind)
    chip = replace(CHIPS.get(target.device_kind, ANOTHER_CHIP), tuned=tuned)
    unknown = (
        "" if target.device_kind in CHIPS else f"; no figures of {target.device_kind!r}, so others' sizes"
    )
    grouped_limit = find_tpu_limit(target.experts) if target.experts else ""
    multiply = partial(grouped_matmul, widens_int8=not chip.multiplies_int8)
    grouped_form = GroupedForm(multiply, LEAST_TPU_ROWS, MOST_TPU_ROWS)
    return KernelSet(
        name=f"pallas{unknown}" + (f"; xla, as {grouped_limit}" if grouped_limit else ""),
        rope_write=rope_write,
        paged_decode=partial(paged_decode, chip=chip),
        paged_prefill=partial(paged_prefill, chip=chip),
        choose_tokens=partial(sampling_ref.choose_tokens, block_rows=TPU_DRAWN_ROWS),
        make_kv=make_pages,
        begin_sum=begin_sum,
        add_norm=add_norm,
        round_rows=round_rows,
        stacked=make_form(chip.num_cores, chip.bytes_per_s),
        attend_rows=make_rows_form(chip),
        attention_block=make_block_form(chip),
        grouped_matmul=grouped_form if target.experts and not grouped_limit else None,
        list_step_work=partial(list_step_work, chip=chip),
        block_rows=TPU_BLOCK_ROWS,
    )


def has_int4_kernel(platform: str, compute_capability: str) -> bool:
    """Whether `choose_kernels` finds one there that reads 4-bit matrices as they are packed."""
    return platform == "gpu" and not _find_gpu_limit(compute_capability)


def _find_gpu_limit(compute_capability: str) -> str:
    """Why no kernel of ours can run on such a GPU; empty if one can."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} is older than 0.11"
    if compute_capability != "9.0":
        return f"compute capability {compute_capability} is not that of Hopper, 9.0"
    return ""
