"""Log-probabilities as each format shows them: SGLang's triples, OpenAI's chat list, its older lists.

    Piece (token ids and TokenScores, aligned)
        -> NativeLogprobs                                  lists of [logprob, id, text] for meta_info
        -> ScoredText -> render_chat, render_completion    of the tokens whose text is out

Used by the routes and the library. A stop string or an unfinished character holds text back while its tokens
are known already; ScoredText holds their scores back with it. Knows nothing of how scores are computed.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from jaxserve.server.pieces import Piece, Sequence
from jaxserve.server.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    LogprobEntry,
    TokenLogprob,
    TopLogprob,
    seal,
)
from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams, TokenScores

T = TypeVar("T")

_LEAST_LOGPROB = -9999.0  # what OpenAI's API says of a token that cannot come; JSON has no -inf
_INLINE_ENTRIES = 2000  # as many logprobs are rendered on the event loop: a few milliseconds


async def render_scored(render: Callable[[list[Piece]], T], pieces: list[Piece]) -> T:
    """What `render` makes of the pieces; on a thread where they hold many logprobs, so that a long rendering
    holds up nobody else."""
    if sum(map(_count_entries, pieces)) <= _INLINE_ENTRIES:
        return render(pieces)
    return await asyncio.to_thread(render, pieces)


def _count_entries(piece: Piece) -> int:
    scores = piece.scores or piece.prompt_scores
    if not scores:
        return 0
    first = scores[0]
    width = 1 + len(first.top_ids) + len(first.watched_logprobs)
    return (len(piece.scores) + len(piece.prompt_scores)) * width


class NativeLogprobs:
    """The logprob fields of one sequence's meta_info, as its pieces come.

    `is_cumulative`: every rendering holds the whole output so far, else what is new since the last.
    The prompt's entries are in every rendering. `is_sealed`: alternatives are finished JSON (see `seal`).
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer,
        *,
        has_text: bool,
        is_cumulative: bool,
        is_sealed: bool = False,
    ):
        self._is_sealed = is_sealed
        self._sampling = sequence.sampling
        self._prompt_ids = sequence.prompt_ids
        self._tokenizer = tokenizer
        self._has_text = has_text
        self._is_cumulative = is_cumulative
        self._num_output = 0
        self._input = _Columns([], [], [])
        self._output = _Columns([], [], [])
        start = self._sampling.logprob_start
        self._next_prompt_id = len(self._prompt_ids) if start is None else start
        if self._next_prompt_id < len(self._prompt_ids):
            self._input.tokens.append(self._entry(None, self._prompt_ids[self._next_prompt_id]))
            self._input.tops.append(None)
            self._input.watched.append(None)

    def render(self, piece: Piece) -> dict[str, Any]:
        """The fields of MetaInfo after one more piece; empty if the request wants no logprobs."""
        sampling = self._sampling
        if sampling.logprobs is None:
            return {}
        if not self._is_cumulative:
            self._output = _Columns([], [], [])
        for scores in piece.prompt_scores:
            self._next_prompt_id += 1
            self._add(self._input, self._prompt_ids[self._next_prompt_id], scores)
        for token_id, scores in zip(piece.token_ids, piece.scores, strict=True):
            self._add(self._output, token_id, scores)
        self._num_output += len(piece.token_ids)
        fields: dict[str, Any] = {
            "input_token_logprobs": self._input.tokens,
            "output_token_logprobs": self._output.tokens,
            "output_token_logprobs_length": self._num_output,
        }
        if sampling.logprobs > 0:
            fields |= {"input_top_logprobs": self._input.tops, "output_top_logprobs": self._output.tops}
        if sampling.logprob_ids:
            fields["input_token_ids_logprobs"] = self._input.watched
            fields["output_token_ids_logprobs"] = self._output.watched
        return fields

    def _add(self, columns: _Columns, token_id: int, scores: TokenScores) -> None:
        num_top = self._sampling.logprobs  # a beam search computes more of them than are shown
        tops = list(zip(scores.top_logprobs, scores.top_ids, strict=True))[:num_top]
        watched = zip(scores.watched_logprobs, self._sampling.logprob_ids, strict=True)
        columns.tokens.append(self._entry(scores.logprob, token_id))
        columns.tops.append(self._finish([self._entry(logprob, top_id) for logprob, top_id in tops]))
        columns.watched.append(
            self._finish([self._entry(logprob, watched_id) for logprob, watched_id in watched])
        )

    def _finish(self, entries: list[LogprobEntry]) -> list[LogprobEntry]:
        return seal(entries) if self._is_sealed else entries

    def _entry(self, logprob: float | None, token_id: int) -> LogprobEntry:
        is_number = logprob is not None and math.isfinite(logprob)
        text = self._tokenizer.token_text(token_id) if self._has_text else None
        return (logprob if is_number else None, token_id, text)


class _Columns(NamedTuple):
    """An entry a position in each; the first position of a prompt has no alternatives."""

    tokens: list[LogprobEntry]
    tops: list[list[LogprobEntry] | None]
    watched: list[list[LogprobEntry] | None]


class ScoredToken(NamedTuple):
    """`offset`: how many characters of the choice's text come before this token's. `scores` is None for the
    first token of a prompt, which nothing precedes."""

    token_id: int
    scores: TokenScores | None
    offset: int


