"""What hangs on the app and on a request: the tools the routes share, and one line of log per request.

Attached by app.py and middleware.py, read by every route. The log names the route, the status, ids and
counts, never a prompt.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass

from sanic.request import Request

from jaxserve.metrics import ServerMetrics
from jaxserve.server.engine_port import EnginePort
from jaxserve.server.generation import Generator, Run
from jaxserve.server.settings import ServerSettings, TextTools

access_logger = logging.getLogger("jaxserve.access")

# Asked every few seconds by machines: logged at debug only.
PROBE_ENDPOINTS = ("health", "ready", "ping", "metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppState:
    engine: EnginePort
    text: TextTools
    settings: ServerSettings
    generator: Generator
    metrics: ServerMetrics
    started_at_s: float  # unix time, the `created` of /v1/models


@dataclass(slots=True)
class RequestNote:
    """What the log line of one request will say."""

    request_id: str
    started_s: float
    rid: str = ""
    run: Run | None = None
    is_finished: bool = False

    def describe(self, rid: str, run: Run) -> None:
        self.rid, self.run = rid, run


def state_of(request: Request) -> AppState:
    return request.app.ctx.state


def note_of(request: Request) -> RequestNote:
    """The request's note; a fresh one when it failed before the middleware ran."""
    note = getattr(request.ctx, "note", None)
    if note is None:
        given = request.headers.get("x-request-id", "")
        note = RequestNote(given if _is_printable(given) else uuid.uuid4().hex, time.perf_counter())
        request.ctx.note = note
    return note


def _is_printable(request_id: str) -> bool:
    return 0 < len(request_id) <= 256 and request_id.isascii() and request_id.isprintable()


def finish_request(request: Request, status: int) -> None:
    """Count the response and log it, once a request. 499 is a client that left."""
    note, state = note_of(request), state_of(request)
    if note.is_finished:
        return
    note.is_finished = True
    endpoint = request.route.path if request.route is not None else "unmatched"
    state.metrics.observe_http_response(endpoint, request.method, status)
    if not state.settings.is_access_logged:
        return
    counts = ""
    if note.run is not None:
        num_prompt, num_output = note.run.num_prompt_tokens, note.run.num_output_tokens
        counts = f" prompt_tokens={num_prompt} completion_tokens={num_output}"
    rid = f" rid={note.rid}" if note.rid else ""
    elapsed_s = time.perf_counter() - note.started_s
    is_probe = endpoint in PROBE_ENDPOINTS
    access_logger.log(
        logging.DEBUG if is_probe else logging.INFO,
        "%s %s %d%s%s %.3fs",
        request.method,
        ascii(request.path)[1:-1],
        status,
        rid,
        counts,
        elapsed_s,
    )
