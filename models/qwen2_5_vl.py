"""Qwen2.5-VL: the language side of Qwen2.5, with images among its tokens.

It differs from llama.py in two things. The tokens of an image take rows of the vision encoder
(qwen2_5_vl_vision.py) in place of embeddings, and a token has three positions, time, row and column, each of
which turns a part of every head (M-RoPE). Text has the same position on all three, so a step without images
is one of Qwen2.5. Serves Qwen2_5_VLForConditionalGeneration checkpoints, images only. Reference:
transformers, models/qwen2_5_vl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.models import llama
from jaxserve.models import qwen2_5_vl_vision as vision
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.interface import ImageTokens, KVPool, ParamSpec, PatchPlaces, StepBatch, TensorSource
from jaxserve.models.layers import axial_rope_tables, rope_frequencies, rope_tables
from jaxserve.models.quant import embed
from jaxserve.models.qwen2 import QWEN2_IGNORES
from jaxserve.models.sharding import Division

# Beside the language side's own fields in older files, and again within text_config in newer ones.
OUTER_FIELDS = frozenset(
    """
    vision_config text_config image_token_id video_token_id vision_token_id vision_start_token_id
    vision_end_token_id
    """.split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    language: llama.Config
    vision: vision.Config
    image_token_id: int
    rope_sections: tuple[int, ...]  # pairs of a head that turn with time, with the row and with the column

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """Read config.json, with the language side's fields in `text_config` or at the top level.

        Raises ValueError on a field this family does not know.
        """
        text = dict(hf.get("text_config") or hf)
        rope = dict(text.pop("rope_parameters", None) or text.pop("rope_scaling", None) or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("mrope", "default"):
            raise ValueError(f"config.json: rope scaling of type {kind!r} is not supported (only 'mrope')")
        text.pop("rope_scaling", None)
        text["rope_theta"] = text.get("rope_theta") or rope.get("rope_theta") or 1000000.0
        text["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        fields = read_hf_config(
            text, supports={"use_sliding_window": (False,)}, ignores=QWEN2_IGNORES | OUTER_FIELDS
        )
        cfg = cls(
            language=llama.Config(**fields, has_qkv_bias=True),
            vision=vision.Config.from_hf(hf["vision_config"]),
            image_token_id=hf.get("image_token_id", 151655),
            rope_sections=tuple(rope.get("mrope_section", (16, 24, 24))),
        )
        if len(cfg.rope_sections) != 3 or sum(cfg.rope_sections) != cfg.head_dim // 2:
            raise ValueError(
                f"config.json: mrope_section={list(cfg.rope_sections)} must be three numbers that add up to "
                f"half a head, {cfg.head_dim // 2}"
            )
        if cfg.vision.out_width != cfg.language.width:
            raise ValueError(
                f"config.json: vision_config.out_hidden_size={cfg.vision.out_width} must be hidden_size="
                f"{cfg.language.width}"
            )
        return cfg

    @property
    def vocab_size(self) -> int:
        return self.language.vocab_size

    @property
    def num_layers(self) -> int:
        return self.language.num_layers

    @property
    def num_heads(self) -> int:
        return self.language.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.language.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.language.head_dim

    @property
    def max_context(self) -> int:
        return self.language.max_context


def param_specs(cfg: Config) -> list[ParamSpec]:
    """Those of the language side under "language.", and the vision encoder's under "vision."."""

    def rename(source: TensorSource) -> TensorSource:
        if not source.name.startswith("model."):
            return source
        return replace(source, other_names=(f"model.language_{source.name}",))

    specs = llama.param_specs(cfg.language)
    specs = [
        replace(spec, path=f"language.{spec.path}", sources=tuple(map(rename, spec.sources)))
        for spec in specs
    ]
    return [*specs, *vision.param_specs(cfg.vision)]


def divide(cfg: Config, num_devices: int) -> Division:
    """The language side over devices; each of them has the vision encoder whole."""
    division = llama.divide(cfg.language, num_devices)
    return replace(division, local_cfg=replace(cfg, language=division.local_cfg))


class Model(nnx.Module):
    """Built from loaded parameters by path (see `param_specs`); `kernels` is chosen at start."""

    def __init__(self, cfg: Config, params: Mapping[str, Any], kernels: KernelSet):
        self.cfg = cfg
        self.kernels = kernels
        language = {path.removeprefix("language."): value for path, value in params.items()}
        self.language = llama.Model(cfg.language, language, kernels)
        self.vision = vision.Encoder(cfg.vision, params)

    def encode_images(self, patch_UC: jax.Array, places: PatchPlaces) -> jax.Array:
        """Rows for image tokens [M, D] float32: what `ImageTokens.feature_MD` holds. A runner may also run
        the parts of `vision` one at a time."""
        return self.vision(patch_UC, places)

    def __call__(self, batch: StepBatch, kv: KVPool) -> tuple[jax.Array, KVPool]:
        """One step, as in llama.py: the hidden states of all its tokens [T, D] float32, and the pool."""
        cfg = self.cfg
        frequencies = rope_frequencies(cfg.head_dim, cfg.language.rope_theta, None)
        x_TD = embed(batch.token_ids_T, self.language.embed_VD.get_value(), self.kernels.shards)
        if batch.images is None:
            rope = rope_tables(batch.positions_T, frequencies)
        else:
            x_TD = merge_features(x_TD, batch.images)
            axes = tuple(axis for axis, count in enumerate(cfg.rope_sections) for _ in range(count))
            rope = axial_rope_tables(batch.images.positions_3T, frequencies, axes)
        return self.language.run_layers(x_TD, batch._replace(rope=rope), kv)

    def compute_logits(self, x_BD: jax.Array) -> jax.Array:
        """Float32 logits [B, V] of some of the rows that `__call__` returned."""
        return self.language.compute_logits(x_BD)


def merge_features(x_TD: jax.Array, images: ImageTokens) -> jax.Array:
    """Embedded tokens with the rows of images in place of those that stand for them: [T, D] float32."""
    feature_TD = images.feature_MD[jnp.maximum(images.feature_row_T, 0)].astype(x_TD.dtype)
    return jnp.where(images.feature_row_T[:, None] >= 0, feature_TD, x_TD)
