"""EngineClient: the asyncio side of the engine. Submits requests, hands out their tokens, aborts them.

Used by the HTTP side and by the library; implements server/engine_port.py. Owns the table of open
requests: whoever stops listening to a stream aborts its request, and an engine that dies fails every
open request and every operation with the reason. Knows token ids and messages; knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from jaxserve.engine.messages import (
    Abort,
    Answer,
    Call,
    Failed,
    FlushCache,
    FromEngine,
    Pause,
    Ready,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    Starting,
    StepOutput,
    Submit,
    ToEngine,
    UpdateWeights,
)
from jaxserve.engine.routing import weigh
from jaxserve.errors import InvalidRequestError, UnavailableError
from jaxserve.images import PlacedImage
from jaxserve.types import WEIGHTS, EngineInfo, EngineStats, FinishReason, TokenDelta, TokenParams

BUSY_POLL_S = 0.05
FLUSH_ANSWER_S = 1.0  # an engine that is alive answers between two steps
ABORT_GRACE_S = 5.0  # for the steps in flight, when what is open was ended

ASLEEP = "Model is currently in sleep state."  # xLLM's words, which its clients look for
FALLING_ASLEEP = "The model is going to sleep and takes no new requests."
WAKING = "The model is waking up."
PAUSED_WHILE_DRAINING = "The server is shutting down while generation is paused."
# What an order is answered that comes while an earlier one is carried out.
ALREADY = {
    FALLING_ASLEEP: "The model is already going to sleep; ask again when it sleeps.",
    WAKING: "The model is already waking up; ask again when it is awake.",
}

logger = logging.getLogger("jaxserve.engine")


class EngineClient:
    """All methods belong to one event loop. `send` is given by the transport (`connect`). Of several engines
    each has a `dp_rank`, which is told where one speaks for itself."""

    def __init__(self, dp_rank: int | None = None):
        self.dp_rank = dp_rank
        self._send: Callable[[ToEngine], None] | None = None
        # A rid may be used again as soon as its request is over here, while deltas of the old one are still
        # on their way; on the wire each request has an id of its own.
        self._open: dict[str, _Mailbox] = {}  # by wire id
        self._wire_ids: dict[str, str] = {}  # by rid
        self._num_requests = 0
        self.load_tokens = 0  # that all open requests weigh
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._num_calls = 0
        self._change: asyncio.Task[Any] | None = None  # going to sleep, or waking up
        self._slept: ReleaseMemory | None = None  # how, so that a new engine goes on sleeping
        self.weights: UpdateWeights | None = None  # what was served last, so that a new engine serves it too
        self._last_heard_s = time.monotonic()
        self.info: EngineInfo | None = None
        self.ready_since_s: float | None = None  # in the life of the present or last engine
        self.failure: str | None = None  # its last words, if it had any
        self.stats = EngineStats()
        self.status = "starting"
        self.status_message = self.sign("The engine is starting.")
        self.status_changed = asyncio.Event()

    @property
    def engines(self) -> Sequence[EngineClient]:
        """Itself: there may be several behind a server (engine/group.py)."""
        return (self,)

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._last_heard_s

    def connect(self, send: Callable[[ToEngine], None]) -> None:
        """A (new) engine is there and starting."""
        self._send = send
        self.stats = EngineStats()
        self._last_heard_s = time.monotonic()
        self.ready_since_s, self.failure = None, None
        if self.status != "draining":
            self._set_status("starting", self.sign("The engine is starting."))

    def drain(self) -> None:
        """Take no more requests; those open go on, unless generation is paused: then they would never end."""
        self._set_status("draining", "The server is shutting down and takes no more requests.")
        if self.stats.is_paused:
            self.end_all(PAUSED_WHILE_DRAINING, 503)

    def sign(self, sentence: str) -> str:
        """The sentence, with which of several engines says it."""
        return sentence if self.dp_rank is None else f"dp_rank {self.dp_rank}: {sentence}"

    def lose(self, reason: str) -> None:
        """The engine is gone: every open request fails with the reason."""
        self._send = None
        self.info = None
        if self.status != "draining":
            self._set_status("dead", reason)
        self.end_all(reason, 503)
        for call_id, future in self._calls.items():
            if not future.done():
                future.set_result(Answer(call_id, False, reason))
        self._calls.clear()

    def handle(self, message: FromEngine) -> None:
        """A message from the engine, in order."""
        self._last_heard_s = time.monotonic()
        if isinstance(message, StepOutput):
            was_paused, self.stats = self.stats.is_paused, message.stats
            self._settle()
            if self.status == "draining" and self.stats.is_paused and not was_paused:
                self.end_all(PAUSED_WHILE_DRAINING, 503)
            find_mailbox = self._open.get
            for delta in message.deltas:
                mailbox = find_mailbox(delta.rid)
                if mailbox is not None:  # else its listener has left; the abort is on its way
                    mailbox.put(delta)
        elif isinstance(message, Starting):
            words = f"The engine is starting: {message.message} ({message.fraction:.0%})."
            self.status_message = self.sign(words)
        elif isinstance(message, Ready):
            self.info = message.info
            self.ready_since_s = time.monotonic()
            if self.status == "starting":
                self._set_status("ready", "The engine is ready.")
                if self._slept is not None:
                    slept = self._slept
                    self._begin_change(FALLING_ASLEEP, self._fall_asleep(slept, timeout_s=0.0))
        elif isinstance(message, Answer):
            future = self._calls.pop(message.call_id, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Failed):
            self.failure = self.sign(message.message)
            self.lose(self.failure)

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
        """Submit a request and yield its deltas; the last one has `finish` set. `dp_rank` can only be 0.

        Raises UnavailableError unless the engine is ready, InvalidRequestError if the rid is in use.
        Closing the iterator early aborts the request.
        """
        if self.status != "ready" or self._send is None:
            raise UnavailableError(self.status_message)
        if rid in self._wire_ids:
            raise InvalidRequestError(
                f"rid {rid!r} is in use by another request; choose another.", param="rid"
            )
        mailbox = _Mailbox()
        self._num_requests += 1
        wire_id = f"{rid}/{self._num_requests}"
        self._open[wire_id] = mailbox
        self._wire_ids[rid] = wire_id
        self.load_tokens += weigh(len(prompt_ids))
        is_over = False
        try:
            self._send(Submit(wire_id, prompt_ids, params, priority, cache_salt, images))
            while not is_over:
                if mailbox.is_empty:
                    await mailbox.arrival()
                delta = mailbox.take()
                is_over = delta.finish is not None
                yield delta
        finally:
            if not is_over:
                self.abort(rid)
            self.load_tokens -= weigh(len(prompt_ids))
            del self._open[wire_id], self._wire_ids[rid]

    def abort(self, rid: str) -> None:
        """Ask for a request to end. Unknown ids are ignored: it may have ended by itself."""
        wire_id = self._wire_ids.get(rid)
        if self._send is not None and wire_id is not None:
            self._send(Abort(wire_id))

    def live_rids(self) -> Iterable[str]:
        return list(self._wire_ids)

    def end_all(self, reason: str, http_status: int) -> None:
        """End every open request with an error of its own."""
        for wire_id, mailbox in self._open.items():
            mailbox.put(_ended(wire_id, reason, http_status))
            if self._send is not None:
                self._send(Abort(wire_id))

    async def flush_cache(self, timeout_s: float) -> bool:
        """Empty the prefix cache once nothing runs; False if something still runs after timeout_s."""
        try:
            async with asyncio.timeout(max(timeout_s, FLUSH_ANSWER_S)):
                return (await self._call_when_idle(FlushCache(), timeout_s)).ok
        except TimeoutError:
            return False

    async def pause(self, mode: str) -> int:
        """Let the engine stand still; see engine.messages.Pause. Returns how many requests it found running,
        or ended."""
        return (await self._require(Pause(mode))).num_requests

    async def resume(self) -> None:
        await self._require(Resume())

    async def update_weights(self, model_path: str, load_format: str, *, flushes_cache: bool) -> int:
        """Serve another checkpoint of the same architecture; returns how many requests were paused.

        Raises UnavailableError with the reason if that failed: the present weights are served on.
        """
        update = UpdateWeights(model_path, load_format, flushes_cache)
        answer = await self._require(update)
        self.weights = update
        return answer.num_requests

    async def release_memory(
        self, tags: Collection[str], *, keeps_weights: bool, mode: str, timeout_s: float
    ) -> None:
        """Put the model to sleep: new requests are refused from now on, and those open

        "wait": may end within timeout_s, or else the sleep is refused and all goes on;
        "refuse": refuse the sleep at once;
        "abort": end with a 503.

        Raises UnavailableError when it is refused. Whoever stops waiting for it does not stop it.
        """
        self._require_awake_engine()
        release = ReleaseMemory(tuple(tags), keeps_weights)
        wait_s = 0.0 if mode == "refuse" else timeout_s
        if mode == "abort":
            self.end_all("The model was put to sleep.", 503)
            wait_s = max(wait_s, ABORT_GRACE_S)
        await asyncio.shield(self._begin_change(FALLING_ASLEEP, self._fall_asleep(release, wait_s)))

    async def resume_memory(self, tags: Collection[str]) -> None:
        """Wake it up. Raises UnavailableError if that fails: then it sleeps on."""
        self._require_awake_engine()
        await asyncio.shield(self._begin_change(WAKING, self._wake_up(ResumeMemory(tuple(tags)))))

    async def _fall_asleep(self, release: ReleaseMemory, timeout_s: float) -> None:
        answer = await self._call_when_idle(release, timeout_s)
        if not answer.ok:
            raise UnavailableError(f"The model was not put to sleep. {answer.message}")
        drops_weights = WEIGHTS in release.tags and not release.keeps_weights
        keeps_weights = not drops_weights and (self._slept is None or self._slept.keeps_weights)
        self._slept = ReleaseMemory(self.stats.released, keeps_weights)

    async def _wake_up(self, resume: ResumeMemory) -> None:
        answer = await self._call(resume)
        if not answer.ok:
            raise UnavailableError(f"The model was not woken up. {answer.message}")
        keeps_weights = self._slept is None or self._slept.keeps_weights
        self._slept = ReleaseMemory(self.stats.released, keeps_weights) if self.stats.released else None

    def _begin_change(self, message: str, change: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a change of sleep to its end, whoever waits for it, and refuse requests meanwhile."""
        self._change = asyncio.create_task(change)
        self._set_status("asleep", message)
        self._change.add_done_callback(self._end_change)
        return self._change

    def _end_change(self, change: asyncio.Task[None]) -> None:
        self._change = None
        self._settle()
        error = None if change.cancelled() else change.exception()
        if error is not None:
            logger.warning("%s", error)

    def _require_awake_engine(self) -> None:
        """Whether the engine can change its sleep now: it is there, and not about to."""
        if self._change is not None or self.status not in ("ready", "asleep"):
            raise UnavailableError(ALREADY.get(self.status_message, self.status_message))

    async def _require(self, operation: Any) -> Answer:
        """Have an operation done; UnavailableError with the reason if it was not."""
        if self.status not in ("ready", "asleep"):
            raise UnavailableError(self.status_message)
        answer = await self._call(operation)
        if not answer.ok:
            raise UnavailableError(answer.message)
        return answer

    async def _call_when_idle(self, operation: Any, timeout_s: float) -> Answer:
        """Have it done as soon as no request is in the way, or be told what is after timeout_s."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            answer = await self._call(operation)
            if answer.num_requests == 0 or answer.ok or time.monotonic() >= deadline_s:
                return answer
            await asyncio.sleep(BUSY_POLL_S)

    async def _call(self, operation: Any) -> Answer:
        """Ask the engine and wait for its answer, which comes even if it dies."""
        if self._send is None:
            return Answer(0, False, self.status_message)
        self._num_calls += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[self._num_calls] = future
        self._send(Call(self._num_calls, operation))
        return await future  # `handle` or `lose` takes it out of the table

    def _settle(self) -> None:
        """Ready or asleep, as the engine tells."""
        if self._change is not None or self.status not in ("ready", "asleep"):
            return
        status, message = ("asleep", ASLEEP) if self.stats.released else ("ready", "The engine is ready.")
        if status == "ready":
            self._slept = None
        if (status, message) != (self.status, self.status_message):
            self._set_status(status, message)

    def _set_status(self, status: str, message: str) -> None:
        self.status, self.status_message = status, message
        self.status_changed.set()
        self.status_changed = asyncio.Event()


class _Mailbox:
    """The deltas of one request that its listener has not taken yet. For one listener, hence lighter than an
    asyncio.Queue, which shows at ten thousand tokens a second."""

    __slots__ = ("_deltas", "_listener")

    def __init__(self):
        self._deltas: list[TokenDelta] = []
        self._listener: asyncio.Future[None] | None = None

    @property
    def is_empty(self) -> bool:
        return not self._deltas

    def put(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        if self._listener is not None:
            if not self._listener.done():  # else it was cancelled, and has not noticed yet
                self._listener.set_result(None)
            self._listener = None

    def arrival(self) -> asyncio.Future[None]:
        """To wait for while it is empty."""
        self._listener = asyncio.get_running_loop().create_future()
        return self._listener

    def take(self) -> TokenDelta:
        """All that has come, up to the last delta of the request, as one: a slow listener gets fewer deltas,
        not later ones."""
        deltas = self._deltas
        if len(deltas) == 1:
            self._deltas = []
            return deltas[0]
        num_taken = next((order for order, delta in enumerate(deltas, 1) if delta.finish is not None), None)
        taken, self._deltas = deltas[:num_taken], [] if num_taken is None else deltas[num_taken:]
        return msgspec.structs.replace(
            taken[-1],
            token_ids=[token_id for delta in taken for token_id in delta.token_ids],
            scores=[scores for delta in taken for scores in delta.scores],
            prompt_scores=[scores for delta in taken for scores in delta.prompt_scores],
        )


def _ended(rid: str, reason: str, http_status: int) -> TokenDelta:
    return TokenDelta(
        rid=rid,
        token_ids=[],
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        finish=FinishReason(kind="abort", message=reason, http_status=http_status),
    )
