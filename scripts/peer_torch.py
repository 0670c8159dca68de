"""What torch takes on this card for the shapes of our kernels: its attention, FlashInfer's, and sampling.

    PYTHON_WITH_TORCH scripts/peer_torch.py

Decode and prompts are torch's own attention over K and V side by side, by FlashAttention 2 and by cuDNN;
sampling is a sort. Then decode by FlashInfer where it can be imported, on pages of 64 in random order; it
compiles its kernels at their first use, hence last. Times are of a CUDA graph's replays, so that launches
cost nothing. One JSON line a figure, as it comes. Knows nothing of jaxserve.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch  # pyright: ignore[reportMissingImports] - of another interpreter
from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    scaled_dot_product_attention,
)

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 64
DECODES = [(32, 4096), (1, 4096), (64, 1024), (256, 1024)]  # rows, tokens each; as in kernel_bench_decode.py
PROMPTS = [8192, 2048]
# By name, as what torch prefers on a Hopper GPU changes with its version and cuDNN's.
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SAMPLED = (256, 151936)  # rows, vocabulary
NUM_CALLS, NUM_ROUNDS = 16, 7

Call = Callable[[], Any]


def time_graph(call: Call) -> float:
    """Median seconds of a call, of several replays of a graph of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_CALLS):
            call()
    rounds = []
    for _ in range(NUM_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(end) / 1000 / NUM_CALLS)
    return statistics.median(rounds)


def report(peer: str, case: str, num_bytes: int, flops: int, prepare: Callable[[], Call]) -> None:
    """A peer's refusal is a figure too. Libraries of others raise whatever they like."""
    try:
        seconds = time_graph(prepare())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps({"peer": peer, "case": case, "failed": reason}), flush=True)
        return
    figures = {"us": 1e6 * seconds, "tb_per_s": num_bytes / seconds / 1e12, "tflops": flops / seconds / 1e12}
    print(json.dumps({"peer": peer, "case": case, **figures}), flush=True)


def random_bf16(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def prepare_sdpa(backend: SDPBackend, num_rows: int, num_queries: int, kv_len: int) -> Call:
    q = random_bf16(num_rows, HEADS, num_queries, HEAD_DIM)
    k, v = (random_bf16(num_rows, KV_HEADS, kv_len, HEAD_DIM) for _ in "kv")

    def attend() -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, enable_gqa=True)

    return attend


def prepare_flashinfer(flashinfer: Any, num_rows: int, kv_len: int, has_tensor_cores: bool) -> Call:
    pages_per_row = -(-kv_len // PAGE_TOKENS)
    num_pages = num_rows * pages_per_row
    numbers = {"dtype": torch.int32, "device": "cuda"}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=has_tensor_cores,
        paged_kv_indptr_buffer=torch.zeros(num_rows + 1, **numbers),
        paged_kv_indices_buffer=torch.zeros(num_pages, **numbers),
        paged_kv_last_page_len_buffer=torch.zeros(num_rows, **numbers),
    )
    wrapper.plan(
        torch.arange(num_rows + 1, **numbers) * pages_per_row,
        torch.randperm(num_pages, **numbers),
        torch.full((num_rows,), (kv_len - 1) % PAGE_TOKENS + 1, **numbers),
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = random_bf16(num_rows, HEADS, HEAD_DIM)
    kv = random_bf16(num_pages, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    return partial(wrapper.run, q, kv)


def prepare_sampling(num_rows: int, vocab_size: int) -> Call:
    """top-k 50 and top-p 0.9 by a sort, as it is commonly written."""
    logits = 2 * torch.randn(num_rows, vocab_size, device="cuda")

    def sample() -> Any:
        values, ids = logits.sort(dim=-1, descending=True)
        probs = values[:, :50].softmax(dim=-1)
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs > 0.9, 0.0)
        noise = torch.empty_like(probs).exponential_()
        return ids.gather(1, (probs / noise).argmax(dim=-1, keepdim=True))

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here that torch could use.")
    run_torch()
    try:
        flashinfer = importlib.import_module("flashinfer")
    except (ImportError, OSError) as error:
        print(json.dumps({"peer": "flashinfer", "failed": f"cannot be imported: {error}"}), flush=True)
        return
    for num_rows, kv_len in DECODES:
        for has_tensor_cores in (True, False):
            peer = f"flashinfer{', tensor cores' if has_tensor_cores else ''}"
            prepare = partial(prepare_flashinfer, flashinfer, num_rows, kv_len, has_tensor_cores)
            report(peer, *describe_decode(num_rows, kv_len), prepare)


def run_torch() -> None:
    for name, backend in BACKENDS.items():
        for num_rows, kv_len in DECODES:
            prepare = partial(prepare_sdpa, backend, num_rows, 1, kv_len)
            report(f"torch {name}", *describe_decode(num_rows, kv_len), prepare)
        for length in PROMPTS:
            flops = 2 * length * (length + 1) * HEADS * HEAD_DIM
            num_bytes = 4 * length * (HEADS + KV_HEADS) * HEAD_DIM
            prepare = partial(prepare_sdpa, backend, 1, length, length)
            report(f"torch {name}", f"prompt of {length}", num_bytes, flops, prepare)
    rows, vocab_size = SAMPLED
    prepare = partial(prepare_sampling, rows, vocab_size)
    report("torch sort", "top-k 50, top-p 0.9", 4 * rows * vocab_size, 0, prepare)


def describe_decode(num_rows: int, kv_len: int) -> tuple[str, int, int]:
    """Its name, as in kernel_bench_decode.py, and its bytes and FLOPs."""
    name = f"{num_rows} row{'s' if num_rows > 1 else ''} of {kv_len // 1024}k"
    num_bytes = num_rows * (kv_len * KV_HEADS * 2 * 2 + HEADS * 6) * HEAD_DIM
    return name, num_bytes, 4 * num_rows * kv_len * HEADS * HEAD_DIM


if __name__ == "__main__":
    main()
