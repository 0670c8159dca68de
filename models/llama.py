"""Llama: the family to read first. RMS norm, rotary positions, grouped-query attention, gated MLP.

Serves LlamaForCausalLM checkpoints (Llama 2 and 3, SmolLM2, TinyLlama). Other families say at the top
of their file how they differ from this one. Reference: transformers, models/llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from jaxserve.kernels_pallas.add_norm.ref import normalize_heads, rms_norm
from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.models.hf_config import read_hf_config
from jaxserve.models.interface import KVLayer, KVPool, ParamSpec, StepBatch, TensorSource
from jaxserve.models.layer_loop import Blocks, run_layers
from jaxserve.models.layers import (
    RopeScaling,
    attend,
    rope_frequencies,
    rope_tables,
)
from jaxserve.models.products import LayerProducts
from jaxserve.models.quant import embed, matmul
from jaxserve.models.sharding import Division, cut_channels, cut_evenly, cut_heads, repeat_cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_context: int
    ties_embeddings: bool
    has_qkv_bias: bool = False
    has_head_norms: bool = False  # on each head of q and of k

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """Read config.json's contents; raises ValueError on a field this family does not know."""
        return cls(**read_hf_config(hf, supports={"attention_bias": (False,), "mlp_bias": (False,)}))


def param_specs(cfg: Config) -> list[ParamSpec]:
    """The served parameters and where each comes from; q/k/v and gate/up are fused while loading."""
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim

    def matrix(path: str, axes: tuple[str | None, str | None], *sources: tuple[str, int, int]) -> ParamSpec:
        tensors = tuple(TensorSource(f"{name}.weight", (rows, cols)) for name, rows, cols in sources)
        return ParamSpec(path=path, kind="matrix", sources=tensors, axes=axes)

    def vector(path: str, axis: str | None, *sources: tuple[str, int]) -> ParamSpec:
        tensors = tuple(TensorSource(name, (length,)) for name, length in sources)
        return ParamSpec(path=path, kind="vector", sources=tensors, axes=(axis,))

    embedding = TensorSource("model.embed_tokens.weight", (cfg.vocab_size, cfg.width))
    specs = [ParamSpec(path="embed_VD", kind="embedding", sources=(embedding,), axes=("vocab", None))]
    for i in range(cfg.num_layers):
        here, hf = f"layers.{i}", f"model.layers.{i}"
        q, k, v = (f"{hf}.self_attn.{name}_proj" for name in "qkv")
        gate, up = (f"{hf}.mlp.{name}_proj" for name in ("gate", "up"))
        qkv = ((q, q_width, cfg.width), (k, kv_width, cfg.width), (v, kv_width, cfg.width))
        specs += [
            vector(f"{here}.attn_norm_D", None, (f"{hf}.input_layernorm.weight", cfg.width)),
            matrix(f"{here}.w_qkv_FD", ("qkv", None), *qkv),
            matrix(f"{here}.w_o_DF", (None, "heads"), (f"{hf}.self_attn.o_proj", cfg.width, q_width)),
            vector(f"{here}.mlp_norm_D", None, (f"{hf}.post_attention_layernorm.weight", cfg.width)),
            matrix(
                f"{here}.w_gate_up_FD",
                ("gate_up", None),
                (gate, cfg.mlp_width, cfg.width),
                (up, cfg.mlp_width, cfg.width),
            ),
            matrix(f"{here}.w_down_DF", (None, "mlp"), (f"{hf}.mlp.down_proj", cfg.width, cfg.mlp_width)),
        ]
        if cfg.has_qkv_bias:
            biases = ((f"{q}.bias", q_width), (f"{k}.bias", kv_width), (f"{v}.bias", kv_width))
            specs.append(vector(f"{here}.b_qkv_F", "qkv", *biases))
        for name in "qk" if cfg.has_head_norms else "":
            norm = f"{hf}.self_attn.{name}_norm.weight"
            specs.append(vector(f"{here}.{name}_norm_H", None, (norm, cfg.head_dim)))
    specs.append(vector("final_norm_D", None, ("model.norm.weight", cfg.width)))
    if not cfg.ties_embeddings:
        specs.append(matrix("head_VD", ("vocab", None), ("lm_head", cfg.vocab_size, cfg.width)))
    return specs


def divide(cfg: Config, num_devices: int) -> Division:
    """Heads, MLP channels and vocabulary over devices; everything else is whole on each."""
    attention = cut_heads(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, num_devices)
    mlp = cut_channels(cfg.mlp_width, num_devices)
    local_cfg = replace(
        cfg,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        mlp_width=mlp.own_length,
    )
    cuts = {
        "heads": attention.heads,
        "qkv": attention.qkv,
        "mlp": mlp,
        "gate_up": repeat_cut(mlp, cfg.mlp_width, 2),
        "vocab": cut_evenly(cfg.vocab_size, num_devices),
    }
    return Division(num_devices=num_devices, local_cfg=local_cfg, cuts=cuts)


