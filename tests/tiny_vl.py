"""A tiny random Qwen2.5-VL in Hugging Face layout, with tokenizer, chat template and image settings.

`write_tiny_vl_checkpoint` makes a folder that transformers loads and that can be served: tests of the family
and of the server, and the script that makes their golden files, see the same weights. As in tests/tiny.py no
size is another's, and a weight is a pure function of its name.

    language   width 72, 6 heads of 12 (sections 1, 2, 3), 2 of k and v, ffn 94, 3 layers, a head of its own
    vision     width 36, 3 heads of 12, ffn 58, 4 blocks (the second and the last see the whole image),
               windows of 4 x 4 patches; patches are those of the real models, 14 x 14 pixels

The tokenizer has one token a byte, and the special tokens of Qwen. Knows nothing of jax, torch or the serving
code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import draw_bell_noise, write_json, write_safetensors

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ID_OF_SPECIAL = {token: 256 + place for place, token in enumerate(SPECIAL_TOKENS)}
IMAGE_TOKEN_ID = ID_OF_SPECIAL["<|image_pad|>"]
EOS_ID = ID_OF_SPECIAL["<|im_end|>"]
VOCAB_SIZE = 271  # a few more than there are tokens, as in the real models
PATCH_VALUES = 3 * 2 * 14 * 14

TEXT_CONFIG: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": ID_OF_SPECIAL["<|endoftext|>"],
    "eos_token_id": EOS_ID,
    "hidden_act": "silu",
    "hidden_size": 72,
    "initializer_range": 0.02,
    "intermediate_size": 94,
    "max_position_embeddings": 512,
    "max_window_layers": 3,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    # Small, so that the slow pairs, which turn with the column, turn enough to be seen.
    "rope_theta": 100.0,
    "sliding_window": 512,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 4,
    "fullatt_block_indexes": [1, 3],
    "hidden_act": "silu",
    "hidden_size": 36,
    "in_chans": 3,
    "intermediate_size": 58,
    "num_heads": 3,
    "out_hidden_size": 72,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 56,
}
OUTER_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": IMAGE_TOKEN_ID,
    "model_type": "qwen2_5_vl",
    "video_token_id": ID_OF_SPECIAL["<|video_pad|>"],
    "vision_end_token_id": ID_OF_SPECIAL["<|vision_end|>"],
    "vision_start_token_id": ID_OF_SPECIAL["<|vision_start|>"],
}
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 50176,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "temporal_patch_size": 2,
}
# The shape of Qwen's own: parts of a message in their order, an image as three tokens.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{ part.text }}
{%- else -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
""".strip()

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VlCase:
    """A prompt in pieces: texts, and the grids of images between them."""

    name: str
    pieces: tuple[str | Grid, ...]

    @property
    def grids(self) -> list[Grid]:
        return [piece for piece in self.pieces if not isinstance(piece, str)]

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, str):
                ids += piece.encode()
            else:
                ids.append(ID_OF_SPECIAL["<|vision_start|>"])
                ids += [IMAGE_TOKEN_ID] * (piece[0] * piece[1] * piece[2] // 4)
                ids.append(ID_OF_SPECIAL["<|vision_end|>"])
        return ids

    def pixels(self) -> np.ndarray:
        """Made-up patches of all images, float32 [patches, PATCH_VALUES]."""
        num_patches = sum(rows * columns for _, rows, columns in self.grids)
        return draw_bell_noise(f"vl/pixels/{self.name}", (num_patches, PATCH_VALUES)).astype(np.float32)


CASES = (
    VlCase(name="one", pieces=("Look: ", (1, 4, 6), " What is it?")),
    VlCase(name="several", pieces=((1, 4, 4), (1, 8, 2), " and ", (1, 2, 10), " differ. How?")),
    VlCase(name="odd", pieces=("A", (1, 10, 14), "B")),
    VlCase(name="text", pieces=("No picture at all, only words.",)),
)


def tiny_vl_config(*, nested: bool = False) -> dict[str, Any]:
    """config.json as the first checkpoints have it, the language side's fields at the top level, or with them
    in `text_config`, as newer versions of transformers write it."""
    sections = {"mrope_section": [1, 2, 3]}
    if not nested:
        rope = {"rope_scaling": {"type": "mrope", **sections}}
        return OUTER_CONFIG | TEXT_CONFIG | rope | {"vision_config": VISION_CONFIG, "torch_dtype": "float32"}
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "rope_theta"}
    text |= {"model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 3}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": TEXT_CONFIG["rope_theta"], **sections}
    vision = {name: value for name, value in VISION_CONFIG.items() if name not in ("in_chans", "window_size")}
    vision |= {"in_channels": 3, "window_size": 56, "model_type": "qwen2_5_vl_vision"}
    return OUTER_CONFIG | {"text_config": text, "vision_config": vision, "dtype": "float32"}


def tiny_vl_tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Shape by checkpoint tensor name, as the hub's repositories spell it."""
    text, vision = TEXT_CONFIG, VISION_CONFIG
    width, ffn, kv_width = text["hidden_size"], text["intermediate_size"], 24
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, width)}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        for letter, out_width in (("q", width), ("k", kv_width), ("v", kv_width)):
            shapes[f"{prefix}.self_attn.{letter}_proj.weight"] = (out_width, width)
            shapes[f"{prefix}.self_attn.{letter}_proj.bias"] = (out_width,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, width)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, width)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, ffn)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCAB_SIZE, width)}
    inner, inner_ffn = vision["hidden_size"], vision["intermediate_size"]
    shapes["visual.patch_embed.proj.weight"] = (inner, 3, 2, 14, 14)
    for block in range(vision["depth"]):
        prefix = f"visual.blocks.{block}"
        for name in ("norm1", "norm2"):
            shapes[f"{prefix}.{name}.weight"] = (inner,)
        linears = (
            ("attn.qkv", 3 * inner, inner),
            ("attn.proj", inner, inner),
            ("mlp.gate_proj", inner_ffn, inner),
            ("mlp.up_proj", inner_ffn, inner),
            ("mlp.down_proj", inner, inner_ffn),
        )
        for name, rows, columns in linears:
            shapes |= {f"{prefix}.{name}.weight": (rows, columns), f"{prefix}.{name}.bias": (rows,)}
    shapes["visual.merger.ln_q.weight"] = (inner,)
    for name, rows, columns in (("mlp.0", 4 * inner, 4 * inner), ("mlp.2", width, 4 * inner)):
        shapes |= {f"visual.merger.{name}.weight": (rows, columns), f"visual.merger.{name}.bias": (rows,)}
    return shapes


def tiny_vl_tensor(name: str) -> np.ndarray:
    """One float32 tensor; the same bits everywhere."""
    shape = tiny_vl_tensor_shapes()[name]
    noise = draw_bell_noise(f"vl/{name}", shape)
    if len(shape) == 1 and not name.endswith(".bias"):
        values = 1.0 + 0.1 * noise
    elif name.endswith(".bias"):
        values = 0.15 * noise
    else:
        # Larger than 1 / sqrt(fan_in) where attention picks positions.
        gain = 1.4 if name.endswith((".q_proj.weight", ".k_proj.weight", ".qkv.weight")) else 1.0
        values = gain * noise / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def tiny_vl_fingerprint() -> str:
    """sha256 over config and weights; the golden file records it, so drift is told from a real error."""
    digest = hashlib.sha256(json.dumps(tiny_vl_config(), sort_keys=True).encode())
    for name in tiny_vl_tensor_shapes():
        digest.update(name.encode() + tiny_vl_tensor(name).astype("<f4").tobytes())
    return digest.hexdigest()


def write_tiny_vl_checkpoint(directory: str | Path, *, nested: bool = False, dtype: str = "float32") -> Path:
    """Writes everything that a server needs; returns the directory. With `nested`, config and tensors are
    spelled as newer versions of transformers spell them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", tiny_vl_config(nested=nested) | {"torch_dtype": dtype})
    write_json(directory / "generation_config.json", {"eos_token_id": [EOS_ID, 256], "do_sample": False})
    write_json(directory / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_json(
        directory / "tokenizer_config.json",
        {
            "chat_template": CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tiny_vl_tokenizer().save(str(directory / "tokenizer.json"))
    tensors = {name: tiny_vl_tensor(name) for name in tiny_vl_tensor_shapes()}
    if nested:
        tensors = {respell(name): tensor for name, tensor in tensors.items()}
    write_safetensors(directory / "model.safetensors", tensors, dtype)
    return directory


def respell(name: str) -> str:
    """The newer name of a tensor."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def tiny_vl_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=byte_of_char)
    vocab = {char: byte for byte, char in enumerate(alphabet)} | ID_OF_SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def byte_of_char(char: str) -> int:
    """The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 stands for itself, and
    the other 68 bytes were given the characters from 256 on, in their order."""
    code = ord(char)
    if code < 256:
        return code
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [byte for byte in range(256) if byte not in printable][code - 256]
