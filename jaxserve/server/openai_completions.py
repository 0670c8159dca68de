"""POST /v1/completions: plain prompts (text or ids, one or many), OpenAI's text_completion shape.

Defaults are OpenAI's: 16 tokens, temperature 1; generation_config is not read. Knows nothing of
messages or templates.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import cached_property

from msgspec import UNSET
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.generation import Job, Run, check_num_sequences
from jaxserve.server.logprobs import (
    ScoredText,
    ScoredToken,
    echo_prompt,
    place_prompt,
    render_completion,
    render_scored,
)
from jaxserve.server.openai_protocol import (
    Additions,
    UsageCounter,
    cumulative_logprob,
    finish_name,
    matched_stop,
    read_openai_body,
)
from jaxserve.server.pieces import Piece, Sequence, join_pieces
from jaxserve.server.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Metadata,
    Usage,
    json_response,
)
from jaxserve.server.request_lists import name_prompts, read_id_lists, spread
from jaxserve.server.sampling import (
    check_choices,
    count_choices,
    read_completion_sampling,
    read_dp_rank,
    read_logprobs_mode,
    read_priority,
)
from jaxserve.server.schemas import REFUSED_BY_COMPLETIONS, CompletionBody, StreamOptions
from jaxserve.server.settings import ServerSettings
from jaxserve.server.sse import EventStream
from jaxserve.server.state import AppState, note_of, state_of
from jaxserve.text.fill_in_middle import find_fill_in_middle
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams, TokenScores

FIELD_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("openai_completions")
    blueprint.add_route(create_completion, "/v1/completions", methods=["POST"])
    return blueprint


async def create_completion(request: Request) -> HTTPResponse | None:
    state = state_of(request)
    body = read_openai_body(request, CompletionBody, REFUSED_BY_COMPLETIONS, state.settings)
    jobs, rid = read_jobs(body, state.settings)
    if body.suffix:
        jobs = await asyncio.to_thread(add_suffix, jobs, body, state.text.tokenizer)
    async with state.generator.open(jobs) as run:
        note_of(request).describe(rid, run)
        renderer = _Renderer(body, rid, jobs, run, state)
        if not body.stream:
            return await render_scored(renderer.render_response, await run.collect())
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                await events.send(*await render_scored(renderer.render_pieces, pieces))
            await events.send(*renderer.render_end())
    return None


def read_jobs(body: CompletionBody, settings: ServerSettings) -> tuple[list[Job], str]:
    """The prompts of a body and the id of the reply; InvalidRequestError where something is odd."""
    sampling = _add_logprobs(body, read_completion_sampling(body, settings.preferred_sampling_params))
    check_choices(body.best_of, body.num_return_sequences, sampling)
    prompts, is_list = _read_prompts(body.prompt)
    check_num_sequences(len(prompts), settings)
    salts = spread(body.cache_salt or body.extra_key or "", len(prompts), is_list, "cache_salt")
    rid = body.rid or body.request_id
    rids = name_prompts(rid, len(prompts), is_list)
    priority = read_priority(body.priority)
    dp_rank = read_dp_rank(body.routed_dp_rank, body.data_parallel_rank)
    jobs = [
        Job(
            rid=prompt_rid,
            prompt=prompt,
            prompt_field="prompt",
            sampling=sampling,
            length_field=None if body.max_tokens is None else "max_tokens",
            field_names=FIELD_NAMES,
            has_special_tokens=body.add_special_tokens is False,
            priority=priority,
            dp_rank=dp_rank,
            cache_salt=salt,
        )
        for prompt, salt, prompt_rid in zip(prompts, salts, rids, strict=True)
    ]
    return jobs, rid if isinstance(rid, str) and rid else rids[0]


def _add_logprobs(body: CompletionBody, sampling: SamplingParams) -> SamplingParams:
    """The number is the switch; a beam search shows them unless told a number. Echoed prompts are scored."""
    is_scaled = read_logprobs_mode(body.logprobs_mode)
    if body.echo and sampling.beam_width > 1:
        raise InvalidRequestError("echo cannot be combined with beam_width above 1.", param="echo")
    default = sampling.beam_width if sampling.beam_width > 1 else None
    num_top = default if body.logprobs is None else body.logprobs
    if num_top is None:
        return sampling
    start = 0 if body.echo else None
    return replace(sampling, logprobs=num_top, logprob_start=start, are_logprobs_scaled=is_scaled)


def add_suffix(jobs: list[Job], body: CompletionBody, tokenizer: Tokenizer) -> list[Job]:
    """Ask for what belongs between each prompt and the suffix. InvalidRequestError where that cannot be."""
    fill_in_middle = find_fill_in_middle(tokenizer)
    if fill_in_middle is None:
        raise InvalidRequestError(
            "suffix is not supported by this model: its vocabulary has no fill-in-the-middle tokens.",
            param="suffix",
        )
    if body.echo:
        raise InvalidRequestError("echo cannot be combined with suffix.", param="echo")
    asked = jobs[0].sampling  # one for all prompts
    sampling = replace(asked, stop_token_ids=(*asked.stop_token_ids, *fill_in_middle.end_ids))
    filled: list[Job] = []
    for job in jobs:
        if not isinstance(job.prompt, str):
            raise InvalidRequestError("suffix needs the prompt as text, got token ids.", param="suffix")
        prompt_ids = fill_in_middle.encode(tokenizer, job.prompt, body.suffix or "")
        filled.append(replace(job, prompt=prompt_ids, sampling=sampling))
    return filled


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

    def __init__(self, body: CompletionBody, rid: str, jobs: list[Job], run: Run, state: AppState):
        self._id = rid
        self._created = int(time.time())
        self._model = body.model or state.settings.served_model_name
        self._weights = state.weights
        self._options = body.stream_options or StreamOptions()
        num_choices = count_choices(jobs[0].sampling)
        self._usage = UsageCounter(num_choices_per_prompt=num_choices)
        self._additions = Additions(body, run, state)
        tokenizer = state.text.tokenizer
        prompts: list[_EchoedPrompt | None] = [None] * len(jobs)
        if body.echo:
            firsts = run.choices[::num_choices]
            prompts = [_EchoedPrompt(job, first, tokenizer) for job, first in zip(jobs, firsts, strict=True)]
        self._choices = [
            _Choice(sequence, prompts[index // num_choices], tokenizer)
            for index, sequence in enumerate(run.choices)
        ]

    def render_response(self, outputs: list[Piece]) -> HTTPResponse:
        return json_response(self.render_whole(outputs))

    def render_whole(self, outputs: list[Piece]) -> Completion:
        self._usage.note(outputs)
        choices = [self._render_choice(output) for output in outputs]
        for choice, output in zip(choices, outputs, strict=True):
            choice.prompt_token_ids = self._additions.prompt_token_ids(output)
            choice.meta_info = self._additions.meta_info(output)
        completion = self._wrap(choices, self._usage.total())
        completion.metadata = Metadata(weight_version=self._weights.version)
        completion.sglext = self._additions.extension(self._usage.first)
        return completion

    def render_pieces(self, pieces: list[Piece]) -> list[Completion]:
        """Text as it comes, with the finish reason on a choice's last chunk."""
        self._usage.note(pieces)
        is_counted = self._options.continuous_usage_stats
        visible = [whole for piece in pieces if (whole := self._choices[piece.index].make_visible(piece))]
        return [
            self._wrap([self._render_choice(piece)], self._usage.of(piece.index) if is_counted else None)
            for piece in visible
        ]

    def render_end(self) -> list[Completion]:
        """What concerns all choices, if it was asked for: the extension, and last the usage."""
        extension = self._additions.extension(self._usage.first)
        chunks = [] if extension is UNSET else [self._wrap([], None)]
        for chunk in chunks:
            chunk.sglext = extension
        return [*chunks, self._wrap([], self._usage.total())] if self._options.include_usage else chunks

    def _render_choice(self, piece: Piece) -> CompletionChoice:
        text, logprobs = self._choices[piece.index].render(piece)
        return CompletionChoice(
            index=piece.index,
            text=text,
            logprobs=logprobs,
            finish_reason=finish_name(piece.finish),
            matched_stop=matched_stop(piece.finish),
            cumulative_logprob=cumulative_logprob(piece),
            token_ids=self._additions.token_ids(piece),
        )

    def _wrap(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=UNSET if usage is None else usage,
        )


