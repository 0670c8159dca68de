"""From the architecture name in a config.json to the family file that serves it, imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

FAMILY_BY_ARCHITECTURE: Mapping[str, str] = {
    "LlamaForCausalLM": "jaxserve.models.llama",
    "Qwen2ForCausalLM": "jaxserve.models.qwen2",
    "Qwen3ForCausalLM": "jaxserve.models.qwen3",
    "Qwen3MoeForCausalLM": "jaxserve.models.qwen3_moe",
    "Qwen2_5_VLForConditionalGeneration": "jaxserve.models.qwen2_5_vl",
}


def find_family(hf_config: Mapping[str, Any]) -> Any:
    """The family module for the first known name of hf_config["architectures"].

    Raises ValueError naming what the checkpoint is and what is served.
    """
    names = hf_config.get("architectures") or []
    for name in names:
        if name in FAMILY_BY_ARCHITECTURE:
            return importlib.import_module(FAMILY_BY_ARCHITECTURE[name])
    known = ", ".join(FAMILY_BY_ARCHITECTURE)
    raise ValueError(f"architecture {', '.join(names) or '(none named)'} is not served; known: {known}")
