"""One engine request as text pieces, and many of them as one stream.

`read_sequence` joins the engine's token deltas with the text room's TextStream; `merge_streams` runs
several at once for batches and n > 1. Used by generation.py alone. Knows nothing of HTTP, prompts or
limits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from jaxserve.errors import ERROR_BY_STATUS, InternalError, JaxserveError
from jaxserve.images import PlacedImage
from jaxserve.metrics import ServerMetrics
from jaxserve.server.engine_port import EnginePort
from jaxserve.text.output import TextDelta, TextStream
from jaxserve.text.stop_regex import SearchAllowance
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import (
    BeamResult,
    FinishReason,
    SamplingParams,
    TokenDelta,
    TokenParams,
    TokenScores,
)

_YIELD_AFTER_S = 0.001  # of work on one sequence, so that deltas that wait in line do not hold up the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One request to the engine: the i-th choice of one prompt, or all beams of a search.

    `index` is its place in the reply; `num_choices` places from there on are its own. The time for
    `stop_regex` searches is one `allowance` for all sequences of a call.
    """

    index: int
    num_choices: int
    rid: str
    prompt_ids: list[int]
    params: TokenParams
    sampling: SamplingParams
    priority: int
    dp_rank: int | None
    cache_salt: str
    stream_interval: int
    allowance: SearchAllowance
    images: tuple[PlacedImage, ...] = ()


class Piece(msgspec.Struct, frozen=True, gc=False):
    """New text and token ids of one choice; the counts are totals so far.

    `scores` has an entry for each of `token_ids` if they were asked for. `prompt_scores` come with the first
    piece that holds a token or the finish. `cumulative_logprob` is that of a whole beam.
    """

    index: int
    text: str
    token_ids: list[int]
    finish: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_retractions: int
    prompt_scores: list[TokenScores] = []
    scores: list[TokenScores] = []
    cumulative_logprob: float | None = None
    num_drafted: int = 0  # tokens that were guessed and verified, and those of them that came true
    num_accepted: int = 0


def join_pieces(pieces: list[Piece]) -> Piece:
    """Successive pieces of one sequence as one piece."""
    last = pieces[-1]
    if len(pieces) == 1:
        return last
    token_ids: list[int] = []
    prompt_scores: list[TokenScores] = []
    scores: list[TokenScores] = []
    for piece in pieces:
        token_ids += piece.token_ids
        prompt_scores += piece.prompt_scores
        scores += piece.scores
    text = "".join([piece.text for piece in pieces])
    return msgspec.structs.replace(
        last, text=text, token_ids=token_ids, prompt_scores=prompt_scores, scores=scores
    )


async def read_sequence(
    engine: EnginePort, tokenizer: Tokenizer, sequence: Sequence, metrics: ServerMetrics, started_s: float
) -> AsyncGenerator[list[Piece], None]:
    """Submit one sequence and yield its text, a piece at a time; the last has `finish`. A search yields all
    its beams at once.

    `started_s` is when the request came in (time.perf_counter), from which latencies are measured.

    A stop string ends the sequence here, and closing the engine's stream aborts it there. Raises the
    error behind a finish of kind "abort", and whatever `EnginePort.generate` raises.
    """
    index, stream_interval = sequence.index, sequence.stream_interval
    text_stream = TextStream(tokenizer, sequence.sampling, sequence.allowance)
    timer = _Timer(metrics, started_s)
    num_output_tokens = 0
    busy_s = 0.0
    held: list[Piece] = []
    deltas = engine.generate(
        sequence.rid,
        sequence.prompt_ids,
        sequence.params,
        priority=sequence.priority,
        cache_salt=sequence.cache_salt,
        images=sequence.images,
        dp_rank=sequence.dp_rank,
    )
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.finish is not None:
                _raise_failure(delta.finish)
            began_s = time.perf_counter()
            output = text_stream.push(delta.token_ids, delta.finish)
            now_s = time.perf_counter()
            busy_s += now_s - began_s
            if busy_s > _YIELD_AFTER_S:
                busy_s = 0.0
                await asyncio.sleep(0)
            num_output_tokens += len(output.token_ids)
            piece = _make_piece(index, output, delta, num_output_tokens)
            timer.note(delta, piece, now_s)
            if delta.beams:
                yield read_beams(delta.beams, join_pieces([*held, piece]), tokenizer, sequence.sampling)
                return
            if stream_interval <= 1 and not held and num_output_tokens:
                yield [piece]  # nearly every piece of a stream
            else:
                held.append(piece)
                if _is_due(held, num_output_tokens, stream_interval):
                    yield [join_pieces(held)]
                    held = []
            if piece.finish is not None:
                return
    raise InternalError(f"The engine ended request {sequence.rid} without giving a reason.")


