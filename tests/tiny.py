"""Tiny random models in Hugging Face layout: small enough for any test, awkward enough to catch mistakes.

Tests of the loader, the families, the runner and the server call `write_tiny_checkpoint`; the script that
makes the golden files calls it too, so both sides see the same weights. Knows nothing of jax, torch or
the serving code.

Every size that may differ from another does, so that a transposed or mixed-up axis cannot go unseen:

    name        width  heads  kv  head width       ffn  head      special
    llama          54      6   2  12 (not 54 / 6)   94  its own   llama3 rope scaling over 64 positions
    llama_tied     60      6   3  10                74  tied      no scaling, as SmolLM2
    qwen2          48      6   2  8                106  tied      biases on q, k and v
    qwen3          48      6   2  12 (not 48 / 6)   82  tied      norms on q and k
    qwen3_moe      54      6   2  10 (not 54 / 6)   38  its own   norms on q and k, 2 of 5 experts a token

A weight is a pure function of (model, seed, tensor name), drawn with integer arithmetic only, so that it is
the same bits on every machine and NumPy release; the golden files depend on that.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GGUF_NAMES = ("llama", "llama_tied", "qwen2", "qwen3")  # of families that are read from GGUF files, too
TINY_NAMES = (*GGUF_NAMES, "qwen3_moe")

BOS_ID = 1
EOS_IDS = (2, 3)

_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# config.json as the hub's own repositories spell it: `rope_theta` and `rope_scaling` at the top level.
_SHARED_CONFIG: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_IDS[0],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "rope_theta": 10000.0,
    "use_cache": True,
    "vocab_size": 307,
}
_LLAMA_CONFIG = _SHARED_CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_CONFIG
    | {
        "head_dim": 12,
        "hidden_size": 54,
        "intermediate_size": 94,
        "num_key_value_heads": 2,
        # Six frequencies with wavelengths 6, 29, 135, 628, ...: one below 64 / 4 is kept, one between
        # is blended, those above 64 / 1 are divided by 8. All three branches count.
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    },
    "llama_tied": _LLAMA_CONFIG
    | {
        "hidden_size": 60,
        "intermediate_size": 74,
        "num_key_value_heads": 3,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
    "qwen2": _SHARED_CONFIG
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 106,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": _SHARED_CONFIG
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 12,
        "hidden_size": 48,
        "intermediate_size": 82,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3_moe": _SHARED_CONFIG
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 10,
        "hidden_size": 54,
        "intermediate_size": 94,  # of layers without experts, which there are none of
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 38,
        "norm_topk_prob": True,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
}


def tiny_config(name: str, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of tiny model `name`, one of TINY_NAMES."""
    return TINY_CONFIGS[name] | {"torch_dtype": dtype}


