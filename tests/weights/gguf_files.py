"""Writes GGUF files for the tests with the `gguf` library, the way llama.cpp's converter would.

Knows nothing of the code under test, so that the two sides can disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute_for_llama(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py's reordering of q and k: half-split rotary rows become interleaved ones."""
    split = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], quant_type: str = "F32", architecture: str = "llama"
) -> Path:
    """A file of matrices under GGUF names. `quant_type` RAW:X takes uint8 rows already in the format X."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor, quant_type)
    _write(writer)
    return path


def write_model(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A whole model from a Hugging Face config and tensors; vectors and matrices in float32."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in tensors.items():
        if architecture == "llama" and ".q_proj." in name:
            tensor = permute_for_llama(tensor, num_heads)
        if architecture == "llama" and ".k_proj." in name:
            tensor = permute_for_llama(tensor, num_kv_heads)
        _add_tensor(writer, to_gguf_name(name), tensor, "F32")
    _write(writer)
    return path


def to_gguf_name(hf_name: str) -> str:
    stem, _, suffix = hf_name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{HF_TO_GGUF[part]}.{suffix}"
    return f"{HF_TO_GGUF[stem]}.{suffix}" if stem in HF_TO_GGUF else hf_name


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, quant_type: str) -> None:
    if quant_type.startswith("RAW:"):
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[quant_type[4:]])
        return
    ggml_type = gguf.GGMLQuantizationType[quant_type]
    packed = gguf.quantize(np.ascontiguousarray(tensor), ggml_type)
    writer.add_tensor(name, packed, raw_dtype=ggml_type)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
