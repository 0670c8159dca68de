"""What is known of each chip: memory, bandwidth, arithmetic and links, from its maker's pages.

TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, "System architecture" (peak compute a chip,
HBM capacity and bandwidth, interchip interconnect bandwidth). H200: NVIDIA's data sheet (SXM; dense figures,
half of those "with sparsity"). HBM that programs may use: what libtpu 0.0.52 names when a program is too
large; of an H200, what the driver leaves of its 141 GB.

Figures are of one device as JAX shows it. The compiler of libtpu shows a v4 and a tpu7x chip as two devices
that share its memory, bandwidth and links. Links are counted in one direction, all of a device's together.
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
    link_bytes_per_s: float
    hop_s: float  # latency of one hop between neighbours
    slices: tuple[str, ...]  # that can be had, smallest first
    devices_per_chip: int = 1
    is_switched: bool = False  # links lead to a switch, and not to neighbours
    compute_capability: str = ""

    @property
    def num_axes(self) -> int:
        return self.slices[0].count("x") + 1


FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE_SLICES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
ICI_HOP_S = 1e-6  # jax-ml.github.io/scaling-book, "Rooflines": about 1 us a hop
NVLINK_HOP_S = 2e-6  # an assumption: nothing was measured

CHIPS: tuple[Chip, ...] = (
    Chip(
        name="v4",
        device_kind="TPU v4",
        platform="tpu",
        hbm_bytes=int(15.25 * GIB),
        hbm_bytes_per_s=1228e9 / 2,
        bf16_flops=275e12 / 2,
        int8_flops=275e12 / 2,
        link_bytes_per_s=300e9 / 2,
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
        int8_flops=394e12,
        link_bytes_per_s=200e9,
        hop_s=ICI_HOP_S,
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
        link_bytes_per_s=600e9,
        hop_s=ICI_HOP_S,
        slices=CUBE_SLICES,
    ),
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        platform="tpu",
        hbm_bytes=int(31.24 * GIB),
        hbm_bytes_per_s=1640e9,
        bf16_flops=918e12,
        int8_flops=1836e12,
        link_bytes_per_s=448e9,
        hop_s=ICI_HOP_S,
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
        link_bytes_per_s=600e9 / 2,
        hop_s=ICI_HOP_S,
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
