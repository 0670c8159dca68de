"""POST /v1/completions: plain prompts (text or ids, one or many), OpenAI's text_completion shape.

Defaults are OpenAI's: 16 tokens, temperature 1; generation_config is not read. Knows nothing of
messages or templates.
"""

from __future__ import annotations

import time

from msgspec import UNSET
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.generation import Job
from jaxserve.server.openai_protocol import (
    UsageCounter,
    finish_name,
    matched_stop,
    read_openai_body,
)
from jaxserve.server.pieces import Piece
from jaxserve.server.replies import Completion, CompletionChoice, Metadata, Usage, json_response
from jaxserve.server.request_lists import name_prompts, read_id_lists, spread
from jaxserve.server.sampling import read_completion_sampling
from jaxserve.server.schemas import REFUSED_BY_COMPLETIONS, CompletionBody, StreamOptions
from jaxserve.server.sse import EventStream
from jaxserve.server.state import note_of, state_of


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("openai_completions")
    blueprint.add_route(create_completion, "/v1/completions", methods=["POST"])
    return blueprint


async def create_completion(request: Request) -> HTTPResponse | None:
    state = state_of(request)
    body = read_openai_body(request, CompletionBody, REFUSED_BY_COMPLETIONS, state.settings)
    jobs, rid = read_jobs(body)
    async with state.generator.open(jobs) as run:
        note_of(request).describe(rid, run)
        renderer = _Renderer(body, rid, jobs[0].sampling.n, state.settings.served_model_name)
        if not body.stream:
            outputs = await run.collect()
            return json_response(renderer.render_whole(outputs, state.settings.weight_version))
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                await events.send(*renderer.render_pieces(pieces))
            await events.send(*renderer.render_end())
    return None


def read_jobs(body: CompletionBody) -> tuple[list[Job], str]:
    """The prompts of a body and the id of the reply; InvalidRequestError where something is odd."""
    sampling = read_completion_sampling(body)
    if body.best_of is not None and body.best_of > sampling.n:
        raise InvalidRequestError(
            f"best_of above n ({sampling.n}) is not supported by this version, got {body.best_of}.",
            param="best_of",
        )
    prompts, is_list = _read_prompts(body.prompt)
    salts = spread(body.cache_salt or body.extra_key or "", len(prompts), is_list, "cache_salt")
    rids = name_prompts(body.rid, len(prompts), is_list)
    jobs = [
        Job(
            rid=rid,
            prompt=prompt,
            prompt_field="prompt",
            sampling=sampling,
            length_field=None if body.max_tokens is None else "max_tokens",
            priority=body.priority or 0,
            cache_salt=salt,
        )
        for prompt, salt, rid in zip(prompts, salts, rids, strict=True)
    ]
    return jobs, body.rid if isinstance(body.rid, str) and body.rid else rids[0]


def _read_prompts(prompt: str | list[str | int | list[int]]) -> tuple[list[str | list[int]], bool]:
    """Prompts as text or ids, and whether there was a list of them."""
    if not prompt:
        raise InvalidRequestError("Prompt cannot be empty.", param="prompt")
    if isinstance(prompt, str):
        return [prompt], False
    texts = [item for item in prompt if isinstance(item, str)]
    if not texts:
        id_lists, is_list = read_id_lists(prompt, "prompt")
        return [*id_lists], is_list
    if len(texts) < len(prompt):
        raise InvalidRequestError(
            "prompt must be a list of texts or of token ids, got a mixture.", param="prompt"
        )
    if not all(texts):
        raise InvalidRequestError("Prompt cannot be empty.", param="prompt")
    return [*texts], True


class _Renderer:
    """Pieces of one run to a completion or to chunks of it."""

    def __init__(self, body: CompletionBody, rid: str, num_choices: int, served_model_name: str):
        self._id = rid
        self._created = int(time.time())
        self._model = body.model or served_model_name
        self._options = body.stream_options or StreamOptions()
        self._usage = UsageCounter(num_choices_per_prompt=num_choices)

    def render_whole(self, outputs: list[Piece], weight_version: str) -> Completion:
        self._usage.note(outputs)
        completion = self._wrap([_render_choice(output) for output in outputs], self._usage.total())
        completion.metadata = Metadata(weight_version=weight_version)
        return completion

    def render_pieces(self, pieces: list[Piece]) -> list[Completion]:
        """Text as it comes, with the finish reason on a choice's last chunk."""
        self._usage.note(pieces)
        is_counted = self._options.continuous_usage_stats
        return [
            self._wrap([_render_choice(piece)], self._usage.of(piece.index) if is_counted else None)
            for piece in pieces
            if piece.text or piece.finish is not None
        ]

    def render_end(self) -> list[Completion]:
        """The usage chunk, if it was asked for."""
        return [self._wrap([], self._usage.total())] if self._options.include_usage else []

    def _wrap(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )


def _render_choice(piece: Piece) -> CompletionChoice:
    return CompletionChoice(
        index=piece.index,
        text=piece.text,
        finish_reason=finish_name(piece.finish),
        matched_stop=matched_stop(piece.finish),
    )
