"""From prompts and sampling parameters to a stream of text pieces: what every route shares.

    Job (a prompt as the route understood it)  ->  Sequence (one engine request)  ->  Piece (new text)

Checks limits, lengths and ids, tokenises, and opens one engine request per sequence; whatever happens
to the caller, every engine request is closed, so that a client that leaves frees its pages. Called by
the routes; knows nothing of HTTP or of reply shapes.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from jaxserve.errors import InvalidRequestError, OverloadedError, UnavailableError
from jaxserve.images import PlacedImage
from jaxserve.metrics import ServerMetrics
from jaxserve.server.engine_port import EnginePort
from jaxserve.server.images import hold_images, place_images
from jaxserve.server.pieces import Piece, Sequence, join_pieces, merge_streams, read_sequence
from jaxserve.server.sampling import count_choices, fit_to_prompt, for_choice, read_seed, to_token_params
from jaxserve.server.settings import ServerSettings, TextTools
from jaxserve.text.stop_regex import SearchAllowance, check_stop_regex
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import EngineInfo, SamplingParams, ScoreParams, TokenParams
from jaxserve.vision.sources import ImageSource

_INLINE_CHARS = 4096  # texts up to this are tokenised on the event loop: a millisecond or less
_MAX_RID_CHARS = 256
_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt, to be continued `sampling.n` times, or by a search that ends with `sampling.beam_width`.

    `prompt` is text or token ids. `length_field` names the field with which the client asked for a
    length; None when the length is a default, which is then cut to what the context allows.
    `field_names` says what the client calls fields of SamplingParams, where that differs.
    """

    rid: str
    prompt: str | list[int]
    prompt_field: str
    sampling: SamplingParams
    length_field: str | None = None
    field_names: Mapping[str, str] = field(default_factory=dict)
    has_special_tokens: bool = False  # a rendered chat template brings its own
    priority: int = 0
    dp_rank: int | None = None  # the engine that the client chose
    cache_salt: str = ""
    stream_interval: int | None = None
    scores: ScoreParams | None = None  # of prompt positions, where a route asks for more than `sampling` can
    images: tuple[ImageSource, ...] = ()  # for which the prompt has a placeholder each


def new_rid() -> str:
    return uuid.uuid4().hex


def read_rid(rid: str | None) -> str:
    """A client's request id, or a new one; InvalidRequestError when it is unreasonably long."""
    if rid and len(rid) > _MAX_RID_CHARS:
        raise InvalidRequestError(
            f"rid must have at most {_MAX_RID_CHARS} characters, got {len(rid)}.", param="rid"
        )
    return rid or new_rid()


class Run:
    """The open requests of one HTTP call: `async for pieces in run`, or `collect`.

    `sequences` are prompt-major: p0s0, p0s1, p1s0, ... `choices` has the sequence behind each place in
    the reply; the beams of one search share one. Each step of the iteration gives a list of pieces, at
    most one a choice, of whichever choices have something new.
    """

    def __init__(
        self, sequences: list[Sequence], pieces: AsyncGenerator[list[Piece], None], started_s: float
    ):
        self.sequences = sequences
        self.choices = [sequence for sequence in sequences for _ in range(sequence.num_choices)]
        self.num_output_tokens = 0  # of all sequences, so far
        self._pieces = pieces
        self._started_s = started_s

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(sequence.prompt_ids) for sequence in self.sequences)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> list[Piece]:
        pieces = await anext(self._pieces)
        for piece in pieces:
            self.num_output_tokens += len(piece.token_ids)
        return pieces

    async def collect(self) -> list[Piece]:
        """One piece a choice, in order, each with the whole text."""
        parts: list[list[Piece]] = [[] for _ in self.choices]
        async for pieces in self:
            for piece in pieces:
                parts[piece.index].append(piece)
        # A search that the user aborted has no beams to show but the first place, which says so.
        return [join_pieces(part) for part in parts if part]


