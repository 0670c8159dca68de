"""What bench_h200.py's figures are held against. Knows nothing of how they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure of one row: of `part`, the first whose fields are those of `row`."""

    name: str
    part: str
    row: Mapping[str, Any]
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def is_met(self, figure: float) -> bool:
        return figure >= self.at_least if self.at_least is not None else figure <= (self.at_most or 0.0)


DECODE, PREFILL = {"kernel": "decode"}, {"kernel": "prefill"}
PLAIN = {"xla_flags": ""}
GOALS = [
    Goal(
        name="decode attention, 32 rows of 4k: TB/s",
        part="kernels",
        row={**DECODE, "case": "32 rows of 4k"},
        figure="tb_per_s",
        at_least=3.4,
    ),
    Goal(
        name="decode attention, 1 row of 4k: us",
        part="kernels",
        row={**DECODE, "case": "1 row of 4k"},
        figure="us",
        at_most=15,
    ),
    Goal(
        name="prefill attention, 8k: TFLOP/s",
        part="kernels",
        row={**PREFILL, "case": "8k"},
        figure="tflops",
        at_least=450,
    ),
    Goal(
        name="sampling, 256 rows, top-k and top-p: us",
        part="kernels",
        row={"kernel": "sampling", "case": "top-k 50, top-p 0.9"},
        figure="us",
        at_most=400,
    ),
    Goal(
        name="step of 7B, 1 sequence: share of the copy rate",
        part="step",
        row={"shape": "1 row", **PLAIN},
        figure="copy_share",
        at_least=0.80,
    ),
    Goal(
        name="64 sequences at 1k: share of the copy rate",
        part="step",
        row={"shape": "64 rows", **PLAIN},
        figure="copy_share",
        at_least=0.75,
    ),
    Goal(
        name="prefill of 8k, 7B: share of the product rate",
        part="step",
        row={"shape": "8192 tokens", **PLAIN},
        figure="matmul_share",
        at_least=0.55,
    ),
]


def find_figure(goal: Goal, parts: Mapping[str, Any]) -> float | None:
    """None where it was not measured."""
    for row in parts.get(goal.part, {}).get("rows", []):
        if all(row.get(name) == value for name, value in goal.row.items()):
            return row.get(goal.figure)
    return None
