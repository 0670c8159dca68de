"""POST and PUT /generate, SGLang's own format: text or ids, one or many, streamed or not.

Streamed frames are cumulative unless the server is set to incremental; frames of a batch carry
`index`. Knows nothing of the OpenAI formats.
"""

from __future__ import annotations

from dataclasses import replace

from msgspec import UNSET, structs
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_request, refuse_value
from jaxserve.server.generation import Job, Run, check_num_sequences
from jaxserve.server.images import ImageReader, spread_image_data
from jaxserve.server.logprobs import render_scored
from jaxserve.server.meta_info import MetaInfoWriter
from jaxserve.server.pieces import Piece, join_pieces
from jaxserve.server.replies import GenerateReply, json_response
from jaxserve.server.request_lists import name_prompts, read_id_lists, spread
from jaxserve.server.sampling import (
    count_choices,
    read_dp_rank,
    read_logprobs_mode,
    read_native_sampling,
    read_priority,
)
from jaxserve.server.schemas import REFUSED_BY_GENERATE, GenerateBody, SamplingBody
from jaxserve.server.settings import ServerSettings
from jaxserve.server.sse import EventStream
from jaxserve.server.state import AppState, note_of, state_of
from jaxserve.types import SamplingParams
from jaxserve.vision.sources import ImageSource

FIELD_NAMES = {
    "logprobs": "top_logprobs_num",
    "logprob_start": "logprob_start_len",
    "logprob_ids": "token_ids_logprob",
}


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("native")
    blueprint.add_route(generate, "/generate", methods=["POST", "PUT"])
    return blueprint


async def generate(request: Request) -> HTTPResponse | None:
    state = state_of(request)
    body = decode_request(request.body, GenerateBody, REFUSED_BY_GENERATE)
    jobs, is_batch = read_jobs(body, state.settings, state.text.images)
    async with state.generator.open(jobs) as run:
        note_of(request).describe(jobs[0].rid, run)
        renderer = _Renderer(body, run, state, is_batch=is_batch)
        if not body.stream:
            return await render_scored(renderer.render_response, await run.collect())
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                await events.send(*await render_scored(renderer.render_pieces, pieces))
    return None


def read_jobs(
    body: GenerateBody, settings: ServerSettings, reader: ImageReader | None = None
) -> tuple[list[Job], bool]:
    """The prompts of a body, and whether the answer is a list. InvalidRequestError for odd shapes."""
    prompts, is_list, field = _read_prompts(body)
    num_prompts = len(prompts)
    check_num_sequences(num_prompts, settings)
    bodies = spread(body.sampling_params or SamplingBody(), num_prompts, is_list, "sampling_params")
    preferred = settings.preferred_sampling_params
    parsed = {  # a shared one is read once
        key: read_native_sampling(item, preferred, beam_width=body.beam_width)
        for key, item in {id(item): item for item in bodies}.items()
    }
    samplings = _add_logprobs(body, [parsed[id(item)] for item in bodies], is_list)
    salts = spread(body.cache_salt or body.extra_key or "", num_prompts, is_list, "cache_salt")
    rids = name_prompts(body.rid, num_prompts, is_list)
    images = _find_images(body, num_prompts, is_list, reader)
    priority = read_priority(body.priority)
    dp_rank = read_dp_rank(body.routed_dp_rank, body.data_parallel_rank)
    jobs = [
        Job(
            rid=rid,
            prompt=prompt,
            prompt_field=field,
            sampling=sampling,
            length_field=None if asked.max_new_tokens in (UNSET, None) else "max_new_tokens",
            field_names=FIELD_NAMES,
            priority=priority,
            dp_rank=dp_rank,
            cache_salt=salt,
            stream_interval=asked.stream_interval,
            images=sources,
        )
        for prompt, asked, sampling, salt, rid, sources in zip(
            prompts, bodies, samplings, salts, rids, images, strict=True
        )
    ]
    return jobs, is_list or any(count_choices(job.sampling) > 1 for job in jobs)


def _find_images(
    body: GenerateBody, num_prompts: int, is_list: bool, reader: ImageReader | None
) -> list[tuple[ImageSource, ...]]:
    """image_data of each prompt."""
    if reader is None:
        refuse_value("image_data", body.image_data, "by this server: the model reads text only.")
        return [()] * num_prompts
    data = spread_image_data(body.image_data, num_prompts, is_list)
    return [reader.find_data(items, body.mm_processor_kwargs) for items in data]