def tiny_tensor_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shape by checkpoint tensor name, matrices as [output, input]."""
    cfg = TINY_CONFIGS[name]
    width, ffn, vocab = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"]
    head_dim = cfg.get("head_dim", width // cfg["num_attention_heads"])
    q_width, kv_width = cfg["num_attention_heads"] * head_dim, cfg["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(cfg["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        for letter, out_width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            shapes[f"{prefix}.self_attn.{letter}_proj.weight"] = (out_width, width)
            if cfg["model_type"] == "qwen2":
                shapes[f"{prefix}.self_attn.{letter}_proj.bias"] = (out_width,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, q_width)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        mlps = [f"{prefix}.mlp"]
        if cfg["model_type"] == "qwen3_moe":
            ffn = cfg["moe_intermediate_size"]
            mlps = [f"{prefix}.mlp.experts.{expert}" for expert in range(cfg["num_experts"])]
            shapes[f"{prefix}.mlp.gate.weight"] = (cfg["num_experts"], width)
        if cfg["model_type"] in ("qwen3", "qwen3_moe"):
            for letter in "qk":
                shapes[f"{prefix}.self_attn.{letter}_norm.weight"] = (head_dim,)
        for mlp in mlps:
            shapes[f"{mlp}.gate_proj.weight"] = (ffn, width)
            shapes[f"{mlp}.up_proj.weight"] = (ffn, width)
            shapes[f"{mlp}.down_proj.weight"] = (width, ffn)
    shapes["model.norm.weight"] = (width,)
    if not cfg["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def tiny_tensor(name: str, tensor_name: str, seed: int = 0) -> np.ndarray:
    """One float32 tensor of tiny model `name`; the same bits everywhere."""
    shape = tiny_tensor_shapes(name)[tensor_name]
    noise = draw_bell_noise(f"{name}/{seed}/{tensor_name}", shape)
    if "norm" in tensor_name:
        values = 1.0 + 0.1 * noise
    elif tensor_name.endswith(".bias"):
        values = 0.15 * noise
    elif tensor_name.endswith((".q_proj.weight", ".k_proj.weight")):
        # Larger than 1 / sqrt(fan_in), so that attention picks some positions and ignores others.
        values = 1.4 * noise / np.sqrt(shape[-1])
    else:
        values = noise / np.sqrt(shape[-1])
    return values.astype(np.float32)


def tiny_tensors(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """All float32 tensors of tiny model `name` by checkpoint name."""
    return {tensor_name: tiny_tensor(name, tensor_name, seed) for tensor_name in tiny_tensor_shapes(name)}


def tiny_fingerprint(name: str, seed: int = 0) -> str:
    """sha256 over config and weights; the golden manifest records it, so drift is told from a real error."""
    digest = hashlib.sha256(json.dumps(TINY_CONFIGS[name], sort_keys=True).encode())
    for tensor_name, tensor in tiny_tensors(name, seed).items():
        digest.update(tensor_name.encode())
        digest.update(tensor.astype("<f4").tobytes())
    return digest.hexdigest()


def tiny_prompt(name: str, num_tokens: int) -> list[int]:
    """A fixed pseudo-random prompt of `num_tokens` ids below the vocabulary size."""
    vocab_size = TINY_CONFIGS[name]["vocab_size"]
    raw = _draw_bits(f"{name}/prompt/{num_tokens}", num_tokens)
    return [int(bits % vocab_size) for bits in raw]


def write_tiny_checkpoint(
    directory: str | Path, name: str, dtype: str = "float32", seed: int = 0, shards: int = 1
) -> Path:
    """Writes config.json, generation_config.json and the weights of tiny model `name`; returns the directory.

    `dtype` is float32, float16 or bfloat16 (rounded to nearest even from the float32 weights). With
    `shards` above 1 the weights are spread over that many files and an index, as large checkpoints are.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", tiny_config(name, dtype))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": list(EOS_IDS), "do_sample": False},
    )
    tensors = tiny_tensors(name, seed)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        write_safetensors(directory / file_name, part, dtype)
        weight_map |= dict.fromkeys(part, file_name)
    item_bytes = np.dtype(_NUMPY_DTYPES[dtype]).itemsize
    total_bytes = sum(tensor.size for tensor in tensors.values()) * item_bytes
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )
    return directory


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_NUMPY_DTYPES)}")
    served = {key: tensor.astype(_NUMPY_DTYPES[dtype]) for key, tensor in tensors.items()}
    save_file(served, path, metadata={"format": "pt"})


def _draw_bits(key: str, count: int) -> np.ndarray:
    """`count` uniform uint64 values from PCG64 seeded by the hash of `key`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.PCG64(seed).random_raw(count)


def draw_bell_noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Zero mean, unit variance, within 3.47: the sum of four 16-bit uniforms taken from one uint64.

    NumPy promises raw bits across releases but not its normal variates, which also pass through libm.
    """
    raw = _draw_bits(key, int(np.prod(shape)))
    total = sum(((raw >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.int64) for part in range(4))
    mean = 4 * (2**16 - 1) / 2
    deviation = np.sqrt(4 * (2**32 - 1) / 12)
    return ((total - mean) / deviation).reshape(shape)
