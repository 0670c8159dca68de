"""POST and PUT /generate, SGLang's own format: text or ids, one or many, streamed or not.

Streamed frames are cumulative unless the server is set to incremental; frames of a batch carry
`index`. Knows nothing of the OpenAI formats.
"""

from __future__ import annotations

import time

from msgspec import UNSET
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_request
from jaxserve.server.generation import Job, Run
from jaxserve.server.pieces import Piece, join_pieces
from jaxserve.server.replies import GenerateReply, MetaInfo, json_response, render_finish
from jaxserve.server.request_lists import name_prompts, read_id_lists, spread
from jaxserve.server.sampling import read_native_sampling
from jaxserve.server.schemas import REFUSED_BY_GENERATE, GenerateBody, SamplingBody
from jaxserve.server.sse import EventStream
from jaxserve.server.state import note_of, state_of


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("native")
    blueprint.add_route(generate, "/generate", methods=["POST", "PUT"])
    return blueprint


async def generate(request: Request) -> HTTPResponse | None:
    state = state_of(request)
    body = decode_request(request.body, GenerateBody, REFUSED_BY_GENERATE)
    jobs, is_batch = read_jobs(body)
    async with state.generator.open(jobs) as run:
        note_of(request).describe(jobs[0].rid, run)
        renderer = _Renderer(run, state.settings.weight_version, bool(body.return_prompt_token_ids))
        if not body.stream:
            replies = [renderer.render(piece) for piece in await run.collect()]
            return json_response(replies if is_batch else replies[0])
        so_far: dict[int, Piece] = {}
        async with EventStream(request, keep_alive_s=state.settings.keep_alive_s) as events:
            async for pieces in run:
                if not state.settings.is_streaming_incremental:
                    pieces = [_accumulate(so_far, piece) for piece in pieces]
                await events.send(*[renderer.render(piece, has_index=is_batch) for piece in pieces])
    return None


def _accumulate(so_far: dict[int, Piece], piece: Piece) -> Piece:
    """The whole output of a sequence up to and with this piece."""
    earlier = so_far.get(piece.index)
    whole = piece if earlier is None else join_pieces([earlier, piece])
    so_far[piece.index] = whole
    return whole


def read_jobs(body: GenerateBody) -> tuple[list[Job], bool]:
    """The prompts of a body, and whether the answer is a list. InvalidRequestError for odd shapes."""
    prompts, is_list, field = _read_prompts(body)
    samplings = spread(body.sampling_params or SamplingBody(), len(prompts), is_list, "sampling_params")
    parsed = {id(item): read_native_sampling(item) for item in samplings}  # a shared one is read once
    salts = spread(body.cache_salt or body.extra_key or "", len(prompts), is_list, "cache_salt")
    rids = name_prompts(body.rid, len(prompts), is_list)
    jobs = [
        Job(
            rid=rid,
            prompt=prompt,
            prompt_field=field,
            sampling=parsed[id(sampling)],
            length_field=None if sampling.max_new_tokens in (UNSET, None) else "max_new_tokens",
            priority=body.priority or 0,
            cache_salt=salt,
            stream_interval=sampling.stream_interval,
        )
        for prompt, sampling, salt, rid in zip(prompts, samplings, salts, rids, strict=True)
    ]
    return jobs, is_list or any(job.sampling.n > 1 for job in jobs)


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


class _Renderer:
    """Pieces to reply objects, for one run."""

    def __init__(self, run: Run, weight_version: str, has_prompt_ids: bool):
        self._run = run
        self._weight_version = weight_version
        self._has_prompt_ids = has_prompt_ids

    def render(self, piece: Piece, *, has_index: bool = False) -> GenerateReply:
        sequence = self._run.sequences[piece.index]
        meta_info = MetaInfo(
            id=sequence.rid,
            finish_reason=render_finish(piece.finish, piece.num_output_tokens),
            prompt_tokens=piece.num_prompt_tokens,
            weight_version=self._weight_version,
            total_retractions=piece.num_retractions,
            num_retractions=piece.num_retractions,
            reasoning_tokens=0,
            completion_tokens=piece.num_output_tokens,
            cached_tokens=piece.num_cached_tokens,
            cached_tokens_details={"device": piece.num_cached_tokens, "host": 0},
            dp_rank=None,
            e2e_latency=self._run.elapsed_s,
            response_sent_to_client_ts=time.time(),
        )
        return GenerateReply(
            text=piece.text,
            output_ids=piece.token_ids,
            meta_info=meta_info,
            index=piece.index if has_index else UNSET,
            prompt_token_ids=sequence.prompt_ids if self._has_prompt_ids else UNSET,
        )
