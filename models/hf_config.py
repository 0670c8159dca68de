"""Reads the part of a Hugging Face config.json that dense decoder families share.

A field that is not read, not known to be harmless and not empty is refused: silence about a feature
that a checkpoint was trained with gives wrong text, not an error. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from jaxserve.models.layers import RopeScaling

# Fields that say nothing about the forward pass; how weights are packed is read by weights/packed_int4.py.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range
    attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id auto_map name_or_path
    _name_or_path pretraining_tp is_llama_config transformers.js_config id2label label2id
    problem_type task_specific_params output_attentions output_hidden_states return_dict torchscript
    chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder is_decoder max_length temperature
    top_k top_p rope_parameters unsloth_fixed keys_to_ignore_at_inference quantization_config
    """.split()
)
READ = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps rope_theta rope_scaling max_position_embeddings tie_word_embeddings hidden_act
    layer_types rope_interleaved
    """.split()
)


def read_hf_config(
    hf: Mapping[str, Any],
    supports: Mapping[str, tuple[Any, ...]],
    ignores: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Keyword arguments for a Llama-like Config.

    `supports` maps further fields to the values that the family's forward pass covers; `ignores` names
    fields without meaning to it. Raises ValueError naming the field at fault.
    """
    for name, value in hf.items():
        if name in supports and value is not None and value not in supports[name]:
            raise ValueError(f"config.json: {name}={value!r} is not supported (only {supports[name]})")
        known = name in READ or name in HARMLESS or name in supports or name in ignores
        if not known and value not in (None, False, 0, "", [], {}):
            raise ValueError(f"config.json: the field {name}={value!r} is not known to this model family")
    if hf.get("rope_interleaved"):
        raise ValueError("config.json: rope_interleaved=true is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act={hf['hidden_act']!r} is not supported (only 'silu')")
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise ValueError("config.json: layer_types other than 'full_attention' are not supported")
    num_heads = hf["num_attention_heads"]
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    return {
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "mlp_width": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // num_heads,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": float(hf.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": _read_rope_scaling(rope),
        "max_context": hf["max_position_embeddings"],
        "ties_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }


def _read_rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope scaling of type {kind!r} is not supported (only 'llama3')")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_context=int(rope["original_max_position_embeddings"]),
    )
