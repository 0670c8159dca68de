"""POST /v1/chat/completions: messages through the model's chat template, replies in OpenAI's shape.

Sampling fields that a request leaves null come from the model's generation_config. Tools are shown to
the model by its template; calls in the reply are not parsed by this version. Knows nothing of how
text is generated.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from msgspec import UNSET
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.generation import Job, Run, read_rid
from jaxserve.server.logprobs import ScoredText, Spellings, render_chat, render_scored
from jaxserve.server.openai_protocol import (
    Additions,
    UsageCounter,
    cumulative_logprob,
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
    ChatLogprobs,
    ChatMessage,
    Metadata,
    Usage,
    json_response,
)
from jaxserve.server.sampling import (
    check_choices,
    count_choices,
    read_chat_sampling,
    read_dp_rank,
    read_logprobs_mode,
    read_priority,
)
from jaxserve.server.schemas import REFUSED_BY_CHAT, ChatBody, StreamOptions
from jaxserve.server.sse import EventStream
from jaxserve.server.state import AppState, note_of, state_of
from jaxserve.types import SamplingParams

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
        renderer = _Renderer(body, job, run, state)
        if not body.stream:
            return await render_scored(renderer.render_response, await run.collect())
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                await events.send(*await render_scored(renderer.render_pieces, pieces))
            await events.send(*renderer.render_end())
    return None


def read_job(body: ChatBody, state: AppState) -> Job:
    """Render the messages and gather the parameters; InvalidRequestError where something is odd."""
    length_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    has_length = body.max_tokens is not None or body.max_completion_tokens is not None
    settings, reader = state.settings, state.text.images
    sampling = read_chat_sampling(body, settings.sampling_defaults, settings.preferred_sampling_params)
    check_choices(body.best_of, body.num_return_sequences, sampling)
    return Job(
        rid=read_rid(body.rid or body.request_id),
        prompt=_render_prompt(body, state) if body.input_ids is None else body.input_ids,
        prompt_field="messages" if body.input_ids is None else "input_ids",
        sampling=_add_logprobs(body, sampling),
        length_field=length_field if has_length else None,
        field_names={
            "max_new_tokens": length_field,
            "min_new_tokens": "min_tokens",
            "logprobs": "top_logprobs",
        },
        has_special_tokens=not body.add_special_tokens,
        priority=read_priority(body.priority),
        dp_rank=read_dp_rank(body.routed_dp_rank, body.data_parallel_rank),
        cache_salt=read_cache_salt(body.cache_salt, body.extra_key),
        images=() if reader is None else reader.find(body.messages, body.mm_processor_kwargs),
    )


def _add_logprobs(body: ChatBody, sampling: SamplingParams) -> SamplingParams:
    """`logprobs` is the switch and `top_logprobs` the number. The number alone switches on, as xLLM's clients
    expect, and so does a beam search when neither is given."""
    is_scaled = read_logprobs_mode(body.logprobs_mode)
    width = sampling.beam_width
    if body.logprobs is None:
        default = width if width > 1 and body.top_logprobs is None else None
        num_top = body.top_logprobs or default
    elif body.logprobs:
        num_top = body.top_logprobs or 0
    elif body.top_logprobs and width <= 1:
        raise InvalidRequestError(
            f"logprobs must be true for top_logprobs {body.top_logprobs}, got false.", param="logprobs"
        )
    else:
        num_top = None
    if num_top is None:
        return sampling
    return replace(sampling, logprobs=num_top, are_logprobs_scaled=is_scaled)


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

    def __init__(self, body: ChatBody, job: Job, run: Run, state: AppState):
        self._begun: set[int] = set()  # choices whose role chunk is out
        self._id = job.rid
        self._created = int(time.time())
        self._model = body.model or state.settings.served_model_name
        self._weights = state.weights
        self._options = body.stream_options or StreamOptions()
        self._usage = UsageCounter(num_choices_per_prompt=count_choices(job.sampling))
        self._additions = Additions(body, run, state)
        self._spellings = Spellings(state.text.tokenizer)
        self._num_top = job.sampling.logprobs or 0
        # Empty where no logprobs were asked for.
        self._scored = [
            ScoredText(state.text.tokenizer, choice.sampling)
            for choice in run.choices
            if choice.sampling.logprobs is not None
        ]

    def render_response(self, outputs: list[Piece]) -> HTTPResponse:
        return json_response(self.render_whole(outputs))

    def render_whole(self, outputs: list[Piece]) -> ChatCompletion:
        self._usage.note(outputs)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._render_choice(output) for output in outputs],
            usage=self._usage.total(),
            metadata=Metadata(weight_version=self._weights.version),
            sglext=self._additions.extension(self._usage.first),
        )

    def _render_choice(self, output: Piece) -> ChatChoice:
        if self._scored:
            self._scored[output.index].note(output)
        logprobs = self._take_logprobs(output.index, is_last=True)
        return ChatChoice(
            index=output.index,
            message=ChatMessage(content=output.text),
            logprobs=ChatLogprobs(content=[]) if logprobs is None and self._scored else logprobs,
            finish_reason=finish_name(output.finish) or "stop",
            matched_stop=matched_stop(output.finish),
            cumulative_logprob=cumulative_logprob(output),
            prompt_token_ids=self._additions.prompt_token_ids(output),
            response_token_ids=self._additions.token_ids(output),
            meta_info=self._additions.meta_info(output),
        )

    def render_pieces(self, pieces: list[Piece]) -> list[ChatChunk]:
        """For each choice a role chunk, content chunks, and one chunk with the finish reason."""
        self._usage.note(pieces)
        chunks: list[ChatChunk] = []
        for piece in pieces:
            if self._scored:
                self._scored[piece.index].note(piece)
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                chunks.append(self._chunk(piece.index, ChatDelta(role="assistant", content="")))
            if piece.text:
                logprobs = self._take_logprobs(piece.index, is_last=False) if self._scored else None
                chunks.append(self._chunk(piece.index, ChatDelta(content=piece.text), logprobs))
            if piece.finish is not None:
                logprobs = self._take_logprobs(piece.index, is_last=True)
                chunks.append(self._chunk(piece.index, ChatDelta(), logprobs, end=piece))
        return chunks

    def render_end(self) -> list[ChatChunk]:
        """What concerns all choices, if it was asked for: the extension, and last the usage."""
        extension = self._additions.extension(self._usage.first)
        chunks = [] if extension is UNSET else [self._wrap([])]
        for chunk in chunks:
            chunk.sglext = extension
        return [*chunks, self._wrap([], self._usage.total())] if self._options.include_usage else chunks

    def _take_logprobs(self, index: int, *, is_last: bool) -> ChatLogprobs | None:
        """Of the tokens whose text goes out now; None where there are none, or none were asked for."""
        tokens = self._scored[index].take(is_last=is_last) if self._scored else []
        return render_chat(tokens, self._num_top, self._spellings) if tokens else None

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        *,
        end: Piece | None = None,
    ) -> ChatChunk:
        finish = None if end is None else end.finish
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=finish_name(finish),
            matched_stop=matched_stop(finish),
            cumulative_logprob=UNSET if end is None else cumulative_logprob(end),
        )
        is_counted = self._options.continuous_usage_stats
        return self._wrap([choice], self._usage.of(index) if is_counted else None)

    def _wrap(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )
