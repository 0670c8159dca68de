"""What happens around every request: keys, its body in time, CORS, the request id, the log line, errors.

Attached by app.py; access.py decides who may call. Knows nothing of particular routes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sanic import Sanic
from sanic.exceptions import BadURL, RequestCancelled, RequestTimeout, SanicException
from sanic.http import Http
from sanic.request import Request
from sanic.response import BaseHTTPResponse, HTTPResponse

from jaxserve.errors import ClientGoneError, InternalError, JaxserveError
from jaxserve.server.access import check_caller
from jaxserve.server.errors import error_response, render_sanic_exception
from jaxserve.server.state import count_request, finish_request, note_of, state_of

logger = logging.getLogger(__name__)

_UNREAD = "NONE"  # the method that Sanic gives a request whose head it could not read
_MAX_DRAIN_FACTOR = 4  # how much of a body that nobody wants is read, in limits
_MAX_DRAIN_S = 10.0


def add_middleware(app: Sanic) -> None:
    app.signal("http.routing.before")(check_url)
    app.signal("http.routing.after")(receive_body)
    app.register_middleware(begin_request, "request")
    app.register_middleware(end_request, "response")
    app.exception(JaxserveError)(render_our_error)
    app.error_handler.add(RequestCancelled, render_cancelled)  # no Exception, which app.exception wants
    app.exception(SanicException)(render_http_error)
    app.exception(Exception)(render_bug)


def read_request(url_bytes: bytes, **head: Any) -> Request:
    """In place of Sanic's Request class, which fails on a URL that is none, and then answers nothing."""
    try:
        return Request(url_bytes, **head)
    except BadURL:
        request = Request(b"*", **head)
        request.ctx.is_url_bad = True
        return request


read_request._current = Request._current  # type: ignore[attr-defined]  # Sanic tells it what it works on


async def check_url(request: Request) -> None:
    if getattr(request.ctx, "is_url_bad", False):
        raise BadURL("its URL cannot be read")


async def receive_body(request: Request, **_facts: object) -> None:
    """Check who calls, then read the body within the time limit: one that
    trickles in holds its connection."""
    check_caller(request)
    limit_s = state_of(request).settings.upload_timeout_s
    stream = request.stream
    if not isinstance(stream, Http) or not stream.request_body:
        return
    try:
        async with asyncio.timeout(limit_s):
            await request.receive_body()
    except TimeoutError:
        _give_up_body(stream)
        raise RequestTimeout(f"The request's body did not arrive within {limit_s:g} s.") from None


async def _discard_body(request: Request) -> None:
    """Before an answer to a request whose body was not read, read on for a while: a client that is still
    sending would miss the answer. Then close the connection if there is more."""
    stream = request.stream
    if not isinstance(stream, Http) or not stream.request_body:
        return
    stream.request_max_size = _MAX_DRAIN_FACTOR * request.app.config.REQUEST_MAX_SIZE
    try:
        async with asyncio.timeout(_MAX_DRAIN_S):
            while stream.request_body and not (stream.expecting_continue or _is_lost(request)):
                await stream.read()
    except (SanicException, TimeoutError):
        logger.info("request %s: its body was not read to the end", note_of(request).request_id)
    if stream.request_body:
        _give_up_body(stream)


def _is_lost(request: Request) -> bool:
    return request.conn_info is None or request.conn_info.lost


def _give_up_body(stream: Http) -> None:
    """Let the connection be closed after the answer; Sanic would read the rest of the body first."""
    stream.keep_alive = False
    stream.request_body = None


async def begin_request(request: Request) -> HTTPResponse | None:
    """Answer CORS preflights, then check who calls."""
    count_request(request)
    if request.method == "OPTIONS":
        return HTTPResponse(status=204, headers=_preflight_headers(request))
    if request.method != _UNREAD:  # else its key is not known either; the answer says what is wrong with it
        check_caller(request)
    return None


def _allow_origin(request: Request, response: BaseHTTPResponse) -> None:
    """Let pages of the allowed origins read the answer."""
    allowed = state_of(request).settings.allowed_origins
    if "*" in allowed:
        response.headers["access-control-allow-origin"] = "*"
        return
    response.headers["vary"] = "origin"
    origin = request.headers.get("origin", "")
    if origin in allowed:
        response.headers["access-control-allow-origin"] = origin


def _preflight_headers(request: Request) -> dict[str, str]:
    """Any method and header; the list of headers is repeated because * leaves out Authorization."""
    return {
        "access-control-allow-methods": "GET, POST, PUT, HEAD, OPTIONS",
        "access-control-allow-headers": request.headers.get("access-control-request-headers", "*"),
        "access-control-max-age": "86400",
    }


async def end_request(request: Request, response: BaseHTTPResponse) -> None:
    await _discard_body(request)
    _allow_origin(request, response)
    response.headers["access-control-expose-headers"] = "x-request-id, retry-after"
    response.headers["x-request-id"] = note_of(request).request_id
    is_stream = (response.content_type or "").startswith("text/event-stream")
    if not is_stream:  # a stream is logged at its end
        finish_request(request, response.status)


async def render_our_error(request: Request, error: JaxserveError) -> HTTPResponse:
    return error_response(error)


async def render_http_error(request: Request, exception: SanicException) -> HTTPResponse:
    return render_sanic_exception(request, exception)


async def render_cancelled(request: Request, exception: RequestCancelled) -> HTTPResponse:
    """The client has left and reads nothing; this gives the log its 499."""
    return error_response(ClientGoneError("The client closed its connection."))


async def render_bug(request: Request, exception: Exception) -> HTTPResponse:
    """Whatever nobody foresaw: logged with its traceback, told without its details."""
    request_id = note_of(request).request_id
    logger.error("request %s failed: %s %s", request_id, request.method, request.path, exc_info=exception)
    return error_response(InternalError(f"The server failed; its log names request {request_id}."))
