"""The vision encoder of Qwen2.5-VL: patches of images to rows that take the places of embedded tokens.

A transformer over patches: RMS norm, rotary embedding by row and column, multi-head attention, gated MLP, all
products with biases. Most blocks attend within windows of the image, a few over the whole image. Squares of
patches are merged into one row in the end. Used by qwen2_5_vl.py; knows nothing of tokens or pixels, nor of
how patches are laid out (interface.PatchPlaces). Its weights are never quantised: they are 8 % of the 7B
model, and an MLP of 3420 channels leaves int8's rotation runs of four.

Letters of this file, beside those of models/__init__.py:

    U  patches, in window order     M  merged squares of patches
    W  patches in a window          E  width of the language model
    C  values of a patch, I T Y X: colours, frames, rows and columns of pixels
    Q  patches whose scores are in memory at once

Reference: transformers, models/qwen2_5_vl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels_pallas.add_norm.ref import rms_norm
from jaxserve.kernels_pallas.kv_write.ref import rotate
from jaxserve.kernels_pallas.rounding import to_bf16
from jaxserve.models.hf_config import HARMLESS
from jaxserve.models.interface import ParamSpec, PatchPlaces, TensorSource
from jaxserve.models.layers import axial_rope_tables, rope_frequencies
from jaxserve.models.quant import matmul

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
MOST_SCORES = 1 << 20  # of a head, in memory at once
# On the CPU more leave the cache: 256 queries at once take four times as long as 64, 16 windows thrice as 4.
QUERIES_AT_ONCE = (64, 32, 16, 8, 4, 2, 1)
WINDOWS_AT_ONCE = 4
NO_WINDOW = -2  # of the rows in front of the first patch and behind the last

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    depth: int
    width: int
    mlp_width: int
    num_heads: int
    out_width: int  # the language model's
    num_colours: int
    patch_frames: int
    patch_size: int  # pixels
    merge_size: int  # side of the square of patches that becomes a token
    window_patches: int  # side of a window
    full_blocks: tuple[int, ...]  # those that attend over the whole image

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_values(self) -> int:
        return self.num_colours * self.patch_frames * self.patch_size**2

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """Read config.json's `vision_config`; what it leaves out has the value it has in transformers.

        Raises ValueError on a field that is not known or a value that is not served.
        """
        for name, value in hf.items():
            known = name in READ or name in HARMLESS or name in ABOUT_VIDEOS
            if not known and value not in (None, False, 0, "", [], {}):
                raise ValueError(f"config.json: the field vision_config.{name}={value!r} is not known")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: vision_config.hidden_act={hf['hidden_act']!r} is not supported")
        patch_size, merge_size = hf.get("patch_size", 14), hf.get("spatial_merge_size", 2)
        cfg = cls(
            depth=hf.get("depth", 32),
            width=hf["hidden_size"],
            mlp_width=hf.get("intermediate_size", 3420),
            num_heads=hf.get("num_heads", 16),
            out_width=hf.get("out_hidden_size", 3584),
            num_colours=hf.get("in_channels", hf.get("in_chans", 3)),
            patch_frames=hf.get("temporal_patch_size", 2),
            patch_size=patch_size,
            merge_size=merge_size,
            window_patches=hf.get("window_size", 112) // (patch_size * merge_size) * merge_size,
            full_blocks=tuple(hf.get("fullatt_block_indexes", (7, 15, 23, 31))),
        )
        if cfg.width % (4 * cfg.num_heads):
            raise ValueError("config.json: vision_config.hidden_size must be a multiple of 4 x num_heads")
        return cfg


READ = frozenset(
    """
    depth hidden_size intermediate_size num_heads out_hidden_size in_channels in_chans temporal_patch_size
    patch_size spatial_merge_size window_size fullatt_block_indexes hidden_act
    """.split()
)
# And one that says again what patch_size says.
ABOUT_VIDEOS = frozenset({"tokens_per_second", "spatial_patch_size"})


def param_specs(cfg: Config) -> list[ParamSpec]:
    """The parameters, with paths that start with "vision."; gate and up are fused while loading."""

    def source(name: str, *shape: int) -> TensorSource:
        return TensorSource(f"visual.{name}", shape, (f"model.visual.{name}",))

    def exact(path: str, *sources: TensorSource) -> ParamSpec:
        axes = (None,) * len(sources[0].shape)
        return ParamSpec(path=f"vision.{path}", kind="exact", sources=sources, axes=axes)

    def vector(path: str, *sources: TensorSource) -> ParamSpec:
        return ParamSpec(path=f"vision.{path}", kind="vector", sources=sources, axes=(None,))

    width, ffn = cfg.width, cfg.mlp_width
    patch_shape = (width, cfg.num_colours, cfg.patch_frames, cfg.patch_size, cfg.patch_size)
    specs = [exact("w_patch_DITYX", source("patch_embed.proj.weight", *patch_shape))]
    for i in range(cfg.depth):
        here, hf = f"blocks.{i}", f"blocks.{i}"
        gate, up = f"{hf}.mlp.gate_proj", f"{hf}.mlp.up_proj"
        specs += [
            vector(f"{here}.attn_norm_D", source(f"{hf}.norm1.weight", width)),
            exact(f"{here}.w_qkv_FD", source(f"{hf}.attn.qkv.weight", 3 * width, width)),
            vector(f"{here}.b_qkv_F", source(f"{hf}.attn.qkv.bias", 3 * width)),
            exact(f"{here}.w_o_DF", source(f"{hf}.attn.proj.weight", width, width)),
            vector(f"{here}.b_o_D", source(f"{hf}.attn.proj.bias", width)),
            vector(f"{here}.mlp_norm_D", source(f"{hf}.norm2.weight", width)),
            exact(
                f"{here}.w_gate_up_FD",
                source(f"{gate}.weight", ffn, width),
                source(f"{up}.weight", ffn, width),
            ),
            vector(f"{here}.b_gate_up_F", source(f"{gate}.bias", ffn), source(f"{up}.bias", ffn)),
            exact(f"{here}.w_down_DF", source(f"{hf}.mlp.down_proj.weight", width, ffn)),
            vector(f"{here}.b_down_D", source(f"{hf}.mlp.down_proj.bias", width)),
        ]
    merged = width * cfg.merge_size**2
    return [
        *specs,
        vector("merge_norm_D", source("merger.ln_q.weight", width)),
        exact("w_merge_in_FF", source("merger.mlp.0.weight", merged, merged)),
        vector("b_merge_in_F", source("merger.mlp.0.bias", merged)),
        exact("w_merge_out_EF", source("merger.mlp.2.weight", cfg.out_width, merged)),
        vector("b_merge_out_E", source("merger.mlp.2.bias", cfg.out_width)),
    ]


def normalize_patches(
    patch_UB: jax.Array, mean: Sequence[float], deviation: Sequence[float], patch_frames: int
) -> jax.Array:
    """Patches of still images, as bytes, as the encoder reads them: [U, C] float32.

    A byte of a patch is the value 0 to 255 of a pixel, colour by colour (B = I Y X). `mean` and `deviation`
    are those of a colour between 0 and 1; a still image is its own next frame.
    """
    mean_I1, deviation_I1 = (jnp.asarray(x, jnp.float32)[:, None] for x in (mean, deviation))
    x_UIP = patch_UB.reshape(len(patch_UB), len(mean), -1).astype(jnp.float32)  # P = Y X
    x_UIP = (x_UIP / 255 - mean_I1) / deviation_I1
    return jnp.repeat(x_UIP[:, :, None], patch_frames, axis=2).reshape(len(patch_UB), -1)


class PatchEmbedding(nnx.Module):
    """What patches become before the first block."""

    def __init__(self, params: Mapping[str, Any]):
        self.w_patch_DITYX = nnx.Param(params["vision.w_patch_DITYX"])

    def __call__(self, patch_UC: jax.Array) -> jax.Array:
        """[U, D] float32."""
        w_patch_DITYX = self.w_patch_DITYX.get_value()
        return matmul(patch_UC, w_patch_DITYX.reshape(len(w_patch_DITYX), -1))


class Block(nnx.Module):
    """Attention within windows or, if `is_full`, over the whole image; and an MLP. All blocks of a kind have
    one form, so that one program runs them."""

    def __init__(self, cfg: Config, params: Mapping[str, Any], number: int):
        prefix = f"vision.blocks.{number}"
        self.cfg = cfg
        self.is_full = number in cfg.full_blocks
        self.attn_norm_D = nnx.Param(params[f"{prefix}.attn_norm_D"])
        self.w_qkv_FD = nnx.Param(params[f"{prefix}.w_qkv_FD"])
        self.b_qkv_F = nnx.Param(params[f"{prefix}.b_qkv_F"])
        self.w_o_DF = nnx.Param(params[f"{prefix}.w_o_DF"])
        self.b_o_D = nnx.Param(params[f"{prefix}.b_o_D"])
        self.mlp_norm_D = nnx.Param(params[f"{prefix}.mlp_norm_D"])
        self.w_gate_up_FD = nnx.Param(params[f"{prefix}.w_gate_up_FD"])
        self.b_gate_up_F = nnx.Param(params[f"{prefix}.b_gate_up_F"])
        self.w_down_DF = nnx.Param(params[f"{prefix}.w_down_DF"])
        self.b_down_D = nnx.Param(params[f"{prefix}.b_down_D"])

    def __call__(self, x_UD: jax.Array, places: PatchPlaces) -> jax.Array:
        """The residual stream behind it; float32 whatever the weights are."""
        cfg = self.cfg
        frequencies = rope_frequencies(cfg.head_dim // 2, ROPE_THETA, None)
        axes = (0,) * len(frequencies) + (1,) * len(frequencies)
        rope = axial_rope_tables(places.place_2U, 2 * frequencies, axes)
        h_UD = rms_norm(x_UD, self.attn_norm_D.get_value(), NORM_EPS)
        qkv_UF = matmul(h_UD, self.w_qkv_FD.get_value()) + self.b_qkv_F.get_value()
        qkv_U3NH = qkv_UF.reshape(len(qkv_UF), 3, cfg.num_heads, cfg.head_dim)
        q_UNH, k_UNH = (rotate(qkv_U3NH[:, i], *rope) for i in range(2))
        qkv = (q_UNH * cfg.head_dim**-0.5, k_UNH, qkv_U3NH[:, 2])
        qkv = [self._as_operand(x_UNH.swapaxes(0, 1)) for x_UNH in qkv]
        if self.is_full:
            o_NUH = attend_over_images(*qkv, places.image_U)
        else:
            o_NUH = attend_within_windows(*qkv, places.window_U, cfg.window_patches**2)
        o_UD = matmul(o_NUH.swapaxes(0, 1).reshape(x_UD.shape), self.w_o_DF.get_value())
        x_UD = x_UD + o_UD + self.b_o_D.get_value()
        h_UD = rms_norm(x_UD, self.mlp_norm_D.get_value(), NORM_EPS)
        h_UF = matmul(h_UD, self.w_gate_up_FD.get_value()) + self.b_gate_up_F.get_value()
        gate_UF, up_UF = jnp.split(h_UF, 2, axis=1)
        h_UD = matmul(jax.nn.silu(gate_UF) * up_UF, self.w_down_DF.get_value())
        return x_UD + h_UD + self.b_down_D.get_value()

    def _as_operand(self, x: jax.Array) -> jax.Array:
        """Queries, keys and values are rounded to bf16 where the weights are."""
        return to_bf16(x) if self.w_qkv_FD.get_value().dtype == jnp.bfloat16 else x


class Merger(nnx.Module):
    """What squares of patches become behind the last block."""

    def __init__(self, params: Mapping[str, Any]):
        self.merge_norm_D = nnx.Param(params["vision.merge_norm_D"])
        self.w_merge_in_FF = nnx.Param(params["vision.w_merge_in_FF"])
        self.b_merge_in_F = nnx.Param(params["vision.b_merge_in_F"])
        self.w_merge_out_EF = nnx.Param(params["vision.w_merge_out_EF"])
        self.b_merge_out_E = nnx.Param(params["vision.b_merge_out_E"])

    def __call__(self, x_UD: jax.Array, order_M: jax.Array) -> jax.Array:
        """Rows for the image tokens [M, E] float32, in their order; those of padding are noise."""
        h_UD = rms_norm(x_UD, self.merge_norm_D.get_value(), NORM_EPS)
        h_MF = matmul(h_UD.reshape(len(order_M), -1), self.w_merge_in_FF.get_value())
        h_MF = jax.nn.gelu(h_MF + self.b_merge_in_F.get_value(), approximate=False)
        y_ME = matmul(h_MF, self.w_merge_out_EF.get_value()) + self.b_merge_out_E.get_value()
        return y_ME[order_M]


class Encoder(nnx.Module):
    """Built from loaded parameters by path (see `param_specs`). Its parts can run one at a time, so that
    steps run between them."""

    def __init__(self, cfg: Config, params: Mapping[str, Any]):
        self.embed = PatchEmbedding(params)
        self.blocks = nnx.List([Block(cfg, params, number) for number in range(cfg.depth)])
        self.merge = Merger(params)

    def __call__(self, patch_UC: jax.Array, places: PatchPlaces) -> jax.Array:
        """[M, E] float32, see Merger. U is a multiple of a window's patches."""
        x_UD = self.embed(patch_UC)
        for block in self.blocks:
            x_UD = block(x_UD, places)
        return self.merge(x_UD, places.order_M)


