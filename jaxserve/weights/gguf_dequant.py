"""GGML block formats turned into float32, vectorised over blocks with NumPy. Called by gguf.py.

A quantised row is a run of blocks; each block holds a few scales and packed integers. The byte layouts and
formulas are those of ggml-common.h and ggml-quants.c in llama.cpp. Every decoder maps uint8 blocks
[blocks, block_bytes] to float32 [blocks, block_elements]. Knows nothing of files or tensor names.

    Q4_0  d qs          (q - 8) * d                 Q4_K  d dmin sc qs      d*sc*q - dmin*m
    Q4_1  d m qs         q * d + m                  Q5_K  d dmin sc qh qs   as Q4_K, q has a fifth bit
    Q5_0  d qh qs       (q - 16) * d                Q6_K  ql qh sc d        d*sc*(q - 32)
    Q5_1  d m qh qs      q * d + m                  Q8_0  d qs              q * d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SUPER_BLOCK = 256  # elements of a K-quant block


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One ggml type: its name, its block's elements and bytes, and how a block becomes float32."""

    name: str
    block_elements: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, first_byte: int) -> np.ndarray:
    """The float16 at `first_byte` of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, first_byte : first_byte + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] packed bytes to uint8 [..., 2, n]: the low nibbles, then the high ones."""
    out = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])
    return out


def _five_bits(high_bits: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Q5_0 and Q5_1: 4 bytes of fifth bits and 16 bytes of nibbles to uint8 [blocks, 32]."""
    values = _nibbles(packed).reshape(-1, 32)
    fifth = np.unpackbits(np.ascontiguousarray(high_bits).reshape(-1), bitorder="little").reshape(-1, 32)
    fifth <<= 4
    values |= fifth
    return values


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32)


def _decode_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16).astype(np.float32)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return np.left_shift(blocks.view(np.uint16), 16, dtype=np.uint32).view(np.float32)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 2:]).reshape(-1, 32).view(np.int8)
    values -= 8
    return _scaled(values, _half(blocks, 0))


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    out = _scaled(_nibbles(blocks[:, 4:]).reshape(-1, 32), _half(blocks, 0))
    out += _half(blocks, 2)
    return out


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    values = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(np.int8)
    values -= 16
    return _scaled(values, _half(blocks, 0))


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    out = _scaled(_five_bits(blocks[:, 4:8], blocks[:, 8:]), _half(blocks, 0))
    out += _half(blocks, 2)
    return out


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scaled(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _scaled(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = values.astype(np.float32)
    out *= scale
    return out


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of 6-bit scales of Q4_K and Q5_K: float32 scales and mins, each [blocks, 8].

    byte  0..3   scale 0-3 (6 bits), top 2 bits: high bits of scale 4-7
    byte  4..7   min   0-3 (6 bits), top 2 bits: high bits of min   4-7
    byte  8..11  low nibble: low bits of scale 4-7; high nibble: low bits of min 4-7
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _scale_and_shift(blocks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """d*sc*q - dmin*m for the eight sub-blocks of 32 of Q4_K and Q5_K."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales *= _half(blocks, 0)
    mins *= _half(blocks, 2)
    out = _scaled(values.reshape(-1, 8, 32), scales[:, :, None])
    out -= mins[:, :, None]
    return out.reshape(-1, SUPER_BLOCK)


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _scale_and_shift(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)))


def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high_bits = blocks[:, 16:48]
    for sub_block in range(8):
        values[:, sub_block] |= ((high_bits >> sub_block) & 1) << 4
    return _scale_and_shift(blocks, values)


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    # Two halves of 128 elements; each: 64 bytes of nibbles (low, then high) and 32 bytes of bit pairs.
    values = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    bit_pairs = blocks[:, 128:192].reshape(-1, 2, 32)
    for quarter in range(4):
        values[:, :, quarter] |= ((bit_pairs >> (2 * quarter)) & 3) << 4
    signed = values.view(np.int8)
    signed -= 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales *= _half(blocks, 208)
    return _scaled(signed.reshape(-1, 16, 16), scales[:, :, None]).reshape(-1, SUPER_BLOCK)


# By ggml type id (enum ggml_type in ggml.h).
FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _decode_f32),
    1: BlockFormat("F16", 1, 2, _decode_f16),
    2: BlockFormat("Q4_0", 32, 18, _decode_q4_0),
    3: BlockFormat("Q4_1", 32, 20, _decode_q4_1),
    6: BlockFormat("Q5_0", 32, 22, _decode_q5_0),
    7: BlockFormat("Q5_1", 32, 24, _decode_q5_1),
    8: BlockFormat("Q8_0", 32, 34, _decode_q8_0),
    12: BlockFormat("Q4_K", SUPER_BLOCK, 144, _decode_q4_k),
    13: BlockFormat("Q5_K", SUPER_BLOCK, 176, _decode_q5_k),
    14: BlockFormat("Q6_K", SUPER_BLOCK, 210, _decode_q6_k),
    30: BlockFormat("BF16", 1, 2, _decode_bf16),
}

# Types that exist and are not read, so that an error can call them by name.
UNREAD_TYPE_NAMES: dict[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def dequantize_blocks(blocks: np.ndarray, block_format: BlockFormat) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, block_elements]."""
    # A scale of infinity times zero is NaN; the loader reports it, NumPy need not.
    with np.errstate(invalid="ignore", over="ignore"):
        return block_format.decode(blocks)
