"""The contents of a config.json, made out of a GGUF file's metadata. Called by resolve.py.

GGUF names the same facts differently ("llama.block_count" for num_hidden_layers). Families then read one
kind of config, whatever the file. Knows nothing of tensors but their shapes, and of one small one: the
rotary factors that stand in for Llama 3's rope scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.weights.gguf import GgufFile

# GGUF architecture -> (Hugging Face class, model_type). Mistral's files call themselves llama.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

ROPE_FACTORS_TENSOR = "rope_freqs.weight"


def hf_config_of(file: GgufFile) -> dict[str, Any]:
    """A config.json's dict in Hugging Face key names. Raises WeightError naming what is missing or odd.

    `vocab_size` is the embedding's number of rows, and the output is tied when the file has no output
    matrix. Scaled rotary embeddings become `rope_scaling` (see `_rope_scaling`).
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise WeightError(
            f"{file.path} holds a model of architecture {architecture!r}; GGUF files of these are served: "
            f"{', '.join(_ARCHITECTURES)}."
        )
    class_name, model_type = _ARCHITECTURES[architecture]
    if _number(file, f"{architecture}.expert_count", default=0):
        raise WeightError(f"{file.path} holds a mixture of experts, which is not served from GGUF files.")
    hidden_size = _integer(file, f"{architecture}.embedding_length")
    num_heads = _integer(file, f"{architecture}.attention.head_count")
    head_dim = _integer(file, f"{architecture}.attention.key_length", default=hidden_size // num_heads)
    rope_theta = _number(file, f"{architecture}.rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": _integer(file, f"{architecture}.feed_forward_length"),
        "num_hidden_layers": _integer(file, f"{architecture}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(file, f"{architecture}.attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _number(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(file, architecture, rope_theta, head_dim),
        "max_position_embeddings": _integer(file, f"{architecture}.context_length"),
        "vocab_size": _embedding_rows(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    for key, gguf_key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token_id = file.metadata.get(f"tokenizer.ggml.{gguf_key}_token_id")
        if isinstance(token_id, int):
            config[key] = token_id
    return config


def generation_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The end-of-sequence ids where the file names several (end of text, of turn, of message), else {}."""
    keys = ("eos", "eot", "eom")
    found = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    end_ids = list(dict.fromkeys(token_id for token_id in found if isinstance(token_id, int)))
    return {"eos_token_id": end_ids} if len(end_ids) > 1 else {}


def _embedding_rows(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightError(f"{file.path} has no tensor token_embd.weight: it is not a whole language model.")
    return embedding.shape[0]


def _integer(file: GgufFile, key: str, default: int | None = None) -> int:
    value = _number(file, key, default)
    if value != int(value) or value <= 0:
        raise WeightError(f"{key} of {file.path} must be a positive whole number, got {value}.")
    return int(value)


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    """A metadata number. Some writers repeat a value once a layer; that is taken if all are the same."""
    value = file.metadata.get(key, default)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if value is None:
        raise WeightError(f"The metadata of {file.path} lacks {key}.")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise WeightError(f"{key} of {file.path} must be one number, got {value!r}.")
    # GGUF stores float32: 1e-6 comes back as 9.999999974752427e-07. The shortest decimal is what was meant.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(
    file: GgufFile, architecture: str, rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The config's rope_scaling: None, linear, yarn, or llama3.

    Llama 3 files carry one factor a frequency in a tensor instead of the rule's parameters. These are
    recovered from it, so that families need only the rule; see `llama3_rule_of`.
    """
    factors = file.tensors.get(ROPE_FACTORS_TENSOR)
    if factors is not None:
        return llama3_rule_of(file.dequantize_rows(factors, 0, factors.shape[0]), rope_theta, head_dim)
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = _number(file, f"{architecture}.rope.scaling.factor", default=0)
    if kind == "linear" and factor > 0:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 0:
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        original = file.metadata.get(f"{architecture}.rope.scaling.original_context_length")
        if isinstance(original, int):
            scaling["original_max_position_embeddings"] = original
        return scaling
    return None


def llama3_rule_of(factors: np.ndarray, rope_theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's rope_scaling from the factors that divide each rotary frequency ([head_dim // 2] floats).

    The rule (transformers, `_compute_llama3_parameters`) divides by 1 at short wavelengths and by `factor` at
    long ones. Between, 1 / divisor = (1 - s) / factor + s, where s = (original / wavelength - low) /
    (high - low): a straight line in 1 / wavelength, fixed by original / low and original / high. One of the
    three is free; low = 1, as in every Llama 3 release. Where no such line fits, the factors themselves
    are returned as {"rope_type": "explicit", "factors": [...]}, for a family to take or to refuse.
    """
    factors = factors.astype(np.float64)
    if np.all(factors == 1):
        return None
    explicit = {"rope_type": "explicit", "factors": factors.tolist()}
    factor = float(factors.max())
    if len(factors) != head_dim // 2 or not np.all(factors >= 1) or not math.isfinite(factor):
        return explicit
    inverse_wavelength = rope_theta ** (-np.arange(len(factors)) * 2 / head_dim) / (2 * math.pi)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    is_between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if is_between.sum() < 2:
        return explicit
    slope, intercept = np.polyfit(inverse_wavelength[is_between], smooth[is_between], 1)
    if slope <= 0 or intercept >= 0:
        return explicit
    high = round(float(1 - 1 / intercept), 3)
    original = round(float(slope) * (high - 1))
    refit = np.clip((original * inverse_wavelength - 1) / (high - 1), 0, 1)
    if not np.allclose((1 - refit) / factor + refit, 1 / factors, rtol=2e-3):
        return explicit
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
