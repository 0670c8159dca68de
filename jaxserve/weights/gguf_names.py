"""A GGUF file's tensors under Hugging Face names and in Hugging Face row order. Opened by loader.py.

Names follow gguf-py's tensor_mapping.py. Files of the architecture "llama" keep the rows of q and k in the
order of interleaved rotary embeddings (convert_hf_to_gguf.py, `permute`); reads put them back, so that a
family's forward pass sees one layout whatever the file. Knows nothing of jax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.weights.gguf import GgufFile, GgufTensor, open_gguf

_WHOLE_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not known comes back as it is.

    An unknown tensor thereby ends among the leftovers, which the loader reports by name.
    """
    match = _LAYER_NAME.fullmatch(gguf_name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in _WHOLE_MODEL_NAMES and suffix in ("weight", "bias"):
        return f"{_WHOLE_MODEL_NAMES[stem]}.{suffix}"
    return gguf_name


@dataclass(frozen=True, slots=True)
class GgufCheckpoint:
    """What the loader reads: tensors by Hugging Face name, rows as float32.

    `head_rows` names the tensors whose rows are interleaved, with the rows of one head.
    """

    file: GgufFile
    tensors: dict[str, GgufTensor]
    head_rows: dict[str, int]

    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def file_of(self, name: str) -> Path:
        return self.file.path

    def read_rows(self, name: str, first_row: int, num_rows: int) -> np.ndarray:
        """Rows [first_row, first_row + num_rows) of the tensor as float32."""
        tensor = self.tensors[name]
        head_rows = self.head_rows.get(name)
        if head_rows is None:
            return self.file.dequantize_rows(tensor, first_row, num_rows)
        # Row h*R + j*R/2 + i of Hugging Face (head h, half j) is row h*R + 2*i + j of the file, so whole
        # heads are read and the wanted rows gathered out of them.
        first_head_row = first_row // head_rows * head_rows
        end_row = -(-(first_row + num_rows) // head_rows) * head_rows
        heads = self.file.dequantize_rows(tensor, first_head_row, end_row - first_head_row)
        wanted = np.arange(first_row, first_row + num_rows)
        in_head = wanted % head_rows
        half, pair = np.divmod(in_head, head_rows // 2)
        return heads[wanted - in_head - first_head_row + 2 * pair + half]

    def close(self) -> None:
        self.file.close()


def open_gguf_checkpoint(path: Path) -> GgufCheckpoint:
    """Open a GGUF file for the loader. Raises WeightError for a damaged file or unreadable types."""
    file = open_gguf(path)
    tensors = {hf_name(name): tensor for name, tensor in file.tensors.items()}
    head_rows: dict[str, int] = {}
    if file.metadata.get("general.architecture") == "llama":
        num_heads = file.metadata.get("llama.attention.head_count")
        num_kv_heads = file.metadata.get("llama.attention.head_count_kv", num_heads)
        for name, tensor in tensors.items():
            heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(
                name.split(".")[-2] if "." in name else ""
            )
            if heads is None:
                continue
            if not isinstance(heads, int) or heads <= 0 or tensor.shape[0] % (2 * heads):
                raise WeightError(
                    f"Tensor {tensor.name} of {path} has {tensor.shape[0]} rows, which do not divide into "
                    f"the {heads} heads that the file's metadata gives."
                )
            head_rows[name] = tensor.shape[0] // heads
    return GgufCheckpoint(file, tensors, head_rows)