class ScoredText:
    """The scored tokens of one choice, given out with the text that they make.

    `start` is the length of the text before the reply (the prompt, if it is echoed).
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, start: int = 0):
        self._detokenizer = Detokenizer(
            tokenizer, sampling.skip_special_tokens, sampling.spaces_between_special_tokens
        )
        self._start = start
        self._num_sent = 0  # characters of the reply
        self._num_decoded = 0
        self._waiting: deque[ScoredToken] = deque()

    def note(self, piece: Piece) -> None:
        """Hear of a piece, whose text is sent now if it has any."""
        self._num_sent += len(piece.text)
        for token_id, scores in zip(piece.token_ids, piece.scores, strict=True):
            self._waiting.append(ScoredToken(token_id, scores, self._num_decoded))
            self._num_decoded += len(self._detokenizer.push([token_id]))

    def take(self, *, is_last: bool) -> list[ScoredToken]:
        """The tokens whose text is out and that were not taken before; the last time all that are left.

        A token without text goes with the text after it, so that it does not matter how a reply is cut up.
        What was cut off the end of the text, a stop string or token, stands at that end.
        """
        taken: list[ScoredToken] = []
        while self._waiting:
            if not is_last and self._waiting[0].offset >= self._num_sent:
                break
            token = self._waiting.popleft()
            taken.append(token._replace(offset=self._start + min(token.offset, self._num_sent)))
        return taken


def echo_prompt(tokenizer: Tokenizer, prompt: str | list[int], skip_special_tokens: bool) -> str:
    """A prompt as text: as it was sent, or decoded."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(prompt, skip_special_tokens, at_text_start=True)


def place_prompt(
    tokenizer: Tokenizer, prompt: str | list[int], prompt_ids: list[int], skip_special_tokens: bool
) -> list[int]:
    """For each prompt token, how many characters of `echo_prompt` come before its own."""
    if isinstance(prompt, str):
        ids, spans = tokenizer.encode_with_spans(prompt)
        if ids[len(ids) - len(prompt_ids) :] == prompt_ids:  # shorter if nothing was put around it
            return _begin_spans(spans[len(ids) - len(prompt_ids) :], len(prompt))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens, at_text_start=True)
    offsets: list[int] = []
    num_chars = 0
    for token_id in prompt_ids:
        offsets.append(num_chars)
        num_chars += len(detokenizer.push([token_id]))
    return offsets


def _begin_spans(spans: list[tuple[int, int] | None], num_chars: int) -> list[int]:
    """Where each span begins; what is not of the text stands where the next span does, or at the end."""
    begins: list[int] = []
    begin = num_chars
    for span in reversed(spans):
        begin = begin if span is None else span[0]
        begins.append(begin)
    return begins[::-1]


class Spellings:
    """Tokens as chat shows them, text and bytes; kept, because the same few come again and again."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def of(self, token_id: int) -> tuple[str, list[int]]:
        known = self._known.get(token_id)
        if known is None:
            text, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = (text, list(raw))
        return known


def render_chat(tokens: list[ScoredToken], num_top: int, spellings: Spellings) -> ChatLogprobs:
    """OpenAI's `logprobs` of a chat choice or chunk."""
    content: list[TokenLogprob] = []
    for token_id, scores, _ in tokens:
        if scores is None:
            continue
        tops: list[TopLogprob] = []
        for top_id, logprob in list(zip(scores.top_ids, scores.top_logprobs, strict=True))[:num_top]:
            text, raw = spellings.of(top_id)
            logprob = max(logprob, _LEAST_LOGPROB)
            tops.append(TopLogprob(token=text, bytes=raw, logprob=logprob, token_id=top_id))
        text, raw = spellings.of(token_id)
        logprob = max(scores.logprob, _LEAST_LOGPROB)
        entry = TokenLogprob(token=text, bytes=raw, logprob=logprob, token_id=token_id, top_logprobs=tops)
        content.append(seal(entry))
    return ChatLogprobs(content=content)


def render_completion(tokens: list[ScoredToken], num_top: int, tokenizer: Tokenizer) -> CompletionLogprobs:
    """OpenAI's older `logprobs`.

    The alternatives of a position hold its own token too, likely or not, as OpenAI has it. Of tokens that
    are spelled alike the likeliest is named.
    """
    shown = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[], token_ids=[])
    for token_id, scores, offset in tokens:
        shown.text_offset.append(offset)
        shown.tokens.append(tokenizer.token_text(token_id))
        shown.token_ids.append(token_id)
        if scores is None:
            shown.token_logprobs.append(None)
            shown.top_logprobs.append(None)
            continue
        tops: dict[str, float] = {}
        for top_id, logprob in list(zip(scores.top_ids, scores.top_logprobs, strict=True))[:num_top]:
            tops.setdefault(tokenizer.token_text(top_id), max(logprob, _LEAST_LOGPROB))
        tops.setdefault(tokenizer.token_text(token_id), max(scores.logprob, _LEAST_LOGPROB))
        shown.token_logprobs.append(max(scores.logprob, _LEAST_LOGPROB))
        shown.top_logprobs.append(seal(tops))
    return shown
