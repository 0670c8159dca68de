"""transformers' own generation on this card: decode and prefill tokens a second, random weights of a shape.

    PYTHON_WITH_TORCH scripts/peer_generation.py --model-path benchmarks/shapes/qwen2.5-7b

Twice for each number of sequences: `generate` over one padded batch, and `generate_batch`, the paged KV cache
with continuous batching; that one with FlashAttention where transformers finds it, and otherwise with torch's
attention under a mask, which is slow with many sequences. The rate of decoding is that of all new tokens but
the first over the time that a run with them takes longer than a run with one. One JSON line a figure, as it
comes. Knows nothing of jaxserve.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports] - of another interpreter
import transformers

BLOCK_TOKENS = 256


def make_model(model_path: Path, device: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(str(model_path))
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(run: Callable[[int], None], num_sequences: int, prompt_tokens: int, new_tokens: int) -> dict:
    def time_run(count: int) -> float:
        start_s = time.perf_counter()
        run(count)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start_s

    time_run(4)  # warm
    first_s, all_s = time_run(1), time_run(new_tokens)
    decode_s = all_s - first_s
    return {
        "sequences": num_sequences,
        "prompt_tokens": prompt_tokens,
        "prefill_tps": num_sequences * prompt_tokens / first_s,
        "decode_tps": num_sequences * (new_tokens - 1) / decode_s if decode_s > 0 else None,
        "job_tps": num_sequences * new_tokens / all_s,
    }


def generate_padded(model: Any, prompts: list[list[int]], num_new: int) -> None:
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=make_settings(num_new),
        )


def generate_paged(model: Any, prompts: list[list[int]], num_new: int) -> None:
    """The first call makes what runs the batches, and for so many sequences at most."""
    outputs = model.generate_batch(
        prompts,
        generation_config=make_settings(num_new),
        continuous_batching_config=make_batching(prompts),
        progress_bar=False,
        persistent_manager=True,
    )
    lengths = [len(output.generated_tokens) for output in outputs.values()]
    if lengths != [num_new] * len(prompts):
        raise RuntimeError(f"{len(prompts)} sequences were to get {num_new} tokens each, and got {lengths}")


def make_batching(prompts: list[list[int]]) -> Any:
    """Twice the blocks that are needed, as some are kept free: left alone it takes all memory that is there.
    A prompt is computed each time, not found in the cache of an earlier run."""
    blocks_per_sequence = max(map(len, prompts)) // BLOCK_TOKENS + 2
    return transformers.ContinuousBatchingConfig(
        block_size=BLOCK_TOKENS,
        num_blocks=2 * len(prompts) * blocks_per_sequence,
        max_batch_tokens=8192,
        allow_block_sharing=False,
    )


def make_settings(num_new: int) -> Any:
    return transformers.GenerationConfig(
        max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256], metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()
    model = make_model(arguments.model_path, device)
    version = f"{transformers.__version__}, torch {torch.__version__}"
    ways = {"transformers, paged": generate_paged, "transformers": generate_padded}
    for num_sequences in arguments.sequences:
        shape = (num_sequences, arguments.prompt_tokens)
        prompts = torch.randint(model.config.vocab_size // 2, shape).tolist()
        for peer, generate in ways.items():
            told = {"peer": peer, "version": version}
            try:
                told |= measure(
                    lambda count: generate(model, prompts, count),  # noqa: B023 - run at once
                    num_sequences,
                    arguments.prompt_tokens,
                    arguments.new_tokens,
                )
            except Exception as error:  # of others' libraries, which raise whatever they like
                told |= {"sequences": num_sequences, "failed": f"{type(error).__name__}: {error}"[:200]}
            print(json.dumps(told), flush=True)
        model.destroy_cached_continuous_batching_manager()


if __name__ == "__main__":
    main()
