"""POST /v1/sample: what the model expects where a literal stands in a prompt; xLLM's format and its checks.

    prompt text -> matches -> rows of the sequence -> one prefill with logits at those rows -> a choice each

One engine request computes the prompt and generates nothing. The answer to a match is the likeliest tokens at
the row before it, so nothing is drawn at random and there is nothing to stream. Where xLLM's own service
differs from its documentation, this follows the documentation; docs/api.md names the places. Called by app.py
and by the library. Knows nothing of how text becomes rows (text/selectors.py does).
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_body
from jaxserve.server.generation import Generator, Job, Run, check_text_fits
from jaxserve.server.openai_protocol import check_model
from jaxserve.server.replies import json_response
from jaxserve.server.settings import ServerSettings
from jaxserve.server.state import note_of, state_of
from jaxserve.text.selectors import SelectorMatches, locate_literal
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams, ScoreParams, TokenScores

T = TypeVar("T")

MAX_TOKENS_SHOWN = 5  # also the default of `logprobs`
_MAX_ID_CHARS = 256
_INLINE_CHARS = 4096  # longer texts are tokenised on a thread


class LiteralSelector(msgspec.Struct, kw_only=True):
    """Which places of the prompt are meant: wherever its text holds `value`."""

    type: Annotated[str | None, Meta(description='"literal". Required.')] = None
    value: Annotated[str | None, Meta(description="What to look for in the prompt's text. Required.")] = None


class SampleBody(msgspec.Struct, kw_only=True):
    """POST /v1/sample. What is required may be null here, so that its absence is told in xLLM's order."""

    model: Annotated[str | None, Meta(description="The served model's name, or `default`. Required.")] = None
    prompt: Annotated[str | None, Meta(description="Text. Required.")] = None
    selector: Annotated[
        LiteralSelector | None,
        Meta(description='`{"type": "literal", "value": …}`: every match is asked about. Required.'),
    ] = None
    logprobs: Annotated[int | None, Meta(description="Tokens for each match, 1 to 5. Default: 5.")] = None
    request_id: Annotated[str | None, Meta(description="Sent back as `id`; need not be unique.")] = None


class SampleLogprobs(msgspec.Struct, kw_only=True):
    """The likeliest tokens of one place, best first, in three lists side by side."""

    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float]


class SampleChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str  # the likeliest token
    logprobs: SampleLogprobs
    finish_reason: Literal["selector_match", "empty_logprobs"]


class SampleUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int  # the number of matches
    total_tokens: int


class SampleReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["sample_completion"] = "sample_completion"
    created: int
    model: str
    choices: list[SampleChoice]
    usage: SampleUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A checked request. `reply_id` is the client's request_id, or a new one."""

    reply_id: str
    model: str
    prompt: str
    literal: str
    num_top: int
    num_matches: int


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("sample")
    blueprint.add_route(sample, "/v1/sample", methods=["POST"])
    return blueprint


async def sample(request: Request) -> HTTPResponse:
    state, note = state_of(request), note_of(request)
    question = read_question(decode_body(request.body, SampleBody), state.settings)
    note.details = describe_question(question)

    def note_run(run: Run) -> None:
        note.run = run

    return json_response(await answer(question, state.generator, state.text.tokenizer, note_run))


def read_question(body: SampleBody, settings: ServerSettings) -> Question:
    """xLLM's checks in xLLM's order: of several mistakes the same one is told.

    Raises InvalidRequestError, and ModelNotFoundError for a model that is not served.
    """
    if not body.model:
        raise _is_missing("model")
    if not body.prompt:
        raise _is_missing("prompt")
    if body.selector is None:
        raise _is_missing("selector")
    if body.selector.type != "literal":
        raise InvalidRequestError("selector.type must be literal.", param="selector.type")
    if not body.selector.value:
        raise _is_missing("selector.value")
    num_top = MAX_TOKENS_SHOWN if body.logprobs is None else body.logprobs
    if not 1 <= num_top <= MAX_TOKENS_SHOWN:
        raise InvalidRequestError(
            f"logprobs must be between 1 and {MAX_TOKENS_SHOWN}, got {num_top}.", param="logprobs"
        )
    check_model(body.model, settings)
    if body.request_id and len(body.request_id) > _MAX_ID_CHARS:
        raise InvalidRequestError(
            f"request_id must have at most {_MAX_ID_CHARS} characters, got {len(body.request_id)}.",
            param="request_id",
        )
    return Question(
        reply_id=body.request_id or f"sample-{uuid.uuid4().hex}",
        model=body.model,
        prompt=body.prompt,
        literal=body.selector.value,
        num_top=num_top,
        num_matches=body.prompt.count(body.selector.value),
    )


def make_question(prompt: str, literal: str, num_top: int, settings: ServerSettings) -> Question:
    """The same of plain values, for the library."""
    selector = LiteralSelector(type="literal", value=literal)
    body = SampleBody(model=settings.served_model_name, prompt=prompt, selector=selector, logprobs=num_top)
    return read_question(body, settings)


def _is_missing(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is required.", param=name)


def describe_question(question: Question) -> str:
    """What the log holds of a request: names and counts, nothing of the prompt or the selector."""
    sample_ids = f"0..{question.num_matches - 1}" if question.num_matches else "none"
    request_id, model = ascii(question.reply_id)[1:-1], ascii(question.model)[1:-1]
    return f"request_id={request_id} sample_id={sample_ids} match_count={question.num_matches} model={model}"


async def answer(
    question: Question,
    generator: Generator,
    tokenizer: Tokenizer,
    on_run: Callable[[Run], None] = lambda run: None,
) -> SampleReply:
    """Ask the engine, unless nothing matches: that is answered whatever state the engine is in.

    `on_run` is told of the engine request once it is open. Raises UnavailableError when the engine is not
    ready, OverloadedError at the concurrency limit, InvalidRequestError when the prompt is too long.
    """
    info = generator.require_ready() if question.num_matches else None
    if info is not None:
        check_text_fits(tokenizer, question.prompt, "prompt", info)
    prompt_ids = await _work_on(question.prompt, tokenizer.encode)
    if info is None:
        return _make_reply(question, [], len(prompt_ids))
    matches = SelectorMatches(prompt_ids, [])
    if len(prompt_ids) < info.context_length:  # a longer one is refused below: no work on its matches
        matches = await _work_on(
            question.prompt, lambda prompt: locate_literal(tokenizer, prompt, question.literal)
        )
    rows = sorted({row for row in matches.rows if row is not None})
    job = Job(
        # The client's id need not be unique. It comes first, so that /abort_request finds it.
        rid=f"{question.reply_id}/{uuid.uuid4().hex}",
        prompt=matches.prompt_ids,
        prompt_field="prompt",
        sampling=SamplingParams(max_new_tokens=0, temperature=0.0),
        scores=ScoreParams(prompt_rows=tuple(rows), num_top=question.num_top),
    )
    async with generator.open([job]) as run:
        on_run(run)
        (whole,) = await run.collect()
    scores_by_row: dict[int | None, TokenScores] = dict(zip(rows, whole.prompt_scores, strict=False))
    choices = [
        _make_choice(sample_id, scores_by_row.get(row), tokenizer)
        for sample_id, row in enumerate(matches.rows)
    ]
    return _make_reply(question, choices, len(matches.prompt_ids))


async def _work_on(text: str, function: Callable[[str], T]) -> T:
    """Call a function of the text at once, or on a thread if it is long."""
    return function(text) if len(text) <= _INLINE_CHARS else await asyncio.to_thread(function, text)


def _make_reply(question: Question, choices: list[SampleChoice], num_prompt_tokens: int) -> SampleReply:
    usage = SampleUsage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=len(choices),
        total_tokens=num_prompt_tokens + len(choices),
    )
    return SampleReply(
        id=question.reply_id, created=int(time.time()), model=question.model, choices=choices, usage=usage
    )


def _make_choice(sample_id: int, scores: TokenScores | None, tokenizer: Tokenizer) -> SampleChoice:
    """The best tokens of one match, special ones spelled out; empty where the model said nothing: no row
    stands before the match, the request was aborted, or its logits are not numbers."""
    tops = [] if scores is None else list(zip(scores.top_ids, scores.top_logprobs, strict=True))
    finite = [(token_id, logprob) for token_id, logprob in tops if math.isfinite(logprob)]
    logprobs = SampleLogprobs(
        tokens=[tokenizer.token_text(token_id) for token_id, _ in finite],
        token_ids=[token_id for token_id, _ in finite],
        token_logprobs=[logprob for _, logprob in finite],
    )
    return SampleChoice(
        index=sample_id,
        text=logprobs.tokens[0] if finite else "",
        logprobs=logprobs,
        finish_reason="selector_match" if finite else "empty_logprobs",
    )
