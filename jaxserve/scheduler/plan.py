"""StepPlan: everything the runner needs for one step, as plain numbers.

Made by scheduler/schedule.py, run by runner/runner.py, and one day broadcast to the other hosts. It
serialises, prints and compares; it holds no arrays and no references to requests.

One step computes decode rows (one token each, fed from the device's own memory of the last sampled
token) and prefill chunks (runs of known tokens), in that order:

    decode[0] .. decode[R-1]   chunks[0] tokens | chunks[1] tokens | ...

Every decode row, and every chunk with `samples`, yields one sampled token. Sampled tokens come back in
the same order: all decode rows, then all chunks (chunks that do not sample yield a value to ignore).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from jaxserve.types import TokenParams


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A slot given to a sequence: its sampling state before the first chunk of this step runs."""

    slot: int
    params: TokenParams
    prompt_ids: list[int]
    output_ids: list[int]  # not empty when the sequence was retracted before


class DecodeRow(msgspec.Struct, frozen=True):
    slot: int
    seq_id: int
    epoch: int  # the sequence's count of retractions when this row was planned
    position: int  # of the token fed in this step; the row attends to position + 1 tokens
    page_id: int  # of the page that holds `position`


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    slot: int
    seq_id: int
    epoch: int
    start: int  # position of token_ids[0]
    token_ids: list[int]
    page_ids: list[int]  # the sequence's whole block table, long enough for start + len(token_ids)
    samples: bool  # whether the chunk's last token is the last known one, so that its logits are sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    step: int
    inits: tuple[SlotInit, ...]
    decode: tuple[DecodeRow, ...]
    chunks: tuple[PrefillChunk, ...]

    @property
    def num_chunk_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.chunks


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold. The bucket ladders list only programs that are compiled and ready."""

    page_size: int
    max_rows: int  # running sequences, = number of slots
    max_chunks: int  # prefill chunks in one step
    max_chunk_tokens: int  # prefill tokens in one step
    token_buckets: tuple[int, ...]  # ascending sizes of the prefill token axis
