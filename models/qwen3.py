"""Qwen3: Llama with a norm on each head of q and of k before their rotation, and the same forward pass.

Serves dense Qwen3ForCausalLM checkpoints with full attention (0.6B to 32B, and their Thinking and Instruct
releases). Mixtures of experts are in qwen3_moe.py. Reference: transformers, models/qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import llama
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.qwen2 import QWEN2_IGNORES

Model = llama.Model
param_specs = llama.param_specs
divide = llama.divide


class Config:
    """Reads a Qwen3 config.json into the Llama family's Config."""

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> llama.Config:
        """Raises ValueError on a field this family does not know, sliding windows among them."""
        supports = {"use_sliding_window": (False,), "attention_bias": (False,)}
        fields = read_hf_config(hf, supports=supports, ignores=QWEN2_IGNORES)
        return llama.Config(**fields, has_head_norms=True)
