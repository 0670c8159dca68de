"""Reads the golden files beside it, and says how far logits are from them.

scripts/make_goldens.py and make_beam_goldens.py make the files with torch and transformers: logits in
float64, stored as float32, greedy ids and beams in float32. Tests of the families, of the engine and of the
server read them here. Knows nothing of jax or torch.

    manifest.json       how the files were made, and the tolerances
    prompts.json        the prompts for the real models: text, or chat messages
    tiny_<name>.npz     logits and greedy ids of a model of tests/tiny.py
    <real model>.json   prompt as rendered, its ids, 64 greedy ids and their text, for each of prompts.json
    <real model>.npz    the numbers that go with it
    beams_<real model>.json  what a beam search finds for some of prompts.json
    tiny_qwen2_5_vl.npz, .json  every stage of the model of tests/tiny_vl.py, made by make_vl_goldens.py
    picture.png         what the chat in tiny_qwen2_5_vl.json is about
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS_DIR = Path(__file__).parent

# Keys of "models" in the manifest, and the stems of the two files each has.
QWEN = "qwen2.5-coder-0.5b-instruct-q4_k_m"
SMOLLM2 = "smollm2-135m-instruct-q4_1"

TINY_PROMPT_LENGTHS = (1, 7, 33, 130)
TINY_BF16_PROMPT_LENGTH = 33

NUM_SUBSET_IDS = 1024
NUM_PROJECTIONS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyGolden:
    """One prompt on a tiny model: logits at every position, and a greedy continuation that ignores EOS."""

    prompt_ids: list[int]
    logits: np.ndarray  # float32 [tokens, vocabulary]
    bf16_logits: np.ndarray | None  # the same from torch in bfloat16, for one prompt of each model
    greedy_ids: list[int]
    runner_up_ids: list[int]  # the best id at each step but for the chosen one
    margins: (
        np.ndarray
    )  # float32 [steps], chosen minus runner-up logit; a near tie below the manifest's margin


@dataclass(frozen=True, slots=True, kw_only=True)
class RealGolden:
    """One prompt on a real model. Logits are those of the prompt's last token."""

    name: str
    topic: str
    messages: list[dict[str, str]] | None  # None for a raw prompt
    rendered: str  # the text that was tokenised: the chat template's output, or the raw prompt
    prompt_ids: list[int]
    greedy_ids: list[int]  # 64, EOS ignored
    greedy_text: str  # decoded with special tokens kept; may end inside a character
    runner_up_ids: list[int]
    margins: np.ndarray  # float32 [64]
    top_ids: np.ndarray  # int32 [64], best first
    top_logits: np.ndarray  # float32 [64]
    subset_logits: np.ndarray  # float32 [NUM_SUBSET_IDS], at subset_ids(vocabulary)
    bf16_subset_logits: np.ndarray  # the same from torch in bfloat16
    projections: np.ndarray  # float64 [NUM_PROJECTIONS], of all logits, see project()
    norm: float  # Euclidean norm of all logits


def read_manifest() -> dict[str, Any]:
    return json.loads((GOLDENS_DIR / "manifest.json").read_text(encoding="utf-8"))


def read_tiny_goldens(name: str) -> dict[int, TinyGolden]:
    """The goldens of tiny model `name` by prompt length in tokens."""
    with np.load(GOLDENS_DIR / f"tiny_{name}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    return {
        length: TinyGolden(
            prompt_ids=arrays[f"prompt_ids_{length}"].tolist(),
            logits=arrays[f"logits_{length}"],
            bf16_logits=arrays.get(f"bf16_logits_{length}"),
            greedy_ids=arrays[f"greedy_ids_{length}"].tolist(),
            runner_up_ids=arrays[f"runner_up_ids_{length}"].tolist(),
            margins=arrays[f"margins_{length}"],
        )
        for length in TINY_PROMPT_LENGTHS
    }


def read_beam_goldens(model: str) -> dict[str, Any]:
    """`beam_width`, `max_new_tokens`, `stop_id`, and in `prompts` the beams by prompt name, best first: each
    has `token_ids`, the stop id included, and `sum`, good to about 2e-4."""
    return json.loads((GOLDENS_DIR / f"beams_{model}.json").read_text(encoding="utf-8"))


def read_vl_facts() -> dict[str, Any]:
    """Of the tiny Qwen2.5-VL: `fingerprint`, `smallest_margins` by case, and `chat`, a question about
    picture.png: `text`, `rendered`, `grid`, `prompt_ids`, 32 `greedy_ids` and their `greedy_text`
    without special tokens. `page` is the same for what xLLM's page asks, until the model ends its reply."""
    return json.loads((GOLDENS_DIR / "tiny_qwen2_5_vl.json").read_text(encoding="utf-8"))


def read_real_goldens(model: str) -> dict[str, RealGolden]:
    """The goldens of QWEN or SMOLLM2 by prompt name, in the order of prompts.json."""
    prompts = json.loads((GOLDENS_DIR / "prompts.json").read_text(encoding="utf-8"))
    texts = json.loads((GOLDENS_DIR / f"{model}.json").read_text(encoding="utf-8"))
    with np.load(GOLDENS_DIR / f"{model}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    return {
        prompt["name"]: RealGolden(
            name=prompt["name"],
            topic=prompt["topic"],
            messages=prompt.get("messages"),
            rendered=texts[prompt["name"]]["rendered"],
            prompt_ids=texts[prompt["name"]]["prompt_ids"],
            greedy_ids=texts[prompt["name"]]["greedy_ids"],
            greedy_text=texts[prompt["name"]]["greedy_text"],
            runner_up_ids=arrays["runner_up_ids"][row].tolist(),
            margins=arrays["margins"][row],
            top_ids=arrays["top_ids"][row],
            top_logits=arrays["top_logits"][row],
            subset_logits=arrays["subset_logits"][row],
            bf16_subset_logits=arrays["bf16_subset_logits"][row],
            projections=arrays["projections"][row],
            norm=float(arrays["norms"][row]),
        )
        for row, prompt in enumerate(prompts)
    }


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest over rows of |got - want| / |want|, Euclidean norms along the last axis, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def subset_ids(vocab_size: int) -> np.ndarray:
    """The NUM_SUBSET_IDS ids, ascending and spread over the vocabulary, whose logits are stored in full."""
    return np.arange(NUM_SUBSET_IDS, dtype=np.int64) * vocab_size // NUM_SUBSET_IDS


def project(logits: np.ndarray) -> np.ndarray:
    """NUM_PROJECTIONS sums of all logits of one row [vocabulary] with fixed random signs, float64."""
    vocab_size = logits.shape[-1]
    # Raw PCG64 bits are the same in every NumPy release and on every machine.
    num_words = -(-NUM_PROJECTIONS * vocab_size // 64)
    raw = np.random.PCG64(20261122).random_raw(num_words).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=NUM_PROJECTIONS * vocab_size)
    signs = bits.reshape(NUM_PROJECTIONS, vocab_size).astype(np.float32) * 2 - 1
    return signs.astype(np.float64) @ logits.astype(np.float64)


def projected_relative_error(logits: np.ndarray, golden: RealGolden) -> float:
    """Estimates relative_error of one row over the whole vocabulary, of which only a part is stored.

    A sum of errors with random signs has the mean square of the sum of their squares, so the root mean
    square of the projections' errors estimates the norm of all errors (within about 13 % for 32 of them).
    """
    difference = project(logits) - golden.projections
    return float(np.sqrt(np.mean(difference**2)) / golden.norm)