class Generator:
    """Opens runs; one per app. Holds the count and the ids of what is open, nothing else."""

    def __init__(self, engine: EnginePort, text: TextTools, settings: ServerSettings, metrics: ServerMetrics):
        self._engine = engine
        self._tokenizer = text.tokenizer
        self._images = text.images
        self._settings = settings
        self._metrics = metrics
        seed = settings.random_seed
        self._random = random.SystemRandom() if seed is None else random.Random(seed)
        self._num_open = 0
        self._num_searching = 0  # of those, the ones with stop_regex
        self._open_rids: set[str] = set()

    @property
    def num_open(self) -> int:
        """Calls that are being served."""
        return self._num_open

    def require_ready(self) -> EngineInfo:
        """The engine's facts; UnavailableError while it starts, sleeps, drains or is dead."""
        info, status = self._engine.info, self._engine.status
        if status != "ready" or info is None:
            message = self._engine.status_message or "It takes no requests now."
            is_said = status in message or status == "asleep"  # clients know that message by its words
            raise UnavailableError(message if is_said else f"The engine is {status}. {message}")
        return info

    @asynccontextmanager
    async def open(self, jobs: list[Job]) -> AsyncIterator[Run]:
        """Start generating; leaving the context ends whatever still runs.

        Raises InvalidRequestError for impossible lengths, ids and duplicate rids, OverloadedError at
        the concurrency limit, UnavailableError when the engine is not ready.
        """
        started_s = time.perf_counter()
        info = self.require_ready()
        _check_jobs(jobs, info, self._settings, len(self._engine.engines))
        for job in jobs:
            if isinstance(job.prompt, str):
                check_text_fits(self._tokenizer, job.prompt, job.prompt_field, info)
        rids = [rid for job in jobs for rid in _name_choices(job)]
        with self._admit(rids), self._share_searching(jobs) as allowance:
            prompts = await self._tokenise(jobs)
            prompts, images = await place_images(
                self._images, prompts, [job.images for job in jobs], [job.prompt_field for job in jobs]
            )
            sequences = self._plan(jobs, prompts, images, info, allowance)
            streams = [
                read_sequence(self._engine, self._tokenizer, sequence, self._metrics, started_s)
                for sequence in sequences
            ]
            merged = merge_streams(streams)
            async with aclosing(merged):
                with hold_images(self._images, images):
                    yield Run(sequences, merged, started_s)

    @contextmanager
    def _admit(self, rids: list[str]) -> Iterator[None]:
        limit = self._settings.max_concurrent_requests
        if limit is not None and self._num_open >= limit:
            raise OverloadedError(
                f"{limit} requests are open, the most this server takes; try again shortly."
            )
        names = set(rids)
        taken = next((rid for rid in names if rid in self._open_rids), None)
        taken = taken or next((rid for rid in self._engine.live_rids() if rid in names), None)
        if taken is not None or len(names) < len(rids):
            raise InvalidRequestError(
                f"Duplicate request ID: {taken or 'the rid list repeats one'}; each must be unique.",
                param="rid",
            )
        self._num_open += 1
        self._open_rids |= names
        try:
            yield
        finally:
            self._num_open -= 1
            self._open_rids -= names

    @contextmanager
    def _share_searching(self, jobs: list[Job]) -> Iterator[SearchAllowance]:
        """The time for stop_regex searches of one call; all calls that search have a part of one share."""
        is_searching = any(job.sampling.stop_regex for job in jobs)
        self._num_searching += is_searching
        try:
            yield SearchAllowance(lambda: self._num_searching)
        finally:
            self._num_searching -= is_searching

    async def _tokenise(self, jobs: list[Job]) -> list[list[int]]:
        """Token ids of each job's prompt; long texts are encoded on a thread."""
        texts = [job.prompt for job in jobs if isinstance(job.prompt, str)]
        if not texts:
            return [job.prompt for job in jobs if isinstance(job.prompt, list)]
        is_special_added = not jobs[0].has_special_tokens
        if sum(map(len, texts)) <= _INLINE_CHARS:
            encoded = self._tokenizer.encode_batch(texts, is_special_added)
        else:
            loop = asyncio.get_running_loop()
            encoded = await loop.run_in_executor(None, self._tokenizer.encode_batch, texts, is_special_added)
        remaining = iter(encoded)
        return [next(remaining) if isinstance(job.prompt, str) else job.prompt for job in jobs]

    def _plan(
        self,
        jobs: list[Job],
        prompts: list[list[int]],
        images: list[tuple[PlacedImage, ...]],
        info: EngineInfo,
        allowance: SearchAllowance,
    ) -> list[Sequence]:
        eos_ids = tuple(self._tokenizer.eos_ids)
        shared: dict[int, TokenParams] = {}  # by the id of the parameters that they are made of
        sequences: list[Sequence] = []
        num_choices = 0
        for job, prompt_ids, prompt_images in zip(jobs, prompts, images, strict=True):
            max_new_tokens = _fit_length(job, prompt_ids, info, self._settings.max_prompt_tokens)
            _check_logprob_start(job, len(prompt_ids))
            params = shared.get(id(job.sampling))
            if params is None:
                params = to_token_params(job.sampling, eos_ids=eos_ids, vocab_size=info.vocab_size)
                shared[id(job.sampling)] = params
            params = fit_to_prompt(
                params, job.sampling, max_new_tokens=max_new_tokens, num_prompt_tokens=len(prompt_ids)
            )
            if job.scores is not None:
                params = replace(params, scores=job.scores)
            for choice, rid in enumerate(_name_choices(job)):
                sampling = for_choice(job.sampling, choice)
                sequences.append(
                    Sequence(
                        index=num_choices,
                        num_choices=max(sampling.beam_width, 1),
                        rid=rid,
                        prompt_ids=prompt_ids,
                        params=replace(params, seed=read_seed(sampling, self._random)),
                        sampling=sampling,
                        priority=job.priority,
                        dp_rank=job.dp_rank,
                        cache_salt=job.cache_salt,
                        stream_interval=job.stream_interval or self._settings.stream_interval,
                        allowance=allowance,
                        images=prompt_images,
                    )
                )
                num_choices += sequences[-1].num_choices
        return sequences


