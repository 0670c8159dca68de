"""Server-sent events: framing, keep-alive comments, the done marker, and errors on the way.

`async with EventStream(request) as events: await events.send(...)`. The 200 goes out with the first
event, so a failure before that still gets its real status; a later one becomes an error event. Used by
every streaming route. Knows nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import Any

import msgspec
from sanic.request import Request
from sanic.response import BaseHTTPResponse, HTTPResponse

from jaxserve.errors import InternalError, JaxserveError
from jaxserve.server.errors import error_body
from jaxserve.server.replies import ENCODER
from jaxserve.server.state import finish_request, note_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second stops nginx from collecting


def frame(event: msgspec.Struct | dict[str, Any]) -> bytes:
    """One event as one line and a blank line; msgspec escapes every newline inside strings."""
    return b"data: " + ENCODER.encode(event) + b"\n\n"


class EventStream:
    """One streamed response. Leaving the context sends [DONE], after an error event if there was one.

    After `keep_alive_s` without an event a comment is sent, so that proxies keep the connection; that
    also settles the status at 200. A client that leaves cancels the handler, not this class.
    """

    def __init__(self, request: Request, *, keep_alive_s: float):
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._lock = asyncio.Lock()  # for the first write: the keep-alive task writes too
        self._response: BaseHTTPResponse | None = None  # once its head is out
        self._last_sent_s = 0.0
        self._keep_alive_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._last_sent_s = time.monotonic()
        self._keep_alive_task = asyncio.create_task(self._keep_alive())
        return self

    async def send(self, *events: msgspec.Struct | dict[str, Any]) -> None:
        """Send events in one write. Waits while the client's socket is full."""
        if not events:
            return
        data = frame(events[0]) if len(events) == 1 else b"".join([frame(event) for event in events])
        if self._response is None:
            await self._begin(data)
        else:
            await self._write(self._response, data)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._keep_alive_task is not None:
            self._keep_alive_task.cancel()
        if error is not None and not isinstance(error, Exception):
            finish_request(self._request, 499)  # cancelled: the client has left
            return False
        if error is not None and self._response is None:
            return False  # nothing sent yet: the app's error handler answers with the real status
        try:
            if error is not None:
                await self.send({"error": self._describe(error)})
            response = self._response or await self._begin(b"")
            await self._write(response, DONE, is_last=True)
        except asyncio.CancelledError:
            finish_request(self._request, 499)
            raise
        finish_request(self._request, 200)
        return True

    def _describe(self, error: Exception) -> msgspec.Struct:
        if isinstance(error, JaxserveError):
            return error_body(error)
        request_id = note_of(self._request).request_id
        logger.error("request %s failed while streaming", request_id, exc_info=error)
        return error_body(InternalError(f"The server failed; its log names request {request_id}."))

    async def _begin(self, data: bytes) -> BaseHTTPResponse:
        """Write `data` after the head, if nobody has sent that yet."""
        async with self._lock:
            response = self._response
            if response is None:
                response = HTTPResponse(content_type="text/event-stream; charset=utf-8", headers=_HEADERS)
                await self._request.respond(response)
            await self._write(response, data)
            self._response = response
        return response

    async def _write(self, response: BaseHTTPResponse, data: bytes, *, is_last: bool = False) -> None:
        await response.send(data, is_last)
        self._last_sent_s = time.monotonic()

    async def _keep_alive(self) -> None:
        while True:
            quiet_s = time.monotonic() - self._last_sent_s
            if quiet_s >= self._keep_alive_s:
                await self._begin(_KEEP_ALIVE)
                quiet_s = 0.0
            await asyncio.sleep(self._keep_alive_s - quiet_s)