def _read_prompts(body: GenerateBody) -> tuple[list[str | list[int]], bool, str]:
    """Prompts, whether they came as a list, and the field they came in; ids win over text."""
    if body.input_ids is not None:
        id_lists, is_list = read_id_lists(body.input_ids, "input_ids")
        return [*id_lists], is_list, "input_ids"
    if isinstance(body.text, str):
        return [body.text], False, "text"
    if body.text is None:
        raise InvalidRequestError("Either text or input_ids must be given.", param="text")
    if not body.text:
        raise InvalidRequestError("text cannot be empty.", param="text")
    return [*body.text], True, "text"


def _add_logprobs(body: GenerateBody, samplings: list[SamplingParams], is_list: bool) -> list[SamplingParams]:
    """What return_logprob and its fellows ask of each prompt; without it they ask for nothing."""
    num_prompts = len(samplings)
    is_scaled = read_logprobs_mode(body.logprobs_mode)
    wanted = spread(body.return_logprob or False, num_prompts, is_list, "return_logprob")
    if not any(wanted):
        return samplings
    starts = spread(body.logprob_start_len, num_prompts, is_list, "logprob_start_len")
    nums = spread(body.top_logprobs_num, num_prompts, is_list, "top_logprobs_num")
    watched = _read_watched_ids(body.token_ids_logprob, num_prompts, is_list)
    made: dict[tuple[int, int | None, int | None, int], SamplingParams] = {}  # prompts that ask alike share
    scored: list[SamplingParams] = []
    for sampling, is_wanted, start, num, ids in zip(samplings, wanted, starts, nums, watched, strict=True):
        key = (id(sampling), start, num, id(ids))
        if is_wanted and key not in made:
            made[key] = replace(
                sampling,
                logprobs=num or 0,
                logprob_start=_read_start(start),
                logprob_ids=ids,
                are_logprobs_scaled=is_scaled,
            )
        scored.append(made[key] if is_wanted else sampling)
    return scored


def _read_start(start: int | None) -> int | None:
    if start is not None and start < -1:
        raise InvalidRequestError(
            f"logprob_start_len must be -1 or at least 0, got {start}.", param="logprob_start_len"
        )
    return None if start == -1 else start


def _read_watched_ids(
    ids: list[int | list[int] | None] | None, num_prompts: int, is_list: bool
) -> list[tuple[int, ...]]:
    """token_ids_logprob: one list of ids for all prompts, or in a batch a list for each."""
    flat = [item for item in ids or () if isinstance(item, int)]
    if len(flat) == len(ids or ()):
        return [tuple(flat)] * num_prompts
    if flat or not is_list:
        raise InvalidRequestError(
            "token_ids_logprob must be a flat list of integers; for a list of prompts it may be a list of "
            "such lists.",
            param="token_ids_logprob",
        )
    return [tuple(item or ()) for item in spread(ids, num_prompts, is_list, "token_ids_logprob")]


class _Renderer:
    """Pieces to reply objects, for one run."""

    def __init__(self, body: GenerateBody, run: Run, state: AppState, *, is_batch: bool):
        self._run = run
        self._is_batch = is_batch
        self._has_index = is_batch and bool(body.stream)
        self._has_prompt_ids = bool(body.return_prompt_token_ids)
        self._so_far: dict[int, Piece] = {}
        self._is_cumulative = bool(body.stream) and not state.settings.is_streaming_incremental
        self._meta_info = MetaInfoWriter(
            run,
            state.text.tokenizer,
            state.weights,
            has_text=bool(body.return_text_in_logprobs),
            is_cumulative=self._is_cumulative,
        )

    def render_response(self, outputs: list[Piece]) -> HTTPResponse:
        replies = self.render_pieces(outputs)
        return json_response(replies if self._is_batch else replies[0])

    def render_pieces(self, pieces: list[Piece]) -> list[GenerateReply]:
        return [self.render(piece) for piece in pieces]

    def render(self, piece: Piece) -> GenerateReply:
        meta_info = self._meta_info.describe(piece)
        shown = self._accumulate(piece) if self._is_cumulative else piece
        return GenerateReply(
            text=shown.text,
            output_ids=shown.token_ids,
            meta_info=meta_info,
            index=piece.index if self._has_index else UNSET,
            prompt_token_ids=self._run.choices[piece.index].prompt_ids if self._has_prompt_ids else UNSET,
        )

    def _accumulate(self, piece: Piece) -> Piece:
        """The whole output of a choice up to and with this piece; its scores are told elsewhere."""
        piece = structs.replace(piece, scores=[], prompt_scores=[])
        earlier = self._so_far.get(piece.index)
        whole = piece if earlier is None else join_pieces([earlier, piece])
        self._so_far[piece.index] = whole
        return whole