def _name_choices(job: Job) -> list[str]:
    return [job.rid] if job.sampling.n == 1 else [f"{job.rid}_{choice}" for choice in range(job.sampling.n)]


def _check_jobs(jobs: list[Job], info: EngineInfo, settings: ServerSettings, num_engines: int) -> None:
    """What can be checked before tokenising."""
    checked: SamplingParams | None = None
    for job in jobs:
        if job.sampling is not checked:
            _check_sampling(job, info)
            if settings.max_n is not None and job.sampling.n > settings.max_n:
                raise InvalidRequestError(
                    f"n must be at most {settings.max_n} on this server, got {job.sampling.n}.", param="n"
                )
            checked = job.sampling
        if abs(job.priority) > _MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be between -{_MAX_PRIORITY} and {_MAX_PRIORITY}, got {job.priority}.",
                param="priority",
            )
        if job.dp_rank is not None and not 0 <= job.dp_rank < num_engines:
            raise InvalidRequestError(
                f"routed_dp_rank must be between 0 and {num_engines - 1} on this server, got {job.dp_rank}.",
                param="routed_dp_rank",
            )
        if job.stream_interval is not None and job.stream_interval < 1:
            raise InvalidRequestError(
                f"stream_interval must be at least 1, got {job.stream_interval}.", param="stream_interval"
            )
    check_num_sequences(sum(count_choices(job.sampling) for job in jobs), settings)


def check_num_sequences(num_sequences: int, settings: ServerSettings) -> None:
    """The routes ask this of the number of prompts alone, before they make a job of each."""
    if num_sequences > settings.max_sequences:
        raise InvalidRequestError(
            f"One request may ask for at most {settings.max_sequences} sequences (prompts x n), "
            f"got {num_sequences}.",
            param="n",
        )


def _check_sampling(job: Job, info: EngineInfo) -> None:
    job.sampling.validate(info.vocab_size, job.field_names)
    check_stop_regex(job.sampling.stop_regex)
    if job.sampling.beam_width > max(info.max_running_requests, 1):
        raise InvalidRequestError(
            f"beam_width must be at most {info.max_running_requests}, the sequences that this server runs "
            f"at once, got {job.sampling.beam_width}.",
            param="beam_width",
        )


def check_text_fits(tokenizer: Tokenizer, text: str, field_name: str, info: EngineInfo) -> None:
    """Refuse a text that is too long however it is tokenised, before the work of that."""
    least, context = tokenizer.count_least(text), info.context_length
    if least >= context:
        raise InvalidRequestError(
            f"The input (at least {least} tokens) is longer than the model's context length "
            f"({context} tokens).",
            param=field_name,
        )


def _check_logprob_start(job: Job, num_prompt_tokens: int) -> None:
    start = job.sampling.logprob_start
    if start is not None and start > num_prompt_tokens:
        name = job.field_names.get("logprob_start", "logprob_start")
        raise InvalidRequestError(
            f"{name} must be at most the number of prompt tokens ({num_prompt_tokens}), got {start}.",
            param=name,
        )


def _fit_length(job: Job, prompt_ids: list[int], info: EngineInfo, max_prompt: int | None) -> int:
    """max_new_tokens as the context allows it; InvalidRequestError if the prompt or the wish is too long."""
    num_prompt, context = len(prompt_ids), info.context_length
    if num_prompt == 0:
        raise InvalidRequestError(f"{job.prompt_field} cannot be empty.", param=job.prompt_field)
    if num_prompt >= context:
        raise InvalidRequestError(
            f"The input ({num_prompt} tokens) is longer than the model's context length ({context} tokens).",
            param=job.prompt_field,
        )
    if max_prompt is not None and num_prompt > max_prompt:
        raise InvalidRequestError(
            f"{job.prompt_field} must have at most {max_prompt} tokens on this server, got {num_prompt}.",
            param=job.prompt_field,
        )
    if not isinstance(job.prompt, str) and not 0 <= min(prompt_ids) <= max(prompt_ids) < info.vocab_size:
        wrong = next(token_id for token_id in prompt_ids if not 0 <= token_id < info.vocab_size)
        raise InvalidRequestError(
            f"{job.prompt_field} holds {wrong}, which is not a token id in [0, {info.vocab_size}).",
            param=job.prompt_field,
        )
    room, asked = context - num_prompt, job.sampling.max_new_tokens
    if asked is None:
        return room
    if asked > room and job.length_field is not None:
        raise InvalidRequestError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens: "
            f"{num_prompt} in the prompt and {asked} for the reply make {num_prompt + asked}. "
            f"{job.length_field} is too large; the most that fits here is {room}.",
            param=job.length_field,
        )
    return min(asked, room)
