"""Flags of CUDA engines that we take without acting on them, so that a known command line starts.

flags.py reads the table: a flag found here is accepted, on the command line or in a YAML file, and a
warning names it and says why it has no meaning here. A flag that is neither here nor in ServerConfig is
an error. Knows nothing of parsing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IgnoredFlag:
    """`num_values` is argparse's nargs: 0 for a switch, 1 for one value, "+" for a list."""

    name: str
    num_values: int | str
    reason: str


def _flags(reason: str, *, switches: str = "", values: str = "", lists: str = "") -> dict[str, IgnoredFlag]:
    words = [(word, 0) for word in switches.split()]
    words += [(word, 1) for word in values.split()]
    words += [(word, "+") for word in lists.split()]
    return {name: IgnoredFlag(name, num_values, reason) for name, num_values in words}


# Keyed by field-style name (underscores), as YAML keys and argparse destinations are.
IGNORED_FLAGS: dict[str, IgnoredFlag] = {
    **_flags(
        "steps are XLA programs compiled for a ladder of sizes, not CUDA graphs",
        switches="disable_cuda_graph disable_cuda_graph_padding enable_cudagraph_gc "
        "enable_profile_cuda_graph disable_piecewise_cuda_graph enable_piecewise_cuda_graph "
        "disable_overlap_cg_plan",
        values="cuda_graph_max_bs cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_backend "
        "piecewise_cuda_graph_max_tokens piecewise_cuda_graph_compiler",
        lists="cuda_graph_bs cuda_graph_bs_decode cuda_graph_bs_prefill piecewise_cuda_graph_tokens",
    ),
    **_flags(
        "kernels are chosen once, for the hardware found at start",
        switches="enable_flashinfer_mla enable_flashmla flashinfer_mla_disable_ragged disable_flashinfer "
        "disable_flashinfer_sampling disable_flashinfer_autotune enable_flashinfer_allreduce_fusion "
        "triton_attention_reduce_in_fp32 disable_shared_experts_fusion disable_chunked_prefix_cache",
        values="attention_backend prefill_attention_backend decode_attention_backend mm_attention_backend "
        "moe_runner_backend fp8_gemm_backend fp4_gemm_backend triton_attention_num_kv_splits "
        "triton_attention_split_tile_size flashinfer_workspace_size",
    ),
    **_flags("sampling is compiled into the step", values="sampling_backend"),
    **_flags(
        "there is no torch here",
        switches="enable_torch_compile enable_torch_compile_debug_mode",
        values="torch_compile_max_bs torchao_config",
    ),
    **_flags(
        "steps always overlap with scheduling",
        switches="disable_overlap_schedule",
        values="scheduler_recv_interval",
    ),
    **_flags(
        "a long prefill goes through the layers in halves wherever that hides sums over devices",
        switches="enable_two_batch_overlap enable_single_batch_overlap",
        values="tbo_token_distribution_threshold",
    ),
    **_flags("prefill chunks and decode rows always share a step", switches="enable_mixed_chunk"),
    **_flags(
        "requests are admitted by the pages that are free, and retraction frees more",
        values="schedule_conservativeness",
    ),
    **_flags(
        "a dead or stuck engine is noticed by its heartbeat", values="watchdog_timeout soft_watchdog_timeout"
    ),
    **_flags(
        "XLA chooses the collectives",
        switches="enable_p2p_check disable_custom_all_reduce enable_mscclpp enable_nccl_nvls enable_symm_mem "
        "enable_torch_symm_mem",
        values="nccl_port",
    ),
    **_flags(
        "JAX chooses the devices (JAX_PLATFORMS and CUDA_VISIBLE_DEVICES narrow the choice)",
        values="device base_gpu_id gpu_id_step",
    ),
    **_flags("code from a model repository is never run", switches="trust_remote_code"),
    **_flags("/metrics is always served", switches="enable_metrics"),
    **_flags("cached tokens are always reported", switches="enable_cache_report"),
    **_flags("there is no such cache", switches="disable_outlines_disk_cache"),
}
