"""What hangs on the app and on a request: the tools the routes share, and one line of log per request.

Attached by app.py and middleware.py, read by every route. The log names the route, the status, ids and
counts, never a prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from sanic.request import Request

from jaxserve.metrics import ServerMetrics
from jaxserve.server.engine_port import EnginePort
from jaxserve.server.generation import Generator, Run
from jaxserve.server.settings import ServerSettings, TextTools

access_logger = logging.getLogger("jaxserve.access")

# Asked every few seconds by machines: logged at debug only.
PROBE_ENDPOINTS = ("health", "ready", "ping", "metrics")


# Where clients and proxies put the id of a request, in order of precedence (xLLM's list).
REQUEST_ID_HEADERS = ("x-request-id", "x-ms-client-request-id", "trace_id")


@dataclass(slots=True)
class ServedWeights:
    """Which weights are served, as operators call them; only updates change it."""

    version: str
    model_path: str
    _label: str = field(init=False)  # the last one that was given
    _num_unnamed: int = field(default=0, init=False)  # updates since then

    def __post_init__(self) -> None:
        self._label = self.version

    def note_update(self, model_path: str, version: str | None) -> str:
        """Other weights are served; without a new label the last one is counted on."""
        self.model_path = model_path
        if version is not None:
            self.rename(version)
        else:
            self._num_unnamed += 1
            self.version = f"{self._label}.{self._num_unnamed}"
        return self.version

    def rename(self, version: str) -> None:
        self.version = self._label = version
        self._num_unnamed = 0


@dataclass(slots=True)
class TokenProbe:
    """The one-token request that those who ask for /health_generate share, or the last one."""

    task: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AppState:
    engine: EnginePort
    text: TextTools
    settings: ServerSettings
    generator: Generator
    metrics: ServerMetrics
    weights: ServedWeights
    started_at_s: float  # unix time, the `created` of /v1/models
    token_probe: TokenProbe = field(default_factory=TokenProbe)
    chores: set[asyncio.Task[Any]] = field(default_factory=set)  # that go on when their client leaves


@dataclass(slots=True)
class RequestNote:
    """What the log line of one request will say."""

    request_id: str
    started_s: float
    rid: str = ""
    run: Run | None = None
    details: str = ""  # more of the same kind, where a route has something to add
    is_counted: bool = False
    is_finished: bool = False

    def describe(self, rid: str, run: Run) -> None:
        self.rid, self.run = rid, run


def state_of(request: Request) -> AppState:
    return request.app.ctx.state


def note_of(request: Request) -> RequestNote:
    """The request's note; a fresh one when it failed before the middleware ran."""
    note = getattr(request.ctx, "note", None)
    if note is None:
        note = RequestNote(_find_request_id(request), time.perf_counter())
        request.ctx.note = note
    return note


def _find_request_id(request: Request) -> str:
    """The client's own id, or a new one."""
    given = (request.headers.get(name, "") for name in REQUEST_ID_HEADERS)
    return next((request_id for request_id in given if _is_printable(request_id)), uuid.uuid4().hex)


def _is_printable(request_id: str) -> bool:
    return 0 < len(request_id) <= 256 and request_id.isascii() and request_id.isprintable()


def count_request(request: Request) -> None:
    """Count the request, once."""
    note = note_of(request)
    if not note.is_counted:
        note.is_counted = True
        state_of(request).metrics.observe_http_request(_name_endpoint(request), request.method)


def _name_endpoint(request: Request) -> str:
    return request.route.path if request.route is not None else "unmatched"


def finish_request(request: Request, status: int) -> None:
    """Count the response and log it, once a request. 499 is a client that left."""
    note, state = note_of(request), state_of(request)
    if note.is_finished:
        return
    note.is_finished = True
    count_request(request)  # if its client left while its body came, the middleware never saw it
    endpoint = _name_endpoint(request)
    state.metrics.observe_http_response(endpoint, request.method, status)
    if not state.settings.is_access_logged:
        return
    counts = ""
    if note.run is not None:
        num_prompt, num_output = note.run.num_prompt_tokens, note.run.num_output_tokens
        counts = f" prompt_tokens={num_prompt} completion_tokens={num_output}"
    rid = f" rid={ascii(note.rid)[1:-1]}" if note.rid else ""
    rid += f" {note.details}" if note.details else ""
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
