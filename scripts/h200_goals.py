"""What bench_h200.py's figures are held against. Knows nothing of how they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Peer = tuple[str, Mapping[str, Any], str]  # a part, fields of its rows, and the figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure of one row: of `part`, the first whose fields are those of `row`.

    With peers it is how many times as fast as the best of them that is.
    """

    name: str
    part: str
    row: Mapping[str, Any]
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    peers: tuple[Peer, ...] = ()

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
        part="decode",
        row={**DECODE, "case": "32 rows of 4k"},
        figure="tb_per_s",
        at_least=3.4,
    ),
    Goal(
        name="decode attention, 1 row of 4k, without the loop around it: us",
        part="decode",
        row={**DECODE, "case": "1 row of 4k"},
        figure="net_us",
        at_most=15,
    ),
    Goal(
        name="prefill attention, 8k: TFLOP/s",
        part="prefill",
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
    Goal(
        name="decode attention, 32 rows of 4k: times the best peer's speed",
        part="decode",
        row={**DECODE, "case": "32 rows of 4k"},
        figure="us",
        at_least=0.95,
        peers=(("peers", {"case": "32 rows of 4k"}, "us"), ("torch", {"case": "32 rows of 4k"}, "us")),
    ),
    Goal(
        name="prefill attention, 8k: times cuDNN's speed",
        part="prefill",
        row={**PREFILL, "case": "8k"},
        figure="us",
        at_least=0.85,
        peers=(
            ("prefill", {**PREFILL, "case": "8k"}, "cudnn_us"),
            ("peers", {"peer": "cudnn", "case": "8k"}, "us"),
        ),
    ),
    Goal(  # the issue asks for it through HTTP
        name="step of 256 sequences: times transformers' decoding",
        part="step",
        row={"shape": "256 rows", **PLAIN},
        figure="tokens_per_s",
        at_least=3,
        peers=(("generation", {"sequences": 256}, "decode_tps"),),
    ),
]


def find_figure(goal: Goal, parts: Mapping[str, Any]) -> float | None:
    """None where it was not measured."""
    figures = _list_figures(parts, (goal.part, goal.row, goal.figure))
    if not figures or not goal.peers:
        return figures[0] if figures else None
    others = [figure for peer in goal.peers for figure in _list_figures(parts, peer)]
    if not others:
        return None
    return min(others) / figures[0] if goal.figure == "us" else figures[0] / max(others)


def _list_figures(parts: Mapping[str, Any], peer: Peer) -> list[float]:
    part, fields, figure = peer
    rows = parts.get(part, {}).get("rows", [])
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    return [row[figure] for row in found if row.get(figure) is not None]
