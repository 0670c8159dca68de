"""What others' attention kernels take on the shapes of ours: cuDNN and FlashAttention 3, from JAX.

    python scripts/kernel_peers.py

Decode through flash_attn3_jax on the same paged pool, for several numbers of splits, the best of which
counts; prompts through it and through cuDNN. A peer that cannot be imported or that refuses a shape is told
with its reason. One JSON line a figure, as it comes. bench_kernels.py has our own figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import kernel_bench_decode
import kernel_bench_prefill
from bench_kernels import Case, time_kernel
from kernel_bench_decode import DECODE_BENCHES, DecodeBench
from kernel_bench_prefill import PREFILL_BENCHES, PrefillBench

DECODES = ("32 rows of 4k", "1 row of 4k", "64 rows of 1k", "256 rows of 1k")
SPLITS = (1, 2, 4, 8, 16)


def tell(peer: str, bench: Any, seconds: float, **facts: Any) -> None:
    rates = {"us": 1e6 * seconds, "tb_per_s": bench.moved_bytes / seconds / 1e12}
    rates["tflops"] = bench.num_flops / seconds / 1e12
    print(json.dumps({"peer": peer, "case": bench.name, **rates, **facts}), flush=True)


def attempt(peer: str, bench: Any, measure: Callable[[], float], **facts: Any) -> None:
    """A peer's refusal is a figure too. Libraries of others raise whatever they like."""
    try:
        tell(peer, bench, measure(), **facts)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps({"peer": peer, "case": bench.name, "failed": reason, **facts}), flush=True)


def run_decode(fa3: Any, bench: DecodeBench, num_calls: int) -> None:
    arguments, options = kernel_bench_decode.make_arguments(bench, jax.random.key(0))
    q_RNH, kv, table_XW, _, kv_len_R = arguments
    for num_splits in SPLITS:

        def attend(q_R1NH: Any, k: Any, v: Any, table: Any, kv_len: Any, num_splits: int = num_splits) -> Any:
            return fa3.flash_mha_with_kvcache(
                q_R1NH,
                k,
                v,
                cache_seqlens=kv_len,
                page_table=table,
                num_splits=num_splits,
                softmax_scale=options["scale"],
            )

        given = (q_RNH[:, None], kv.k_PSKH, kv.v_PSKH, table_XW, kv_len_R)
        case = Case(group="peer", name=bench.name, arguments=given, options={}, moved_bytes=0, flops=0)
        measure = partial(time_kernel, attend, case, num_calls)
        attempt("flash_attn3_jax", bench, measure, num_splits=num_splits)


def run_prefill(fa3: Any, bench: PrefillBench, num_calls: int) -> None:
    """One prompt without a prefix, K and V side by side."""
    (q_TNH, kv, *_), options = kernel_bench_prefill.make_arguments(bench, jax.random.key(0))
    _, _, num_kv_heads, head_dim = kv.k_PSKH.shape
    k_1TKH, v_1TKH = (
        pool[1:].reshape(1, -1, num_kv_heads, head_dim)[:, : len(q_TNH)] for pool in (kv.k_PSKH, kv.v_PSKH)
    )
    given = (q_TNH[None], k_1TKH, v_1TKH)
    scale = options["scale"]
    peers: dict[str, Callable] = {
        "cudnn": partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn")
    }
    if fa3 is not None:
        peers["flash_attn3_jax"] = partial(fa3.flash_mha, softmax_scale=scale, is_causal=True)
    for peer, call in peers.items():
        case = Case(group="peer", name=bench.name, arguments=given, options={}, moved_bytes=0, flops=0)
        attempt(peer, bench, partial(time_kernel, call, case, num_calls))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=16, help="in one program [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="small forms of the shapes, to test the script")
    arguments = parser.parse_args()
    fa3 = None
    try:
        fa3 = importlib.import_module("flash_attn3_jax")
    except (ImportError, OSError) as error:
        print(json.dumps({"peer": "flash_attn3_jax", "failed": f"cannot be imported: {error}"}), flush=True)
    prompts = [b for b in PREFILL_BENCHES if b.num_runs == 1 and not b.prefix_tokens and b.window is None]
    prompts = [bench for bench in prompts if bench.kv_dtype == "bfloat16"]
    decodes = [bench for bench in DECODE_BENCHES if bench.name in DECODES]
    if arguments.tiny:
        prompts = [replace(bench, run_tokens=16, num_heads=2, num_kv_heads=1) for bench in prompts[:1]]
        decodes = []
    for bench in decodes if fa3 is not None else []:
        run_decode(fa3, bench, arguments.calls)
    for bench in prompts:
        run_prefill(fa3, bench, arguments.calls)


if __name__ == "__main__":
    main()