class _EchoedPrompt:
    """A prompt as text, and where its tokens stand in that: one for all choices, because finding out means
    tokenising it again."""

    def __init__(self, job: Job, sequence: Sequence, tokenizer: Tokenizer):
        self._prompt = job.prompt
        self._skips_special = job.sampling.skip_special_tokens
        self._tokenizer = tokenizer
        self._ids = sequence.prompt_ids
        self.text = echo_prompt(tokenizer, self._prompt, self._skips_special)

    @cached_property
    def offsets(self) -> list[int]:
        return place_prompt(self._tokenizer, self._prompt, self._ids, self._skips_special)

    def score(self, scores: list[TokenScores]) -> list[ScoredToken]:
        """The first token of a prompt has no scores: nothing precedes it."""
        known: list[TokenScores | None] = [None, *scores]
        # Shorter than the prompt only where its computation was aborted.
        return [ScoredToken(*entry) for entry in zip(self._ids, known, self.offsets, strict=False)]


class _Choice:
    """The text of one choice, after its prompt if that is echoed, and the logprobs of both."""

    def __init__(self, sequence: Sequence, echo: _EchoedPrompt | None, tokenizer: Tokenizer):
        self._sampling = sequence.sampling
        self._tokenizer = tokenizer
        self._echo_due = echo
        self._scored: ScoredText | None = None
        if sequence.sampling.logprobs is not None:
            start = 0 if echo is None else len(echo.text)
            self._scored = ScoredText(tokenizer, sequence.sampling, start=start)
        self._held: list[Piece] = []

    def make_visible(self, piece: Piece) -> Piece | None:
        """The piece with those before it that had no text; None if it has none either."""
        is_visible = bool(piece.text or piece.finish is not None or self._echo_due is not None)
        if is_visible and not self._held:
            return piece  # nearly every piece of a stream
        self._held.append(piece)
        if not is_visible:
            return None
        whole = join_pieces(self._held)
        self._held = []
        return whole

    def render(self, piece: Piece) -> tuple[str, CompletionLogprobs | None]:
        """The text and logprobs of a choice or chunk. The first holds the prompt, if that is echoed."""
        echo, self._echo_due = self._echo_due, None
        text = piece.text if echo is None else echo.text + piece.text
        logprobs: CompletionLogprobs | None = None
        if self._scored is not None:
            tokens = [] if echo is None else echo.score(piece.prompt_scores)
            self._scored.note(piece)
            tokens += self._scored.take(is_last=piece.finish is not None)
            logprobs = render_completion(tokens, self._sampling.logprobs or 0, self._tokenizer)
        return text, logprobs
