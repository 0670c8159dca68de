"""transformers on torch as a worker of bench_peers.py: bfloat16, one batch at a time through `generate`.

    PYTHON_WITH_TORCH scripts/peer_transformers.py --model model.gguf --cache FOLDER

The weights are those of the GGUF file, dequantised by transformers on the first run (about a minute) and kept
in FOLDER as safetensors. Prompts of different lengths are padded on the left. A token arrives when `generate`
asks whether to stop after it. Knows nothing of jaxserve.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports] - of another interpreter
import transformers
from bench_workload import Arrival, Batch, answer_batches


class Clock:
    """A stopping criterion that never stops but notes when each token of the batch came."""

    def __init__(self, num_sequences: int):
        self._go_on = torch.zeros(num_sequences, dtype=torch.bool)
        self.times_s: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_facts: Any) -> Any:
        self.times_s.append(time.perf_counter())
        return self._go_on


def run_batch(model: Any, batch: Batch) -> list[Arrival]:
    width = max(len(prompt) for prompt in batch.prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch.prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch.prompts])
    clock = Clock(len(batch.prompts))
    start_s = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(batch.num_new_tokens),
            do_sample=False,
            eos_token_id=batch.stop_ids or None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
    new_ids = tokens[:, width:].tolist()
    ends = [
        count_tokens(row, count, batch.stop_ids)
        for row, count in zip(new_ids, batch.num_new_tokens, strict=True)
    ]
    return [
        (at_s - start_s, sequence, 1)
        for step, at_s in enumerate(clock.times_s)
        for sequence, end in enumerate(ends)
        if step < end
    ]


def count_tokens(row: list[int], at_most: int, stop_ids: list[int]) -> int:
    """Up to and with the first stop."""
    stops = [index + 1 for index, token_id in enumerate(row) if token_id in stop_ids]
    return min([at_most, *stops])


def load_model(gguf_path: Path, cache: Path) -> Any:
    """From the cache if it is there; else dequantised, and left there."""
    if not (cache / "config.json").exists():
        # Newer releases keep the blocks packed unless told otherwise; older ones know nothing else.
        config_class = getattr(transformers, "GgufConfig", None)
        dense = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.bfloat16, **dense
        )
        unfinished = cache.with_name(f"{cache.name}.unfinished")
        model.save_pretrained(unfinished)
        unfinished.rename(cache)
    return transformers.AutoModelForCausalLM.from_pretrained(str(cache), dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a .gguf file")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the dequantised weights")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    model = load_model(arguments.model, arguments.cache).eval()
    model.generation_config = transformers.GenerationConfig()
    ready = {
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
    }
    answer_batches(ready, lambda batch: run_batch(model, batch))


if __name__ == "__main__":
    main()
