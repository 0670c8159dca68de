"""A launched step whose results are still on their way, and how they are read.

Made by runner.py, read by engine/loop.py one step later, so that the device never waits for the host. Scores
are downloaded only if some row of the launch wants them. Knows nothing of how plans are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.runner.buckets import Shape
from jaxserve.runner.programs import StepArrays
from jaxserve.runner.scores import read_scores
from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, PrefillChunk, StepResult
from jaxserve.types import ScoreParams, TokenScores


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk of a launch some of whose rows are scored."""

    index: int  # among the launch's chunks
    num_rows: int
    wanted: ScoreParams


@dataclass(frozen=True, slots=True)
class Launch:
    """One program's run, and what its slots wanted then: a slot may have a new owner when it is read."""

    arrays: StepArrays
    shape: Shape
    num_decode: int
    num_chunks: int
    wanted: tuple[ScoreParams | None, ...]  # by result; () if nobody wants the sampled tokens' scores
    num_steps: tuple[int, ...]  # of a window, by row; () for a single step
    scored_chunks: tuple[ScoredChunk, ...]


def note_launch(
    arrays: StepArrays,
    shape: Shape,
    decode: Sequence[DecodeRow],
    chunks: Sequence[PrefillChunk],
    scores_X: Sequence[ScoreParams | None],
) -> Launch:
    """Begin to download what the launch gives and somebody wants; `scores_X` is what each slot wants."""
    wanted = [_of_output(scores_X[row.slot]) for row in decode for _ in range(row.num_steps)]
    wanted += [_of_output(scores_X[chunk.slot]) if chunk.samples else None for chunk in chunks]
    scored_chunks = []
    for index, chunk in enumerate(chunks):
        if chunk.score_places:
            scores = scores_X[chunk.slot]
            assert scores is not None, f"slot {chunk.slot} scores its prompt without wanting scores"
            scored_chunks.append(ScoredChunk(index, len(chunk.score_places), scores))
    is_any_wanted = any(scores is not None for scores in wanted)
    arrays.token_B.copy_to_host_async()
    if is_any_wanted:
        arrays.score_BZ.copy_to_host_async()
    if scored_chunks and arrays.score_QZ is not None:
        arrays.score_QZ.copy_to_host_async()
    return Launch(
        arrays,
        shape,
        num_decode=len(decode),
        num_chunks=len(chunks),
        wanted=tuple(wanted) if is_any_wanted else (),
        num_steps=tuple(row.num_steps for row in decode) if shape.window > 1 else (),
        scored_chunks=tuple(scored_chunks),
    )


def _of_output(scores: ScoreParams | None) -> ScoreParams | None:
    return scores if scores is not None and scores.of_output else None


@dataclass(frozen=True, slots=True)
class PendingStep:
    launches: tuple[Launch, ...]  # decode before prefill, if they are two
    vocab_size: int

    def read(self) -> StepResult:
        """Wait for the device; everything in the plan's order: decode rows, then chunks.

        A chunk that scores a row whose logits are not numbers yields NO_TOKEN, whatever it samples.
        """
        token_ids: list[int] = []
        scores: list[TokenScores | None] = []
        prompt_scores: list[list[TokenScores]] = []
        for launch in self.launches:
            told = self._read_prompts(launch)
            tokens = _take_rows(launch, np.asarray(launch.arrays.token_B).tolist())
            for chunk, rows in zip(launch.scored_chunks, told, strict=True):
                if any(math.isnan(row.logprob) for row in rows):
                    tokens[launch.num_decode + chunk.index] = NO_TOKEN
            token_ids += tokens
            scores += self._read_sampled(launch)
            prompt_scores += told
        has_scores = any(launch.wanted for launch in self.launches)
        return StepResult(token_ids, scores if has_scores else [], prompt_scores)

    def _read_sampled(self, launch: Launch) -> list[TokenScores | None]:
        if not launch.wanted:
            return [None] * (sum(launch.num_steps) or launch.num_decode + launch.num_chunks)
        rows = _take_rows(launch, list(np.asarray(launch.arrays.score_BZ)))
        return [
            None if wanted is None else read_scores(row[None], wanted, self.vocab_size)[0]
            for row, wanted in zip(rows, launch.wanted, strict=True)
        ]

    def _read_prompts(self, launch: Launch) -> list[list[TokenScores]]:
        told: list[list[TokenScores]] = []
        if launch.scored_chunks:
            score = np.asarray(launch.arrays.score_QZ)
            first = 0
            for chunk in launch.scored_chunks:
                told.append(read_scores(score[first : first + chunk.num_rows], chunk.wanted, self.vocab_size))
                first += chunk.num_rows
        return told


def _take_rows(launch: Launch, rows: list) -> list:
    """Of all padded rows of a launch, or of each step of a window, those of its decode rows and chunks."""
    if launch.num_steps:
        by_row = enumerate(launch.num_steps)
        return [rows[step][row] for row, num_steps in by_row for step in range(num_steps)]
    first_chunk = launch.shape.num_rows
    return rows[: launch.num_decode] + rows[first_chunk : first_chunk + launch.num_chunks]
