"""EngineClient: the asyncio side of the engine. Submits requests, hands out their tokens, aborts them.

Used by the HTTP side and by the library; implements server/engine_port.py. Owns the table of open
requests: whoever stops listening to a stream aborts its request, and an engine that dies fails every
open request with the reason. Knows token ids and messages; knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable

import msgspec

from jaxserve.engine.messages import (
    Abort,
    Answer,
    Call,
    Failed,
    FlushCache,
    FromEngine,
    Ready,
    Starting,
    StepOutput,
    Submit,
    ToEngine,
)
from jaxserve.errors import InvalidRequestError, UnavailableError
from jaxserve.types import EngineInfo, EngineStats, FinishReason, TokenDelta, TokenParams

FLUSH_POLL_S = 0.05
FLUSH_ANSWER_S = 1.0  # an engine that is alive answers between two steps


class EngineClient:
    """All methods belong to one event loop. `send` is given by the transport (`connect`)."""

    def __init__(self):
        self._send: Callable[[ToEngine], None] | None = None
        # A rid may be used again as soon as its request is over here, while deltas of the old one are still
        # on their way; on the wire each request has an id of its own.
        self._open: dict[str, asyncio.Queue[TokenDelta]] = {}  # by wire id
        self._wire_ids: dict[str, str] = {}  # by rid
        self._num_requests = 0
        self._flushes: dict[int, asyncio.Future[bool]] = {}
        self._num_flushes = 0
        self._last_heard_s = time.monotonic()
        self.info: EngineInfo | None = None
        self.ready_since_s: float | None = None  # in the life of the present or last engine
        self.failure: str | None = None  # its last words, if it had any
        self.stats = EngineStats()
        self.status = "starting"
        self.status_message = "The engine is starting."
        self.status_changed = asyncio.Event()

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._last_heard_s

    def connect(self, send: Callable[[ToEngine], None]) -> None:
        """A (new) engine is there and starting."""
        self._send = send
        self._last_heard_s = time.monotonic()
        self.ready_since_s, self.failure = None, None
        if self.status != "draining":
            self._set_status("starting", "The engine is starting.")

    def drain(self) -> None:
        """Take no more requests; those open go on."""
        self._set_status("draining", "The server is shutting down and takes no more requests.")

    def lose(self, reason: str) -> None:
        """The engine is gone: every open request fails with the reason."""
        self._send = None
        self.info = None
        if self.status != "draining":
            self._set_status("dead", reason)
        for wire_id, waiting in self._open.items():
            waiting.put_nowait(_ended(wire_id, reason, 503))
        for future in self._flushes.values():
            if not future.done():
                future.set_result(False)
        self._flushes.clear()

    def handle(self, message: FromEngine) -> None:
        """A message from the engine, in order."""
        self._last_heard_s = time.monotonic()
        if isinstance(message, StepOutput):
            self.stats = message.stats
            for delta in message.deltas:
                waiting = self._open.get(delta.rid)
                if waiting is not None:  # else its listener has left; the abort is on its way
                    waiting.put_nowait(delta)
        elif isinstance(message, Starting):
            self.status_message = f"The engine is starting: {message.message} ({message.fraction:.0%})."
        elif isinstance(message, Ready):
            self.info = message.info
            self.ready_since_s = time.monotonic()
            if self.status == "starting":
                self._set_status("ready", "The engine is ready.")
        elif isinstance(message, Answer):
            future = self._flushes.pop(message.call_id, None)
            if future is not None and not future.done():
                future.set_result(message.ok)
        elif isinstance(message, Failed):
            self.failure = message.message
            self.lose(message.message)

    async def generate(
        self, rid: str, prompt_ids: list[int], params: TokenParams, *, priority: int = 0, cache_salt: str = ""
    ) -> AsyncGenerator[TokenDelta, None]:
        """Submit a request and yield its deltas; the last one has `finish` set.

        Raises UnavailableError unless the engine is ready, InvalidRequestError if the rid is in use.
        Closing the iterator early aborts the request.
        """
        if self.status != "ready" or self._send is None:
            raise UnavailableError(self.status_message)
        if rid in self._wire_ids:
            raise InvalidRequestError(
                f"rid {rid!r} is in use by another request; choose another.", param="rid"
            )
        waiting: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self._num_requests += 1
        wire_id = f"{rid}/{self._num_requests}"
        self._open[wire_id] = waiting
        self._wire_ids[rid] = wire_id
        is_over = False
        try:
            self._send(Submit(wire_id, prompt_ids, params, priority, cache_salt))
            while not is_over:
                delta = _merge(await waiting.get(), waiting)
                is_over = delta.finish is not None
                yield delta
        finally:
            if not is_over:
                self.abort(rid)
            del self._open[wire_id], self._wire_ids[rid]

    def abort(self, rid: str) -> None:
        """Ask for a request to end. Unknown ids are ignored: it may have ended by itself."""
        wire_id = self._wire_ids.get(rid)
        if self._send is not None and wire_id is not None:
            self._send(Abort(wire_id))

    def live_rids(self) -> Iterable[str]:
        return list(self._wire_ids)

    async def flush_cache(self, timeout_s: float) -> bool:
        """Empty the prefix cache once nothing runs; False if something still runs after timeout_s."""
        deadline_s = time.monotonic() + timeout_s
        while self._send is not None:
            self._num_flushes += 1
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._flushes[self._num_flushes] = future
            self._send(Call(self._num_flushes, FlushCache()))
            try:
                is_flushed = await asyncio.wait_for(
                    future, max(deadline_s - time.monotonic(), FLUSH_ANSWER_S)
                )
            except TimeoutError:
                return False
            if is_flushed or time.monotonic() >= deadline_s:
                return is_flushed
            await asyncio.sleep(FLUSH_POLL_S)
        return False

    def _set_status(self, status: str, message: str) -> None:
        self.status, self.status_message = status, message
        self.status_changed.set()
        self.status_changed = asyncio.Event()


def _merge(delta: TokenDelta, waiting: asyncio.Queue[TokenDelta]) -> TokenDelta:
    """`delta` and whatever has come behind it: a slow listener gets fewer deltas, not later ones."""
    if delta.finish is not None or waiting.empty():
        return delta
    deltas = [delta]
    while deltas[-1].finish is None and not waiting.empty():
        deltas.append(waiting.get_nowait())
    return msgspec.structs.replace(
        deltas[-1],
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        scores=[scores for delta in deltas for scores in delta.scores],
        prompt_scores=[scores for delta in deltas for scores in delta.prompt_scores],
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
