"""Qwen3-MoE: Llama with norms on the heads of q and k, and experts in place of each MLP.

Serves Qwen3MoeForCausalLM checkpoints whose every layer has experts (30B-A3B, 235B-A22B, Coder). A router
gives each token to the likeliest of them (models/experts.py). Devices share every expert: each holds a part
of its channels. Reference: transformers, models/qwen3_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from jaxserve.kernels_pallas.add_norm.ref import normalize_heads, rms_norm
from jaxserve.kernels_pallas.dispatch import KernelSet
from jaxserve.models.experts import choose_experts, run_experts
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
from jaxserve.models.quant import embed, matmul, operand_dtype
from jaxserve.models.sharding import Division, cut_channels, cut_evenly, cut_heads, repeat_cut

SUPPORTS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
READ = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"})
# They describe a sliding window, which use_sliding_window turns off, and what matters in training only.
IGNORES = frozenset({"sliding_window", "max_window_layers", "router_aux_loss_coef", "output_router_logits"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    vocab_size: int
    width: int
    expert_width: int
    num_experts: int
    num_chosen: int  # experts of a token
    normalizes_shares: bool  # of the chosen experts, to add up to 1
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_context: int
    ties_embeddings: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """Read config.json's contents; raises ValueError on a field this family does not know."""
        fields = read_hf_config(hf, supports=SUPPORTS, ignores=IGNORES | READ)
        del fields["mlp_width"]  # of layers without experts, which there are none of
        return cls(
            **fields,
            expert_width=hf["moe_intermediate_size"],
            num_experts=hf["num_experts"],
            num_chosen=hf["num_experts_per_tok"],
            normalizes_shares=bool(hf.get("norm_topk_prob", False)),
        )


def param_specs(cfg: Config) -> list[ParamSpec]:
    """The served parameters and where each comes from; the experts' matrices lie below each other."""
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim

    def matrix(path: str, axes: tuple[str | None, str | None], *sources: tuple[str, int, int]) -> ParamSpec:
        tensors = tuple(TensorSource(f"{name}.weight", (rows, cols)) for name, rows, cols in sources)
        return ParamSpec(path=path, kind="matrix", sources=tensors, axes=axes)

    def vector(path: str, name: str, length: int) -> ParamSpec:
        tensor = TensorSource(f"{name}.weight", (length,))
        return ParamSpec(path=path, kind="vector", sources=(tensor,), axes=(None,))

    embedding = TensorSource("model.embed_tokens.weight", (cfg.vocab_size, cfg.width))
    specs = [ParamSpec(path="embed_VD", kind="embedding", sources=(embedding,), axes=("vocab", None))]
    for i in range(cfg.num_layers):
        here, hf = f"layers.{i}", f"model.layers.{i}"
        q, k, v = (f"{hf}.self_attn.{name}_proj" for name in "qkv")
        qkv = ((q, q_width, cfg.width), (k, kv_width, cfg.width), (v, kv_width, cfg.width))
        experts = [f"{hf}.mlp.experts.{e}" for e in range(cfg.num_experts)]
        gate_up = [f"{expert}.{name}_proj" for expert in experts for name in ("gate", "up")]
        down = [f"{expert}.down_proj" for expert in experts]
        router = matrix(f"{here}.w_router_ED", (None, None), (f"{hf}.mlp.gate", cfg.num_experts, cfg.width))
        gate_up_sources = ((name, cfg.expert_width, cfg.width) for name in gate_up)
        down_sources = ((name, cfg.width, cfg.expert_width) for name in down)
        specs += [
            vector(f"{here}.attn_norm_D", f"{hf}.input_layernorm", cfg.width),
            matrix(f"{here}.w_qkv_FD", ("qkv", None), *qkv),
            vector(f"{here}.q_norm_H", f"{hf}.self_attn.q_norm", cfg.head_dim),
            vector(f"{here}.k_norm_H", f"{hf}.self_attn.k_norm", cfg.head_dim),
            matrix(f"{here}.w_o_DF", (None, "heads"), (f"{hf}.self_attn.o_proj", cfg.width, q_width)),
            vector(f"{here}.mlp_norm_D", f"{hf}.post_attention_layernorm", cfg.width),
            replace(router, kind="exact"),
            replace(
                matrix(f"{here}.w_gate_up_FD", ("gate_up", None), *gate_up_sources), experts=cfg.num_experts
            ),
            replace(matrix(f"{here}.w_down_DF", (None, "mlp"), *down_sources), experts=cfg.num_experts),
        ]
    specs.append(vector("final_norm_D", "model.norm", cfg.width))
    if not cfg.ties_embeddings:
        specs.append(matrix("head_VD", ("vocab", None), ("lm_head", cfg.vocab_size, cfg.width)))
    return specs


