"""XLA's own settings for the step programs: which are chosen, why, and what was measured.

One list, so that nobody sets a flag elsewhere and nobody tries twice what was tried. A setting is chosen only
once its measurement stands beside it; scripts/bench_step.py --try-xla-flags measures those that are not. They
are options of one compilation, so XLA_FLAGS in the environment stays the user's.

Left out on purpose: the cache of autotuned products, which jax keeps beside its compilation cache by itself;
collectives in command buffers, which others saw hang.
"""

from __future__ import annotations

from dataclasses import dataclass

Options = dict[str, str | int | bool]

# What jax 0.11.2 captures by itself. A list given as an option replaces it.
CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
NOT_MEASURED = "not measured yet"
# What libtpu 0.0.52 says of its programs for a chip that is not there (scripts/compile_slices.py). An option
# that a libtpu does not know is an error; 0.0.42, of jax 0.10.2, and 0.0.50, of jax 0.12.0, know these.
COMPILED = "compiled for v5e, v5p, v6e and tpu7x with jax 0.12.0.1, run on none: "
OVERLAPPED = (
    COMPILED + "a prefill of 2,048 tokens with the sums that nothing hides, links at their peak, in 142 ms "
    "instead of 231 (Qwen2.5-72B, v5e:4x4), 40 instead of 51 (7B, v5e:2x2) and 102 instead of 138 (72B, "
    "tpu7x:2x2x1)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class XlaSetting:
    """Options that belong together, for one platform."""

    platform: str
    options: Options
    device_kinds: tuple[str, ...] = ()  # as JAX calls them; none named: all of the platform
    of_halves: bool = False  # for programs alone that go through the layers in halves (models/layer_loop.py)
    why: str
    measured: str = NOT_MEASURED  # on what, when, against what; for TPUs, what their compiler says
    is_chosen: bool = False


SETTINGS = (
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_enable_command_buffer": f"{CAPTURED},CONDITIONAL,WHILE"},
        why="a step has three conditionals and, with prefill, a loop: outside of command buffers each costs "
        "a round trip of its predicate to the host",
    ),
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_graph_min_graph_size": 1},
        why="short runs of kernels between the conditionals are captured too",
    ),
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_command_buffer_update_mode": "SKIP_TEMP"},
        why="temporaries keep their addresses, so fewer nodes of the graph are updated a step",
    ),
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
        why="kernels that do not wait for one another may overlap: the small ones beside attention",
    ),
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_enable_triton_gemm": False},
        why="cuBLASLt for every product: with few rows its split-K may read weights faster",
    ),
    XlaSetting(
        platform="gpu",
        options={"xla_gpu_enable_pdl": True, "xla_gpu_enable_pdl_launch": True},
        why="a kernel starts its prologue while the one before it ends (programmatic dependent launch)",
    ),
    XlaSetting(
        platform="tpu",
        options={"xla_tpu_scoped_vmem_limit_kib": 48 << 10},
        why="larger blocks of weights for a product, which arrive while others are multiplied; 16 MiB is the "
        "default of v5e and v5p, 32 MiB that of v6e and tpu7x, and the least VMEM of a core is 64 MiB",
        measured=COMPILED + "of Qwen2.5-7B on four devices, the layers of a decode step of 8 rows in 4.96 ms "
        "instead of 5.60 (v5e), 2.08 instead of 2.47 (v5p), 2.78 instead of 2.87 (v6e), and of a prefill of "
        "2,048 tokens in 38 instead of 47, 16 instead of 19, 11.7 instead of 14.5. Code grows by a third at "
        "most",
        is_chosen=True,
    ),
    XlaSetting(
        platform="tpu",
        options={"xla_tpu_control_large_2nd_minor_layout_for_x16": False},
        why="a tpu7x multiplies bf16 in tiles of 16 rows, but parameters come in tiles of 8: all weights "
        "would be copied in every step",
        measured=COMPILED + "of Qwen2.5-7B on four devices of a tpu7x 3 MB of temporaries instead of 3,266; "
        "the others' programs are the same",
        is_chosen=True,
    ),
    XlaSetting(
        platform="tpu",
        of_halves=True,
        options={"xla_jf_crs_combiner_threshold_in_bytes": 0},
        why="the sums of both halves would become one, which nothing is left to hide",
        measured=OVERLAPPED,
        is_chosen=True,
    ),
    XlaSetting(
        platform="tpu",
        device_kinds=("TPU v5 lite",),
        of_halves=True,
        options={
            "xla_enable_async_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        },
        why="a v5e has no other core for sums: their steps are taken within the products beside them. The "
        "compiler refuses this for a v5p and a v6e",
        measured=OVERLAPPED,
        is_chosen=True,
    ),
    XlaSetting(
        platform="tpu",
        device_kinds=("TPU v5", "TPU v6 lite"),
        of_halves=True,
        options={
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
            "xla_tpu_enable_all_experimental_scheduler_features": True,
        },
        why="sums go on on the sparse cores, as by default on a tpu7x, and begin as soon as they can. "
        "Not chosen before it has run: on these chips others give libtpu a configuration of the chip with it "
        "(LIBTPU_INIT_ARGS=--2a886c8_chip_config_name=megachip_tccontrol). LEAST_HALVING_DEVICES of "
        "kernels_pallas/dispatch.py goes with it",
        measured=COMPILED
        + "a prefill as above in 86 ms instead of 110 (Qwen2.5-72B, v5p:2x2x2) and 78 instead "
        "of 118 (v6e:2x4)",
    ),
)


def chosen_options(platform: str, device_kind: str = "", is_halved: bool = False) -> Options:
    """What the step programs of a platform are compiled with; those that go through the layers in halves get
    more."""
    chosen = [
        setting.options
        for setting in SETTINGS
        if setting.is_chosen
        and setting.platform == platform
        and (not setting.device_kinds or device_kind in setting.device_kinds)
        and (is_halved or not setting.of_halves)
    ]
    return {name: value for options in chosen for name, value in options.items()}


def untried_settings() -> list[XlaSetting]:
    """Those that wait for a measurement."""
    return [setting for setting in SETTINGS if setting.measured == NOT_MEASURED]
