"""Reads the golden token ids in tests/text/goldens/, which make_goldens.py beside it makes."""

from __future__ import annotations

import json
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def read_text_golden(name: str) -> dict:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def sentencepiece_metadata(golden: dict) -> dict[str, object]:
    """The golden vocabulary as a GGUF file would have it."""
    arrays = {f"tokenizer.ggml.{name}": golden[name] for name in ("tokens", "scores", "token_type")}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"tokenizer.ggml.model": "llama", **arrays, **{f"tokenizer.ggml.{k}": v for k, v in ids.items()}}
