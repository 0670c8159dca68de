"""GGUF files as Hugging Face sees them: names, row order, and the config made from metadata."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.weights.gguf import open_gguf
from jaxserve.weights.gguf_config import generation_config_of, hf_config_of, llama3_rule_of
from jaxserve.weights.gguf_names import hf_name, open_gguf_checkpoint
from tests import tiny
from tests.weights.gguf_files import write_model, write_tensors


@pytest.mark.parametrize("name", tiny.GGUF_NAMES)
def test_every_tensor_equals_the_hugging_face_one(tmp_path: Path, name: str) -> None:
    tensors = tiny.tiny_tensors(name)
    checkpoint = open_gguf_checkpoint(write_model(tmp_path / "m.gguf", tiny.tiny_config(name), tensors))
    assert sorted(checkpoint.tensor_names()) == sorted(tensors)
    for tensor_name, tensor in tensors.items():
        assert checkpoint.shape_of(tensor_name) == tensor.shape
        np.testing.assert_array_equal(checkpoint.read_rows(tensor_name, 0, len(tensor)), tensor)
    checkpoint.close()


def test_row_ranges_of_interleaved_heads_may_start_and_end_anywhere(tmp_path: Path) -> None:
    tensors = tiny.tiny_tensors("llama")
    checkpoint = open_gguf_checkpoint(write_model(tmp_path / "m.gguf", tiny.tiny_config("llama"), tensors))
    name = "model.layers.1.self_attn.k_proj.weight"  # two heads of twelve rows
    for start in range(24):
        for end in range(start + 1, 25):
            np.testing.assert_array_equal(
                checkpoint.read_rows(name, start, end - start), tensors[name][start:end]
            )
    checkpoint.close()


def test_biases_of_q_and_k_are_reordered_with_their_rows(tmp_path: Path) -> None:
    tensors = tiny.tiny_tensors("llama")
    bias = np.arange(72, dtype=np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = bias
    checkpoint = open_gguf_checkpoint(write_model(tmp_path / "m.gguf", tiny.tiny_config("llama"), tensors))
    np.testing.assert_array_equal(
        checkpoint.read_rows("model.layers.0.self_attn.q_proj.bias", 5, 20), bias[5:25]
    )
    checkpoint.close()


def test_unknown_names_are_left_as_they_are() -> None:
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("blk.0.ffn_gate_exps.weight") == "blk.0.ffn_gate_exps.weight"
    assert hf_name("rope_freqs.weight") == "rope_freqs.weight"


@pytest.mark.parametrize("name", tiny.GGUF_NAMES)
def test_metadata_becomes_the_config_of_the_hugging_face_model(tmp_path: Path, name: str) -> None:
    config = tiny.tiny_config(name) | {"rope_scaling": None}
    file = open_gguf(write_model(tmp_path / "m.gguf", config, tiny.tiny_tensors(name)))
    made = hf_config_of(file)
    for key in (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
        "max_position_embeddings", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        assert made[key] == config[key], key
    assert made["head_dim"] == {"llama": 12, "llama_tied": 10, "qwen2": 8, "qwen3": 12}[name]
    file.close()


def llama3_factors(rope_theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """The factors that convert_hf_to_gguf.py stores for a Llama 3 rope_scaling."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    factors = []
    for dimension in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope_theta ** (dimension / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(
            1.0 if wavelength < original / high else factor if wavelength > original / low else between
        )
    return np.array(factors, np.float32)


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (128, 32.0), (64, 32.0)])
def test_llama3_rope_scaling_is_recovered_from_its_factors(head_dim: int, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert llama3_rule_of(llama3_factors(500000.0, head_dim, scaling), 500000.0, head_dim) == scaling


def test_factors_of_another_rule_are_given_as_they_are() -> None:
    factors = np.array([1, 3, 2, 5, 4, 8, 1, 2], np.float32)
    assert llama3_rule_of(factors, 10000.0, 16) == {"rope_type": "explicit", "factors": factors.tolist()}
    assert llama3_rule_of(np.ones(8, np.float32), 10000.0, 16) is None


def test_several_end_tokens_reach_the_generation_config() -> None:
    ids = {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 7,
    }
    assert generation_config_of(ids) == {"eos_token_id": [7, 9]}
    assert generation_config_of({"tokenizer.ggml.eos_token_id": 7}) == {}


def test_another_architecture_and_missing_facts_are_named(tmp_path: Path) -> None:
    embedding = {"token_embd.weight": np.zeros((2, 32), np.float32)}
    other = open_gguf(write_tensors(tmp_path / "bert.gguf", embedding, architecture="bert"))
    with pytest.raises(WeightError, match=r"architecture 'bert'.*llama, qwen2"):
        hf_config_of(other)
    bare = open_gguf(write_tensors(tmp_path / "bare.gguf", embedding))
    with pytest.raises(WeightError, match=r"lacks llama\.embedding_length"):
        hf_config_of(bare)
