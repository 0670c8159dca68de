"""The sizes of Qwen2.5-VL as their config.json files on the hub give them, old layout and new."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jaxserve.models.qwen2_5_vl import Config, param_specs
from jaxserve.models.registry import find_family
from tests.tiny_vl import tiny_vl_config

# The fields that differ, then the number of parameters that the hub counts, in millions.
SIZES = {
    "3b": ((2048, 11008, 36, 16, 2, 151936, True, 3420), 3755),
    "7b": ((3584, 18944, 28, 28, 4, 152064, False, 3420), 8292),
    "32b": ((5120, 27648, 64, 40, 8, 152064, False, 3456), 33453),
    "72b": ((8192, 29568, 80, 64, 8, 152064, False, 3456), 73411),
}


def hub_config(size: str) -> dict[str, Any]:
    width, ffn, layers, heads, kv_heads, vocab_size, is_tied, vision_ffn = SIZES[size][0]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": is_tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab_size,
    }


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_as_many_parameters_as_the_hub_counts(size):
    cfg = find_family(hub_config(size)).Config.from_hf(hub_config(size))
    num_parameters = sum(math.prod(spec.shape) for spec in param_specs(cfg))
    assert round(num_parameters / 1e6) == SIZES[size][1]
    assert (cfg.head_dim, cfg.vision.head_dim, cfg.vision.window_patches) == (128, 80, 8)
    assert (cfg.vision.patch_values, cfg.image_token_id) == (1176, 151655)


def test_what_a_vision_config_leaves_out_is_what_transformers_takes():
    short = hub_config("7b")
    kept = ("hidden_size", "in_chans", "tokens_per_second", "spatial_patch_size")
    short["vision_config"] = {name: short["vision_config"][name] for name in kept}
    assert Config.from_hf(short) == Config.from_hf(hub_config("7b"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2]}}, "mrope_section"),
        ({"hidden_size": 144, "num_attention_heads": 12}, "out_hidden_size=72 must be hidden_size=144"),
        ({"qk_norm": True}, "qk_norm"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_is_not_served_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        Config.from_hf(tiny_vl_config() | change)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"deepstack_visual_indexes": [3]}])
def test_another_vision_encoder_is_refused(change):
    config = tiny_vl_config()
    with pytest.raises(ValueError, match=f"vision_config.{next(iter(change))}"):
        Config.from_hf(config | {"vision_config": config["vision_config"] | change})
