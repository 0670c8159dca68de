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


@dataclass(frozen=True, slots=True, kw_only=True)
class XlaSetting:
    """Options that belong together, for one platform."""

    platform: str
    options: Options
    why: str
    measured: str = NOT_MEASURED  # on what, when, against what
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
)


def chosen_options(platform: str) -> Options:
    """What the step programs of a platform are compiled with."""
    chosen = [setting.options for setting in SETTINGS if setting.is_chosen and setting.platform == platform]
    return {name: value for options in chosen for name, value in options.items()}


def untried_settings() -> list[XlaSetting]:
    """Those that wait for a measurement."""
    return [setting for setting in SETTINGS if setting.measured == NOT_MEASURED]
