"""What the GPU form of the KV write serves; importable everywhere, unlike that form itself."""

from __future__ import annotations

HEAD_DIMS = (64, 128, 256)
ROWS_AT_ONCE = 4  # heads: one a warp
BYTE_DTYPES = ("int8", "float8_e4m3fn")
DTYPES = (*BYTE_DTYPES, "bfloat16", "float32")


def find_write_limit(head_dim: int, num_kv_heads: int, kv_dtype: str) -> str:
    """Why it cannot write such a pool; empty if it can: heads of whole warps of pairs, of bytes in fours."""
    if head_dim not in HEAD_DIMS:
        return f"the KV write wants heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if kv_dtype not in DTYPES:
        return f"the KV write wants pools of {', '.join(DTYPES)}, not {kv_dtype}"
    if kv_dtype in BYTE_DTYPES and num_kv_heads % ROWS_AT_ONCE:
        return f"the KV write wants heads of {kv_dtype} in fours, not {num_kv_heads}"
    return ""
