"""What is known of each chip: memory, bandwidth, arithmetic and links, from its maker's pages.

TPUs: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, "System architecture", as of November
2026: peak compute, HBM capacity and bandwidth, and "bidirectional inter-chip interconnect bandwidth" a chip
(v5e 400 GB/s, v5p 1200, v6e 800, tpu7x 1200), of which half goes out, over 4 or 6 links. The page of v4 names
no such figure, nor that of v5p int8: those, which axes are rings, and the latency of a hop, are the JAX
scaling book's (jax-ml.github.io/scaling-book, "How to think about TPUs" and "Sharded matrices"). H200:
NVIDIA's data sheet of the SXM (141 GB, 4.8 TB/s, NVLink 900 GB/s both ways; products at half of what it
prints, which is "with sparsity"). HBM that programs may use: what libtpu 0.0.52 names when a program is too
large; of an H200, what the driver leaves.

Figures are of one device as JAX shows it. The compiler of libtpu shows a v4 and a tpu7x chip as two devices
that share its memory, bandwidth and links.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One kind of accelerator. Rates are peaks a second, of one device."""

    name: str
    device_kind: str  # as JAX calls it
    platform: str  # "tpu" or "gpu"
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops: float
    int8_flops: float
    link_bytes_per_s: float  # of one link, in one direction
    hop_s: float  # latency of one hop between neighbours
    slices: tuple[str, ...]  # that can be had, smallest first
    devices_per_chip: int = 1
    is_switched: bool = False  # its link leads to a switch, and not to neighbours
    estimate_hz: float = 0.0  # cycles of the compiler's that make a second of its own (see estimate.py)
    launch_cycles: int = 0  # those that it takes its smallest operations for
    compute_capability: str = ""

    @property
    def num_axes(self) -> int:
        return self.slices[0].count("x") + 1

    def wraps(self, length: int, dims: tuple[int, ...]) -> bool:
        """Whether an axis of a slice of `dims` is a ring: whole axes of flat pods, and those of cubes."""
        if self.num_axes == 2:
            return length == POD_AXIS
        return all(dim % CUBE_AXIS == 0 for dim in dims)


FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE_SLICES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
POD_AXIS, CUBE_AXIS = 16, 4  # chips, from which on links lead from an axis' end to its beginning
ICI_HOP_S = 1e-6
NVLINK_HOP_S = 2e-6  # an assumption: nothing was measured

CHIPS: tuple[Chip, ...] = (
    Chip(
        name="v4",
        device_kind="TPU v4",
        platform="tpu",
        hbm_bytes=int(15.25 * GIB),
        hbm_bytes_per_s=1200e9 / 2,
        bf16_flops=275e12 / 2,
        int8_flops=275e12 / 2,
        link_bytes_per_s=45e9 / 2,
        hop_s=ICI_HOP_S,
        slices=CUBE_SLICES,
        devices_per_chip=2,
    ),
    Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        platform="tpu",
        hbm_bytes=int(15.75 * GIB),
        hbm_bytes_per_s=819e9,
        bf16_flops=197e12,
        int8_flops=393e12,
        link_bytes_per_s=50e9,
        hop_s=ICI_HOP_S,
        estimate_hz=1.88e9,
        launch_cycles=1830,
        slices=FLAT_SLICES,
    ),
    Chip(
        name="v5p",
        device_kind="TPU v5",
        platform="tpu",
        hbm_bytes=int(95.73 * GIB),
        hbm_bytes_per_s=2765e9,
        bf16_flops=459e12,
        int8_flops=918e12,
        link_bytes_per_s=100e9,
        hop_s=ICI_HOP_S,
        estimate_hz=2.50e9,
        launch_cycles=2120,
        slices=CUBE_SLICES,
    ),
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        platform="tpu",
        hbm_bytes=int(31.24 * GIB),
        hbm_bytes_per_s=1638e9,
        bf16_flops=918e12,
        int8_flops=1836e12,
        link_bytes_per_s=100e9,
        hop_s=ICI_HOP_S,
        estimate_hz=2.10e9,
        launch_cycles=2120,
        slices=FLAT_SLICES,
    ),
    Chip(
        name="tpu7x",
        device_kind="TPU7x",
        platform="tpu",
        hbm_bytes=int(94.74 * GIB),
        hbm_bytes_per_s=7380e9 / 2,
        bf16_flops=2307e12 / 2,
        int8_flops=2307e12 / 2,  # its faster products are of fp8
        link_bytes_per_s=100e9 / 2,
        hop_s=ICI_HOP_S,
        estimate_hz=3.17e9,
        launch_cycles=2300,
        slices=CUBE_SLICES,
        devices_per_chip=2,
    ),
    Chip(
        name="h200",
        device_kind="NVIDIA H200",
        platform="gpu",
        hbm_bytes=139 * GIB,
        hbm_bytes_per_s=4800e9,
        bf16_flops=989e12,
        int8_flops=1979e12,
        link_bytes_per_s=450e9,
        hop_s=NVLINK_HOP_S,
        slices=("1", "2", "4", "8"),
        is_switched=True,
        compute_capability="9.0",
    ),
)
