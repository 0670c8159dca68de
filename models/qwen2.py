"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and the same forward pass.

Serves Qwen2ForCausalLM checkpoints with full attention. Reference: transformers, models/qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.hf_config import read_hf_config

Model = llama.Model
param_specs = llama.param_specs
divide = llama.divide


class Config:
    """Reads a Qwen2 config.json into the Llama family's Config."""

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> llama.Config:
        """Raises ValueError on a field this family does not know, sliding windows among them."""
        fields = read_hf_config(hf, supports={"use_sliding_window": (False,)}, ignores=QWEN2_IGNORES)
        return llama.Config(**fields, has_qkv_bias=True)


# They describe a sliding window, which use_sliding_window turns off.
QWEN2_IGNORES = frozenset({"sliding_window", "max_window_layers"})
