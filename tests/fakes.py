"""Stand-ins that let the HTTP side run without a model: a scripted engine, a tokenizer of bytes.

`FakeEngine` speaks the server's EnginePort; `make_text_tools` gives it one token a byte and a ChatML
template; `serve` puts an app on a loopback port. Used by tests/server, and by anyone who builds on the
HTTP side. No jax, no network beyond loopback.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from msgspec import structs
from sanic import Sanic

from jaxserve.errors import OverloadedError, UnavailableError
from jaxserve.images import PlacedImage
from jaxserve.metrics import EngineView
from jaxserve.server.app import create_app
from jaxserve.server.settings import ServerSettings, TextTools
from jaxserve.text.chat_template import BUILTIN_TEMPLATES, ChatTemplate
from jaxserve.text.tokenizer import byte_tokenizer
from jaxserve.types import (
    BeamResult,
    EngineInfo,
    EngineStats,
    FinishReason,
    ScoreParams,
    TokenDelta,
    TokenParams,
    TokenScores,
)

VOCAB_SIZE = 512
EOS_ID = 256  # of `byte_tokenizer`

FAKE_INFO = EngineInfo(
    model_path="fake/model",
    architecture="FakeForCausalLM",
    model_type="fake",
    vocab_size=VOCAB_SIZE,
    context_length=256,
    max_total_tokens=4096,
    max_running_requests=8,
    page_size=16,
    num_pages=257,
    chunked_prefill_size=128,
    param_bytes=2**30,
    kv_bytes=2**20,
    dtype="float32",
    quantization="none",
    platform="cpu",
    device_kind="fake",
    num_devices=1,
    startup_s=1.5,
)


def score_row(prompt_ids: list[int], row: int, params: ScoreParams) -> TokenScores:
    """What the fake expects behind a position: the token there again, best, then the ids that follow it."""
    top_ids = [(prompt_ids[row] + rank) % VOCAB_SIZE for rank in range(params.num_top)]
    top_logprobs = [-0.5 - rank - row / 1000 for rank in range(params.num_top)]
    watched_logprobs = [-8.0 for _ in params.watched_ids]
    return TokenScores(-7.0, top_ids, top_logprobs, watched_logprobs)


def score_by_id(ids: list[int], row: int, params: ScoreParams) -> TokenScores:
    """Numbers that tell which token they are of: id 65 ("A") is the likeliest everywhere, then 66, 67, ...

    Multiples of 1/1024, which floats and JSON keep exactly.
    """

    def logprob_of(token_id: int) -> float:
        return -((token_id - 65) % VOCAB_SIZE + 1) / 1024

    top_ids = [65 + rank for rank in range(params.num_top)]
    return TokenScores(
        logprob_of(ids[row + 1]),
        top_ids,
        [logprob_of(top_id) for top_id in top_ids],
        [logprob_of(watched_id) for watched_id in params.watched_ids],
    )


@dataclass(frozen=True, slots=True)
class Submitted:
    """What an engine was asked to do."""

    rid: str
    prompt_ids: list[int]
    params: TokenParams
    priority: int
    cache_salt: str
    images: tuple[PlacedImage, ...] = ()
    dp_rank: int | None = None


@dataclass(slots=True)
class FakeEngine:
    """An EnginePort that follows a script.

    A request gets the bytes of `reply` (or what `reply` makes of its prompt), then the first stop id
    if it has one, otherwise the reply over again, until it finds a stop id or max_new_tokens.
    `score` gives the scores of a row of prompt and reply: of the token after it. Those of the prompt come
    with the first delta, or `prompt_scores_per_delta` in each of some deltas before it. A beam search
    answers with `beam_replies`, over again if they are fewer than its beams.
    `delay_s` passes before every delta, `tokens_per_delta` come in each. After `hang_after` tokens
    nothing more comes; after `fail_after` tokens the request ends with `failure`. With `max_live`
    requests open the next is refused.
    Operations take `operation_s` and do what their answer says, or fail with `operation_failure`.
    `submitted`, `operations` (name and arguments) and `left` (ids whose stream was closed before its end)
    record what happened.
    """

    reply: str | Callable[[list[int]], list[int]] = "Hello there."
    score: Callable[[list[int], int, ScoreParams], TokenScores] = score_row
    prompt_scores_per_delta: int | None = None
    beam_replies: tuple[str, ...] = ("Yes", "No", "Maybe")
    delay_s: float = 0.0
    tokens_per_delta: int = 1
    hang_after: int | None = None
    fail_after: int | None = None
    failure: FinishReason | None = None
    max_live: int | None = None
    retry_after_s: int = 2
    info: EngineInfo | None = FAKE_INFO
    status: str = "ready"
    status_message: str = ""
    heartbeat_age_s: float = 0.01
    others: tuple[EngineView, ...] = ()  # engines behind the same server, of which only their counts are read
    stats: EngineStats = field(default_factory=EngineStats)
    can_flush: bool = True
    flush_timeouts: list[float] = field(default_factory=list)
    operations: list[tuple[Any, ...]] = field(default_factory=list)
    operation_failure: str | None = None
    operation_s: float = 0.0
    submitted: list[Submitted] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    _live: dict[str, asyncio.Event] = field(default_factory=dict)  # set when the user asks for an abort
    _left_times: dict[str, float] = field(default_factory=dict)

    @property
    def engines(self) -> Sequence[EngineView]:
        return (self, *self.others)

    def live_rids(self) -> Iterable[str]:
        return self._live.keys()

    def abort(self, rid: str) -> None:
        self._live[rid].set()

    async def flush_cache(self, timeout_s: float) -> bool:
        self.flush_timeouts.append(timeout_s)
        return self.can_flush

    async def pause(self, mode: str) -> int:
        await self._operate("pause", mode)
        self.stats = replace(self.stats, is_paused=True)
        return len(self._live)

    async def resume(self) -> None:
        await self._operate("resume")
        self.stats = replace(self.stats, is_paused=False)

    async def release_memory(
        self, tags: Collection[str], *, keeps_weights: bool, mode: str, timeout_s: float
    ) -> None:
        await self._operate("release", tuple(tags), keeps_weights, mode, timeout_s)
        kept_bytes = FAKE_INFO.param_bytes if keeps_weights else 0
        self.stats = replace(self.stats, released=tuple(tags), host_param_bytes=kept_bytes)
        self.status, self.status_message = "asleep", "Model is currently in sleep state."

    async def resume_memory(self, tags: Collection[str]) -> None:
        await self._operate("resume memory", tuple(tags))
        left = tuple(tag for tag in self.stats.released if tag not in tags)
        self.stats = replace(self.stats, released=left, host_param_bytes=0)
        if not left:
            self.status, self.status_message = "ready", ""

    async def update_weights(self, model_path: str, load_format: str, *, flushes_cache: bool) -> int:
        await self._operate("update", model_path, load_format, flushes_cache)
        return len(self._live) if self.stats.is_paused else 0

    async def _operate(self, *operation: Any) -> None:
        await asyncio.sleep(self.operation_s)
        self.operations.append(operation)
        if self.operation_failure is not None:
            raise UnavailableError(self.operation_failure)

    def left_at_s(self, rid: str) -> float:
        """When the stream of `rid` was closed early, on time.perf_counter's clock."""
        return self._left_times[rid]

    async def generate(
        self,
        rid: str,
        prompt_ids: list[int],
        params: TokenParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        images: tuple[PlacedImage, ...] = (),
        dp_rank: int | None = None,
    ) -> AsyncGenerator[TokenDelta, None]:
        if self.status != "ready":
            raise UnavailableError(f"The engine is {self.status}.")
        if self.max_live is not None and len(self._live) >= self.max_live:
            raise OverloadedError("The queue is full.", retry_after_s=self.retry_after_s)
        num_cached = self._count_cached(prompt_ids)
        asked = Submitted(rid, prompt_ids, params, priority, cache_salt, images, dp_rank)
        self.submitted.append(asked)
        self._live[rid] = asyncio.Event()
        first = TokenDelta(
            rid=rid,
            token_ids=[],
            num_prompt_tokens=len(prompt_ids),
            num_cached_tokens=num_cached,
            num_output_tokens=0,
        )
        is_over = False
        try:
            async for delta in self._run(first, prompt_ids, params):
                is_over = delta.finish is not None
                yield delta
        finally:
            del self._live[rid]
            if not is_over:
                self.left.append(rid)
                self._left_times[rid] = time.perf_counter()

    async def _run(
        self, first: TokenDelta, prompt_ids: list[int], params: TokenParams
    ) -> AsyncGenerator[TokenDelta, None]:
        token_ids, finish = self._plan(prompt_ids, params)
        scores = self._score_output(prompt_ids, token_ids, params)
        prompt_scores = self._score_prompt(prompt_ids, params)
        if params.beam_width > 1:
            yield self._search(first, prompt_ids, params)
            return
        if self.prompt_scores_per_delta is not None:
            for start in range(0, len(prompt_scores), self.prompt_scores_per_delta):
                some = prompt_scores[start : start + self.prompt_scores_per_delta]
                yield structs.replace(first, prompt_scores=some)
            prompt_scores = []
        aborted = self._live[first.rid]
        step = self.tokens_per_delta
        for start in range(0, max(len(token_ids), 1), step):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.hang_after is not None and start >= self.hang_after:
                await aborted.wait()
            if aborted.is_set():
                yield structs.replace(
                    first, num_output_tokens=start, finish=FinishReason(kind="abort", message="Aborted")
                )
                return
            if self.fail_after is not None and start >= self.fail_after:
                yield structs.replace(first, num_output_tokens=start, finish=self.failure)
                return
            end = min(start + step, len(token_ids))
            is_last = end == len(token_ids)
            yield structs.replace(
                first,
                token_ids=token_ids[start:end],
                num_output_tokens=end,
                finish=finish if is_last else None,
                prompt_scores=prompt_scores if start == 0 else [],
                scores=scores[start:end],
            )

    def _search(self, first: TokenDelta, prompt_ids: list[int], params: TokenParams) -> TokenDelta:
        """One delta with all beams."""
        beams: list[BeamResult] = []
        for rank in range(params.beam_width):
            script = self.beam_replies[rank % len(self.beam_replies)]
            token_ids, finish = self._follow(list(script.encode()), params)
            scores = self._score_output(prompt_ids, token_ids, params)
            total = sum(entry.logprob for entry in scores)
            beams.append(
                BeamResult(token_ids=token_ids, scores=scores, cumulative_logprob=total, finish=finish)
            )
        return structs.replace(
            first,
            num_output_tokens=sum(len(beam.token_ids) for beam in beams),
            finish=beams[0].finish,
            prompt_scores=self._score_prompt(prompt_ids, params),
            beams=beams,
        )

    def _score_output(
        self, prompt_ids: list[int], token_ids: list[int], params: TokenParams
    ) -> list[TokenScores]:
        if params.scores is None or not params.scores.of_output:
            return []
        ids = [*prompt_ids, *token_ids]
        return [self.score(ids, row, params.scores) for row in range(len(prompt_ids) - 1, len(ids) - 1)]

    def _score_prompt(self, prompt_ids: list[int], params: TokenParams) -> list[TokenScores]:
        scores = params.scores or ScoreParams()
        return [self.score(prompt_ids, row, scores) for row in scores.prompt_rows]

    def _plan(self, prompt_ids: list[int], params: TokenParams) -> tuple[list[int], FinishReason]:
        """All tokens of the reply and why it ends."""
        script = list(self.reply.encode()) if isinstance(self.reply, str) else self.reply(prompt_ids)
        return self._follow(script, params)

    def _follow(self, script: list[int], params: TokenParams) -> tuple[list[int], FinishReason]:
        token_ids: list[int] = []
        while len(token_ids) < params.max_new_tokens:
            place = len(token_ids)
            if place == len(script) and params.stop_ids:
                token_ids.append(params.stop_ids[0])
            else:
                token_ids.append(script[place % len(script)])
            if token_ids[-1] in params.stop_ids:
                return token_ids, FinishReason(kind="stop", matched=token_ids[-1])
        return token_ids, FinishReason(kind="length")

    def _count_cached(self, prompt_ids: list[int]) -> int:
        """The longest prefix shared with an earlier prompt; the last token is always computed."""
        longest = 0
        for earlier in self.submitted:
            pairs = zip(prompt_ids, earlier.prompt_ids, strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            shared = min(len(prompt_ids), len(earlier.prompt_ids)) if shared is None else shared
            longest = max(longest, shared)
        return min(longest, len(prompt_ids) - 1)


def make_text_tools(
    template: str | None = BUILTIN_TEMPLATES["chatml"], *, adds_bos: bool = False
) -> TextTools:
    """One token a byte (eos is 256, bos 257) and ChatML; None for a model without a template."""
    tokenizer = byte_tokenizer(VOCAB_SIZE)
    if adds_bos:
        tokenizer._prefix_ids = [257]
    return TextTools(
        tokenizer=tokenizer, chat_template=ChatTemplate(template, tokenizer.bos_token, tokenizer.eos_token)
    )


FAKE_SETTINGS = ServerSettings(served_model_name="fake-model", model_path="fake/model")


@contextmanager
def open_client(
    engine: FakeEngine, *, text: TextTools | None = None, **settings: Any
) -> Iterator[httpx.Client]:
    """An HTTP client of a server with this engine; `settings` replace fields of FAKE_SETTINGS."""
    app = create_app(engine, text or make_text_tools(), replace(FAKE_SETTINGS, **settings))
    with serve(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


@contextmanager
def serve(app: Sanic) -> Iterator[str]:
    """Run an app on a free loopback port, in a thread with a loop of its own; gives its base URL."""
    app.config.TOUCHUP = False  # Sanic's rewriting of its own methods works for one app a process only
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(_serve_until(app, listener, started, stop),)
    )
    thread.start()
    try:
        if not started.wait(timeout=10):
            raise TimeoutError("The server did not start within 10 s.")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)
        loop.close()


async def _serve_until(
    app: Sanic, listener: socket.socket, started: threading.Event, stop: asyncio.Event
) -> None:
    server = await app.create_server(sock=listener)
    assert server is not None
    await server.startup()
    serving = server.start_serving()
    assert serving is not None
    await serving
    started.set()
    await stop.wait()
    for connection in list(server.connections):
        connection.abort()
    await asyncio.sleep(0)
    server.close()
    await asyncio.sleep(0)
