"""Tiny AWQ and GPTQ checkpoints, packed value by value as their formats say, and the same unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the four bits of a word that hold its first output, its second, ...

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def write_packed_model(
    folder: Path,
    method: str,
    *,
    group_size: int = 32,
    width: int = 64,
    mlp_width: int = 96,
    **settings: Any,
) -> None:
    """A model whose matrices are random 4-bit values, packed; and in `folder`/plain the same in float32."""
    rng = np.random.default_rng(len(method))
    config = CONFIG | {"hidden_size": width, "intermediate_size": mlp_width}
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 2, width),
        "self_attn.v_proj": (width // 2, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp_width, width),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    packed: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in shapes.items():
            base = f"model.layers.{layer}.{name}"
            tensors, w_FD = make_packed_matrix(rng, method, *shape, group_size, **settings)
            packed |= {f"{base}.{part}": tensor for part, tensor in tensors.items()}
            plain[f"{base}.weight"] = w_FD
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{layer}.{norm}.weight"] = np.ones(width, np.float32)
    plain["model.norm.weight"] = np.ones(width, np.float32)
    for name in ("model.embed_tokens", "lm_head"):
        plain[f"{name}.weight"] = (
            rng.standard_normal((72, width), np.float32).astype(np.float16).astype(np.float32)
        )
    others = {
        name: x.astype(np.float16)
        for name, x in plain.items()
        if f"{name.removesuffix('.weight')}.qweight" not in packed
    }
    quantization = {"quant_method": method, "bits": 4, "group_size": group_size, **settings}
    _write(folder, {**config, "quantization_config": quantization}, packed | others)
    _write(folder / "plain", config, plain)


def make_packed_matrix(
    rng: np.random.Generator,
    method: str,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    *,
    desc_act: bool = False,
    checkpoint_format: str = "gptq",
    **_settings: Any,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a matrix, and the matrix [outputs, inputs]."""
    num_groups = 1 if group_size < 0 else num_inputs // group_size
    q_DF = rng.integers(0, 16, (num_inputs, num_outputs))
    zero_GF = rng.integers(1, 16, (num_groups, num_outputs))
    scale_GF = (rng.uniform(0.6, 2, (num_groups, num_outputs)) / num_inputs).astype(np.float16)
    group_D = np.arange(num_inputs) * num_groups // num_inputs
    if desc_act:
        group_D = rng.permutation(group_D)
    w_DF = scale_GF[group_D].astype(np.float32) * (q_DF - zero_GF[group_D]).astype(np.float32)
    nibbles = AWQ_NIBBLES if method == "awq" else tuple(range(8))
    stored_zero_GF = zero_GF - (method == "gptq" and checkpoint_format == "gptq")
    tensors = {
        "qweight": pack_columns(q_DF, nibbles) if method == "awq" else pack_columns(q_DF.T, nibbles).T,
        "qzeros": pack_columns(stored_zero_GF, nibbles),
        "scales": scale_GF,
    }
    if method == "gptq":
        tensors["g_idx"] = group_D.astype(np.int32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, w_DF.T.copy()


def pack_columns(values: np.ndarray, nibbles: tuple[int, ...]) -> np.ndarray:
    """Eight columns of 4-bit values to one of int32; column i of a word goes to its nibble `nibbles[i]`."""
    words = sum(values[:, i::8].astype(np.int64) << (4 * nibbles[i]) for i in range(8))
    return np.asarray(words).astype(np.uint32).view(np.int32)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
