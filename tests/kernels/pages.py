"""Pools of the shared cases as the TPU's kernels have them, and back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas.kv_layer import KVLayer
from jaxserve.kernels_pallas.kv_pages import LANES, KVPages, PagesLayout, pack_tokens, scale_of_channel
from tests.kernels.cases import dequantize


def to_pages(kv: KVLayer) -> KVPages:
    """A pool of NumPy arrays as words: of int8 the values that its scales give, rounded once more."""
    num_pages, page_size, num_kv_heads, head_dim = kv.k_PSKH.shape
    layout = PagesLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, kv_dtype=str(kv.k_PSKH.dtype))
    k_TKH, v_TKH = (x.reshape(-1, num_kv_heads, head_dim).astype(np.float32) for x in dequantize(kv))
    words_TJL, scales_TJL = pack_tokens(jnp.asarray(k_TKH), jnp.asarray(v_TKH), layout)
    shape = (num_pages, page_size, -1, LANES)
    return KVPages(
        words_TJL.reshape(shape), None if scales_TJL is None else scales_TJL.reshape(shape), layout
    )


def from_pages(kv: KVPages) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a whole pool, float64 [P, S, K, H]; read bit by bit, in NumPy, for what the pool holds."""
    layout = kv.layout
    words = np.asarray(kv.words_PSJL)
    places = words.shape[:2]
    halves = words.view(np.int8 if layout.kv_dtype == "int8" else jnp.dtype(layout.kv_dtype))
    halves = halves.reshape(*words.shape, 2, layout.chunks_per_row)  # K and V of the chunks of a row
    k, v = (halves[..., i, :].swapaxes(3, 4) for i in range(2))
    k, v = (x.reshape(*places, -1, LANES)[:, :, : layout.num_chunks].astype(np.float64) for x in (k, v))
    if kv.scales_PSJL is not None:
        scales = np.asarray(kv.scales_PSJL).view(jnp.bfloat16).astype(np.float64)
        scales = scales.reshape(*places, -1, layout.scales_per_unit, 2)[:, :, : layout.num_units]
        channels = np.arange(layout.chunks_per_unit * LANES)
        spread = scales[:, :, :, np.asarray(scale_of_channel(jnp.asarray(channels), layout))]
        k, v = (x * spread[..., i].reshape(x.shape) for i, x in enumerate((k, v)))
    width = layout.heads_per_unit * layout.head_dim
    k, v = (x.reshape(*places, layout.num_units, -1)[..., :width] for x in (k, v))
    k, v = (x.reshape(*places, -1, layout.head_dim)[:, :, : layout.num_kv_heads] for x in (k, v))
    return k, v
