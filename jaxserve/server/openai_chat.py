"""POST /v1/chat/completions: messages through the model's chat template, replies in OpenAI's shape.

Sampling fields that a request leaves null come from the model's generation_config. Tools are shown to
the model by its template; calls in the reply are not parsed by this version. Knows nothing of how
text is generated.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import UNSET
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.generation import Job, read_rid
from jaxserve.server.openai_protocol import (
    UsageCounter,
    finish_name,
    matched_stop,
    read_cache_salt,
    read_openai_body,
)
from jaxserve.server.pieces import Piece
from jaxserve.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Metadata,
    Usage,
    json_response,
)
from jaxserve.server.sampling import read_chat_sampling
from jaxserve.server.schemas import REFUSED_BY_CHAT, ChatBody, StreamOptions
from jaxserve.server.sse import EventStream
from jaxserve.server.state import AppState, note_of, state_of
from jaxserve.types import FinishReason

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("openai_chat")
    blueprint.add_route(create_chat_completion, "/v1/chat/completions", methods=["POST"])
    return blueprint


async def create_chat_completion(request: Request) -> HTTPResponse | None:
    state = state_of(request)
    body = read_openai_body(request, ChatBody, REFUSED_BY_CHAT, state.settings)
    state.generator.require_ready()
    job = read_job(body, state)
    async with state.generator.open([job]) as run:
        note_of(request).describe(job.rid, run)
        renderer = _Renderer(body, job, state.settings.served_model_name)
        if not body.stream:
            weight_version = state.settings.weight_version
            return json_response(renderer.render_whole(await run.collect(), weight_version))
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                await events.send(*renderer.render_pieces(pieces))
            await events.send(*renderer.render_end())
    return None


def read_job(body: ChatBody, state: AppState) -> Job:
    """Render the messages and gather the parameters; InvalidRequestError where something is odd."""
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    has_length = body.max_tokens is not None or body.max_completion_tokens is not None
    return Job(
        rid=read_rid(body.rid),
        prompt=_render_prompt(body, state),
        prompt_field="messages",
        sampling=read_chat_sampling(body, state.settings.sampling_defaults),
        length_field=field if has_length else None,
        has_special_tokens=True,
        priority=body.priority or 0,
        cache_salt=read_cache_salt(body.cache_salt, body.extra_key),
    )


def _render_prompt(body: ChatBody, state: AppState) -> str:
    for order, message in enumerate(body.messages):
        role = message.get("role")
        if isinstance(role, str) and role.lower() not in ROLES:
            place = f"messages[{order}].role"
            raise InvalidRequestError(
                f"{place} must be one of {', '.join(ROLES)}, got {role!r}.", param=place
            )
    is_continued = bool(body.continue_final_message)
    extra_kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        extra_kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return state.text.chat_template.render(
        body.messages,
        tools=_read_tools(body),
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        extra_kwargs=extra_kwargs,
    )


def _read_tools(body: ChatBody) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return body.tools or None
    if choice == "none":
        return None
    if choice == "required" or isinstance(choice, dict):
        raise InvalidRequestError(
            'tool_choice "required" or a named tool is not supported by this version; use "auto".',
            param="tool_choice",
        )
    raise InvalidRequestError(
        f'tool_choice must be "auto", "none", "required" or an object, got {choice!r}.', param="tool_choice"
    )


class _Renderer:
    """Pieces of one run to a completion or to chunks."""

    def __init__(self, body: ChatBody, job: Job, served_model_name: str):
        self._begun: set[int] = set()  # choices whose role chunk is out
        self._id = job.rid
        self._created = int(time.time())
        self._model = body.model or served_model_name
        self._options = body.stream_options or StreamOptions()
        self._usage = UsageCounter(num_choices_per_prompt=job.sampling.n)

    def render_whole(self, outputs: list[Piece], weight_version: str) -> ChatCompletion:
        self._usage.note(outputs)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=output.index,
                    message=ChatMessage(content=output.text),
                    finish_reason=finish_name(output.finish) or "stop",
                    matched_stop=matched_stop(output.finish),
                )
                for output in outputs
            ],
            usage=self._usage.total(),
            metadata=Metadata(weight_version=weight_version),
        )

    def render_pieces(self, pieces: list[Piece]) -> list[ChatChunk]:
        """For each choice a role chunk, content chunks, and one chunk with the finish reason."""
        self._usage.note(pieces)
        chunks: list[ChatChunk] = []
        for piece in pieces:
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                chunks.append(self._chunk(piece.index, ChatDelta(role="assistant", content="")))
            if piece.text:
                chunks.append(self._chunk(piece.index, ChatDelta(content=piece.text)))
            if piece.finish is not None:
                chunks.append(self._chunk(piece.index, ChatDelta(), piece.finish))
        return chunks

    def render_end(self) -> list[ChatChunk]:
        """The usage chunk, if it was asked for."""
        return [self._wrap([], self._usage.total())] if self._options.include_usage else []

    def _chunk(self, index: int, delta: ChatDelta, finish: FinishReason | None = None) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, finish_reason=finish_name(finish), matched_stop=matched_stop(finish)
        )
        is_counted = self._options.continuous_usage_stats
        return self._wrap([choice], self._usage.of(index) if is_counted else None)

    def _wrap(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )
