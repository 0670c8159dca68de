"""The compile harness itself: what it reads is what a kernel of known size asks for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests.kernels.h200 import assert_fits, compile_for_h200, require_h200_compiler


def test_a_kernel_of_known_size_is_reported():
    require_h200_compiler()
    from jaxserve.kernels_pallas import mosaic

    def double(x_ref, out_ref, x_smem, barrier):
        mosaic.copy_gmem_to_smem(x_ref, x_smem, barrier)
        mosaic.barrier_wait(barrier)
        x_smem[...] = x_smem[...] * 2
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(x_smem, out_ref)
        mosaic.wait_smem_to_gmem(0)

    tile = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    kernel = mosaic.kernel(
        double,
        out_type=tile,
        scratch_types=[mosaic.SMEM(tile.shape, tile.dtype), mosaic.Barrier()],
        kernel_name="double",
    )
    report = compile_for_h200(lambda x: kernel(x) + 1, tile)
    assert report.kernel("double").smem_bytes == 64 * 128 * 4 + 8
    assert_fits(report.kernel("double"), max_registers=128)
    assert (report.temp_bytes, report.alias_bytes) == (0, 0)
    assert "mosaic_gpu_v2" in report.hlo


def test_a_donated_argument_is_seen_as_aliased():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    report = compile_for_h200(lambda x: x + 1, x, donate_argnums=0)
    assert (report.kernels, report.alias_bytes) == ((), 4096)