def divide(cfg: Config, num_devices: int) -> Division:
    """Heads, vocabulary and the channels of every expert over devices; everything else is whole on each."""
    attention = cut_heads(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, num_devices)
    mlp = cut_channels(cfg.expert_width, num_devices)
    local_cfg = replace(
        cfg,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        expert_width=mlp.own_length,
    )
    cuts = {
        "heads": attention.heads,
        "qkv": attention.qkv,
        "mlp": mlp,
        "gate_up": repeat_cut(mlp, cfg.expert_width, 2 * cfg.num_experts),
        "vocab": cut_evenly(cfg.vocab_size, num_devices),
    }
    return Division(num_devices=num_devices, local_cfg=local_cfg, cuts=cuts)


class Layer(nnx.Module):
    """One block's parameters."""

    def __init__(self, params: Mapping[str, Any], prefix: str):
        self.attn_norm_D = nnx.Param(params[f"{prefix}.attn_norm_D"])
        self.w_qkv_FD = nnx.Param(params[f"{prefix}.w_qkv_FD"])
        self.b_qkv_F = None
        self.q_norm_H = nnx.Param(params[f"{prefix}.q_norm_H"])
        self.k_norm_H = nnx.Param(params[f"{prefix}.k_norm_H"])
        self.w_o_DF = nnx.Param(params[f"{prefix}.w_o_DF"])
        self.mlp_norm_D = nnx.Param(params[f"{prefix}.mlp_norm_D"])
        self.w_router_ED = nnx.Param(params[f"{prefix}.w_router_ED"])
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
        """One step, as in llama.py: the hidden states of all its tokens [T, D] float32, and the pool."""
        cfg = self.cfg
        frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        rope = rope_tables(batch.positions_T, frequencies)
        x_TD = embed(batch.token_ids_T, self.embed_VD.get_value(), self.kernels.shards)
        batch = batch._replace(rope=rope)
        graphdef, _ = nnx.split(self.layers[0])
        grouped = self.kernels.grouped_matmul

        # Jits of their own, so that they are traced and lowered once for all layers; XLA inlines them.
        @jax.jit
        def run_attention(params: nnx.State, x_TD: jax.Array, y_TD: Any, kv: KVLayer, batch: StepBatch):
            layer = nnx.merge(graphdef, params)
            products = LayerProducts(self.kernels, batch.layer, cfg.norm_eps)
            block = products.find_block(x_TD, y_TD, layer, kv, batch)
            if block is not None:  # few decode rows on a TPU: what follows is one launch
                return block(num_heads=cfg.num_heads, scale=cfg.head_dim**-0.5)
            x_TD, qkv_TF = products.norm_multiply(x_TD, y_TD, layer.attn_norm_D, layer.w_qkv_FD)
            head_norms = products.pick(layer.q_norm_H), products.pick(layer.k_norm_H)
            qkv_TF = normalize_heads(qkv_TF, *head_norms, cfg.num_heads, cfg.norm_eps)
            o_TF, kv = attend(self.kernels, qkv_TF, kv, batch, cfg.num_heads, cfg.head_dim**-0.5)
            return x_TD, products.multiply(o_TF, layer.w_o_DF), kv

        @jax.jit
        def run_mlp(params: nnx.State, x_TD: jax.Array, y_TD: Any, batch: StepBatch):
            layer = nnx.merge(graphdef, params)
            products = LayerProducts(self.kernels, batch.layer, cfg.norm_eps)
            dtype = operand_dtype(layer.w_gate_up_FD.get_value())
            x_TD, h_TD = products.add_norm(x_TD, y_TD, layer.mlp_norm_D, dtype)
            logits_TE = matmul(h_TD, products.pick(layer.w_router_ED))
            chosen = choose_experts(logits_TE, cfg.num_chosen, cfg.normalizes_shares)
            find = products.pick if grouped is None else products.leave_in_stack
            gate_up, down = find(layer.w_gate_up_FD), find(layer.w_down_DF)
            first = 0 if batch.layer is None else batch.layer * cfg.num_experts
            return x_TD, run_experts(h_TD, *chosen, gate_up, down, cfg.num_experts, grouped, first)

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