class Layer(nnx.Module):
    """One block's parameters. Biases of q, k and v and norms of their heads are None in models without."""

    def __init__(self, params: Mapping[str, Any], prefix: str):
        def find(name: str) -> nnx.Param | None:
            path = f"{prefix}.{name}"
            return nnx.Param(params[path]) if path in params else None

        self.attn_norm_D = nnx.Param(params[f"{prefix}.attn_norm_D"])
        self.w_qkv_FD = nnx.Param(params[f"{prefix}.w_qkv_FD"])
        self.b_qkv_F = find("b_qkv_F")
        self.q_norm_H, self.k_norm_H = find("q_norm_H"), find("k_norm_H")
        self.w_o_DF = nnx.Param(params[f"{prefix}.w_o_DF"])
        self.mlp_norm_D = nnx.Param(params[f"{prefix}.mlp_norm_D"])
        self.w_gate_up_FD = nnx.Param(params[f"{prefix}.w_gate_up_FD"])
        self.w_down_DF = nnx.Param(params[f"{prefix}.w_down_DF"])


class Model(nnx.Module):
    """Built from loaded parameters by path (see `param_specs`); `kernels` is chosen at start.

    Where devices share the model (`divide`), it is one device's part of it, config included.
    """

    def __init__(self, cfg: Config, params: Mapping[str, Any], kernels: KernelSet):
        self.cfg = cfg
        self.kernels = kernels
        self.embed_VD = nnx.Param(params["embed_VD"])
        self.is_stacked = "layers.attn_norm_D" in params  # parameters of all layers in one array
        prefixes = ["layers"] if self.is_stacked else [f"layers.{i}" for i in range(cfg.num_layers)]
        self.layers = nnx.List([Layer(params, prefix) for prefix in prefixes])
        self.final_norm_D = nnx.Param(params["final_norm_D"])
        self.head_VD = None if cfg.ties_embeddings else nnx.Param(params["head_VD"])

    def __call__(self, batch: StepBatch, kv: KVPool) -> tuple[jax.Array, KVPool]:
        """One step: the hidden states of all its tokens [T, D] float32, and the pool with their K and V.

        `compute_logits` turns the rows that are wanted into logits. The residual stream is float32
        whatever the weights are; products read the weights' own dtype.
        """
        cfg = self.cfg
        frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        rope = rope_tables(batch.positions_T, frequencies)
        x_TD = embed(batch.token_ids_T, self.embed_VD.get_value(), self.kernels.shards)
        return self.run_layers(x_TD, batch._replace(rope=rope), kv)

    def run_layers(self, x_TD: jax.Array, batch: StepBatch, kv: KVPool) -> tuple[jax.Array, KVPool]:
        """The blocks, on embedded tokens and with the rotary tables of any family that shares them."""
        cfg = self.cfg
        graphdef, _ = nnx.split(self.layers[0])

        # Jits of their own, so that they are traced and lowered once for all layers; XLA inlines them.
        @jax.jit
        def run_attention(params: nnx.State, x_TD: jax.Array, y_TD: Any, kv: KVLayer, batch: StepBatch):
            layer = nnx.merge(graphdef, params)
            products = LayerProducts(self.kernels, batch.layer, cfg.norm_eps)
            block = products.find_block(x_TD, y_TD, layer, kv, batch)
            if block is not None:  # few decode rows on a TPU: what follows is one launch
                return block(num_heads=cfg.num_heads, scale=cfg.head_dim**-0.5)
            x_TD, qkv_TF = products.norm_multiply(
                x_TD, y_TD, layer.attn_norm_D, layer.w_qkv_FD, layer.b_qkv_F
            )
            if layer.q_norm_H is not None and layer.k_norm_H is not None:
                head_norms = products.pick(layer.q_norm_H), products.pick(layer.k_norm_H)
                qkv_TF = normalize_heads(qkv_TF, *head_norms, cfg.num_heads, cfg.norm_eps)
            o_TF, kv = attend(self.kernels, qkv_TF, kv, batch, cfg.num_heads, cfg.head_dim**-0.5)
            return x_TD, products.multiply(o_TF, layer.w_o_DF), kv

        @jax.jit
        def run_mlp(params: nnx.State, x_TD: jax.Array, y_TD: Any, batch: StepBatch):
            layer = nnx.merge(graphdef, params)
            products = LayerProducts(self.kernels, batch.layer, cfg.norm_eps)
            return products.norm_mlp(x_TD, y_TD, layer.mlp_norm_D, layer.w_gate_up_FD, layer.w_down_DF)

        states = [nnx.state(layer) for layer in self.layers]
        layers = states[0] if self.is_stacked else states
        blocks = Blocks(run_attention, run_mlp)
        return run_layers(blocks, layers, x_TD, kv, batch, self.kernels, cfg.num_heads)

    def compute_logits(self, x_BD: jax.Array) -> jax.Array:
        """Float32 logits [B, V] of some of the rows that `__call__` returned: final norm, then the head.

        Of this device's part of the vocabulary, which may reach behind its end (`count_own` of Shards).
        """
        h_BD = rms_norm(x_BD, self.final_norm_D.get_value(), self.cfg.norm_eps)
        head_VD = self.embed_VD if self.head_VD is None else self.head_VD
        return matmul(h_BD, head_VD.get_value())
