"""What one step must move and multiply on one device, at the least: counted from shapes, nothing measured.

Bytes: every weight once, but of an embedding that is not also the head only the rows of the step's tokens,
and of experts as many as tokens would hit that choose at random; K and V of each row's context once, and
those written. FLOPs: two a weight and token (the head's for rows that sample, and of experts those of the
token), four a query head, channel and attended token. Collectives: a sum over the devices behind the two
products of a layer that are cut by columns, and behind the embedding; float32 or bf16, as they are sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.blueprint import ModelSketch
from jaxserve.kernels_pallas.shards import Shards
from jaxserve.models.interface import ParamSpec
from jaxserve.weights.served import count_served_bytes

SUMS_PER_LAYER = 2
OTHER_SUMS = 3  # behind the embedding, and two small ones that choose a token of a head that is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One step: `rows` decode rows that attend to `context` tokens each, or a chunk of prefill."""

    num_rows: int
    context: int  # tokens that a row attends to; of a chunk, those before it
    num_chunk_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Of one step on one device."""

    weight_bytes: int
    kv_bytes: int
    matmul_flops: float  # of products with weights
    attention_flops: float
    num_sums: int  # over the devices that share a layer
    sum_bytes: int  # of each

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def count_traffic(sketch: ModelSketch, work: StepWork) -> Traffic:
    """The least that a step of `work` takes on each of the sketch's devices."""
    cfg, tp_size = sketch.cfg, sketch.tp_size
    num_tokens = work.num_rows + work.num_chunk_tokens
    num_sampled = work.num_rows + (1 if work.num_chunk_tokens else 0)
    weight_bytes = matmul_flops = 0
    specs = [spec for spec in sketch.specs if not spec.path.startswith("vision.")]  # steps read text
    is_tied = not any(_is_head(spec) for spec in specs)
    for spec in specs:
        is_lookup = spec.kind == "embedding"
        read_share = 1.0 if not is_lookup or is_tied else min(1.0, num_tokens / spec.shape[0])
        chosen_share = cfg.num_chosen / spec.experts if spec.experts > 1 else 1.0
        read_share *= 1 - (1 - chosen_share) ** num_tokens if chosen_share < 1 else 1.0
        weight_bytes += int(read_share * _device_bytes(sketch, spec))
        if len(spec.shape) == 2 and (is_tied or not is_lookup):
            times = num_sampled if is_lookup or _is_head(spec) else num_tokens
            matmul_flops += 2 * times * chosen_share * spec.shape[0] * spec.shape[1] / tp_size
    # A chunk's token attends to what is before the chunk, and to half of the chunk.
    attended = work.num_rows * work.context
    attended += work.num_chunk_tokens * (work.context * (work.num_rows == 0) + work.num_chunk_tokens / 2)
    read_tokens = work.num_rows * work.context + (work.context if work.num_chunk_tokens else 0)
    shards = Shards(tp_size, sends_bf16=sketch.precision.dtype == "bfloat16")
    width = next(spec.shape[1] for spec in specs if spec.kind == "embedding")
    return Traffic(
        weight_bytes=weight_bytes,
        kv_bytes=(read_tokens + num_tokens) * sketch.kv_bytes_per_token,
        matmul_flops=matmul_flops,
        attention_flops=4 * cfg.num_layers * cfg.num_heads * cfg.head_dim * attended / tp_size,
        num_sums=SUMS_PER_LAYER * cfg.num_layers + OTHER_SUMS if tp_size > 1 else 0,
        sum_bytes=shards.output_dtype(num_tokens, width).itemsize * num_tokens * width,
    )


def _is_head(spec: ParamSpec) -> bool:
    return spec.kind == "matrix" and "vocab" in spec.axes


def _device_bytes(sketch: ModelSketch, spec: ParamSpec) -> int:
    precision = sketch.precision
    num_bytes = count_served_bytes([spec], dtype=precision.dtype, quantization=precision.quantization)
    return num_bytes // sketch.tp_size if any(spec.axes) else num_bytes