def attend_within_windows(
    q_NUH: jax.Array, k_NUH: jax.Array, v_NUH: jax.Array, window_U: jax.Array, window_patches: int
) -> jax.Array:
    """Attention among the patches of the same window: [N, U, H] float32; q is scaled already.

    A window has at most W = `window_patches` patches, next to each other, so one that touches a run of W
    patches reaches into the runs beside it and no further:

        run        0        1        2        3
        window     0 0 0 1  1 1 1 2  2 3 3 3  4 4 4 4
                     [       1's keys       ]
    """
    num_heads, num_patches, head_dim = q_NUH.shape
    beside = (window_patches, window_patches)
    k_NUH, v_NUH = (jnp.pad(x, ((0, 0), beside, (0, 0))) for x in (k_NUH, v_NUH))
    near_U = jnp.pad(window_U, beside, constant_values=NO_WINDOW)

    def attend_run(run: jax.Array) -> jax.Array:
        here = partial(jax.lax.dynamic_slice_in_dim, start_index=run * window_patches)
        near = partial(here, slice_size=3 * window_patches)
        q_NWH, window_W = (
            here(q_NUH, slice_size=window_patches, axis=1),
            here(window_U, slice_size=window_patches),
        )
        return _attend(q_NWH, near(k_NUH, axis=1), near(v_NUH, axis=1), window_W[:, None] == near(near_U))

    runs = jnp.arange(num_patches // window_patches)
    o_RNWH = jax.lax.map(attend_run, runs, batch_size=WINDOWS_AT_ONCE)
    return o_RNWH.swapaxes(0, 1).reshape(num_heads, num_patches, head_dim)


def attend_over_images(q_NUH: jax.Array, k_NUH: jax.Array, v_NUH: jax.Array, image_U: jax.Array) -> jax.Array:
    """Attention among the patches of the same image: [N, U, H] float32; q is scaled already.

    Scores of Q patches to all are in memory at a time. Runs of padding are passed over.
    """
    num_heads, num_patches, head_dim = q_NUH.shape
    most = max(1, MOST_SCORES // num_patches)
    run_length = next(n for n in QUERIES_AT_ONCE if n <= most and num_patches % n == 0)

    def attend_run(run: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_NQH, image_Q = run
        return jax.lax.cond(
            image_Q[0] >= 0,  # padding is last
            lambda: _attend(q_NQH, k_NUH, v_NUH, image_Q[:, None] == image_U),
            lambda: jnp.zeros(q_NQH.shape, jnp.float32),
        )

    q_RNQH = q_NUH.reshape(num_heads, -1, run_length, head_dim).swapaxes(0, 1)
    o_RNQH = jax.lax.map(attend_run, (q_RNQH, image_U.reshape(-1, run_length)))
    return o_RNQH.swapaxes(0, 1).reshape(num_heads, num_patches, head_dim)


def _attend(q_NQH: jax.Array, k_NUH: jax.Array, v_NUH: jax.Array, sees_QU: jax.Array) -> jax.Array:
    """Softmax over the keys that a query sees, one at least, itself."""
    score_NQU = jnp.where(sees_QU, einsum("nqh,nuh->nqu", q_NQH, k_NUH), -jnp.inf)
    p_NQU = jnp.exp(score_NQU - jnp.max(score_NQU, axis=-1, keepdims=True))
    sum_NQ1 = jnp.sum(p_NQU, axis=-1, keepdims=True)
    p_NQU = to_bf16(p_NQU) if v_NUH.dtype == jnp.bfloat16 else p_NQU
    return einsum("nqu,nuh->nqh", p_NQU, v_NUH) / sum_NQ1