def _make_piece(index: int, output: TextDelta, delta: TokenDelta, num_output_tokens: int) -> Piece:
    """A piece of what the text room made of a delta."""
    return Piece(
        index,
        output.text,
        output.token_ids,
        output.finish,
        delta.num_prompt_tokens,
        delta.num_cached_tokens,
        num_output_tokens,
        delta.num_retractions,
        delta.prompt_scores,
        delta.scores[: len(output.token_ids)] if delta.scores else delta.scores,
        num_drafted=delta.num_drafted,
        num_accepted=delta.num_accepted,
    )


def read_beams(
    beams: list[BeamResult], search: Piece, tokenizer: Tokenizer, sampling: SamplingParams
) -> list[Piece]:
    """The hypotheses of a finished search as finished pieces, best first; `search` is the piece that told
    them, with the prompt's counts and scores."""
    pieces: list[Piece] = []
    for rank, beam in enumerate(beams):
        output = TextStream(tokenizer, sampling).push(beam.token_ids, beam.finish)
        pieces.append(
            msgspec.structs.replace(
                search,
                index=search.index + rank,
                text=output.text,
                token_ids=beam.token_ids,
                finish=beam.finish,
                num_output_tokens=len(beam.token_ids),
                scores=beam.scores,
                cumulative_logprob=beam.cumulative_logprob,
            )
        )
    return pieces


def _is_due(held: list[Piece], num_output_tokens: int, stream_interval: int) -> bool:
    """The first token goes out at once, the last too, those between in groups of stream_interval.

    Before the first token there are at most scores of the prompt, and those wait for it.
    """
    if held[-1].finish is not None:
        return True
    if num_output_tokens == 0:
        return False
    if stream_interval <= 1:
        return True
    num_held = sum(len(piece.token_ids) for piece in held)
    return num_held >= stream_interval or num_held == num_output_tokens


def _raise_failure(finish: FinishReason) -> None:
    """An abort that the user did not ask for is an error with a status of its own."""
    if finish.kind == "abort" and finish.http_status:
        error_type: type[JaxserveError] = ERROR_BY_STATUS.get(finish.http_status, InternalError)
        raise error_type(finish.message)


class _Timer:
    """Turns the arrival times of one sequence's deltas into histogram samples."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_num_tokens", "_started_s")

    def __init__(self, metrics: ServerMetrics, started_s: float):
        self._metrics = metrics
        self._started_s = started_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_tokens = 0

    def note(self, delta: TokenDelta, piece: Piece, now_s: float) -> None:
        # A search tells all its tokens at once, at its end.
        num_new = delta.num_output_tokens if delta.beams else len(delta.token_ids)
        if num_new:
            if self._num_tokens == 0:
                self._first_s = now_s
                self._metrics.observe_first_token(now_s - self._started_s)
            else:
                self._metrics.observe_next_tokens(now_s - self._last_s, num_new)
            self._last_s = now_s
            self._num_tokens += num_new
        if piece.finish is not None:
            decode_s = self._last_s - self._first_s
            num_output = delta.num_output_tokens if delta.beams else piece.num_output_tokens
            self._metrics.observe_finish(
                now_s - self._started_s, decode_s, piece.num_prompt_tokens, num_output
            )


def merge_streams(streams: list[AsyncGenerator[list[Piece], None]]) -> AsyncGenerator[list[Piece], None]:
    """Run the streams side by side; yield whatever has arrived, joined per sequence.

    A reader that falls behind gets fewer, larger pieces. The first failure ends all of them, and so
    does closing this generator.
    """
    return streams[0] if len(streams) == 1 else _merge_several(streams)


async def _merge_several(
    streams: list[AsyncGenerator[list[Piece], None]],
) -> AsyncGenerator[list[Piece], None]:
    arrived: asyncio.Queue[list[Piece] | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, arrived)) for stream in streams]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    num_running = len(tasks)
    try:
        while num_running:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            by_index: dict[int, list[Piece]] = {}
            for item in items:
                if isinstance(item, asyncio.Task):
                    item.result()  # raises what ended the stream, if something did
                    num_running -= 1
                    continue
                for piece in item:
                    by_index.setdefault(piece.index, []).append(piece)
            if by_index:
                yield [join_pieces(pieces) for pieces in by_index.values()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncIterator[list[Piece]], arrived: asyncio.Queue) -> None:
    async for pieces in stream:
        arrived.put_nowait(pieces)
