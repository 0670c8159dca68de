"""What happens around every request: API key, CORS, the request id, the log line, one error handler.

Attached by app.py. Knows nothing of particular routes beyond which of them need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import logging

from sanic import Sanic
from sanic.exceptions import PayloadTooLarge, RequestCancelled, SanicException
from sanic.http import Http
from sanic.request import Request
from sanic.response import BaseHTTPResponse, HTTPResponse

from jaxserve.errors import ClientGoneError, InternalError, JaxserveError, UnauthorizedError
from jaxserve.server.errors import error_response, render_sanic_exception
from jaxserve.server.state import finish_request, note_of, state_of

logger = logging.getLogger(__name__)

# Probes and scrapes carry no key.
OPEN_PATHS = ("/health", "/ready", "/metrics")
_MAX_DRAIN_FACTOR = 4  # how much of a too large body is read, in limits, so that the client sees the answer
_MAX_DRAIN_S = 10.0


def add_middleware(app: Sanic) -> None:
    app.register_middleware(begin_request, "request")
    app.register_middleware(end_request, "response")
    app.exception(JaxserveError)(render_our_error)
    app.exception(PayloadTooLarge)(render_too_large)
    app.error_handler.add(RequestCancelled, render_cancelled)  # no Exception, which app.exception wants
    app.exception(SanicException)(render_http_error)
    app.exception(Exception)(render_bug)


async def begin_request(request: Request) -> HTTPResponse | None:
    """Answer CORS preflights, then check the key."""
    note_of(request)
    endpoint = request.route.path if request.route is not None else "unmatched"
    state_of(request).metrics.observe_http_request(endpoint, request.method)
    if request.method == "OPTIONS":
        return HTTPResponse(status=204, headers=_preflight_headers(request))
    _check_key(request)
    return None


def _check_key(request: Request) -> None:
    key = state_of(request).settings.api_key
    if not key or request.path.startswith(OPEN_PATHS):
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise UnauthorizedError("The API key is missing or wrong; send it as Authorization: Bearer KEY.")


def _preflight_headers(request: Request) -> dict[str, str]:
    """Any origin, method and header; the list of headers is repeated because * leaves out Authorization."""
    return {
        "access-control-allow-methods": "GET, POST, PUT, HEAD, OPTIONS",
        "access-control-allow-headers": request.headers.get("access-control-request-headers", "*"),
        "access-control-max-age": "86400",
    }


async def end_request(request: Request, response: BaseHTTPResponse) -> None:
    response.headers["access-control-allow-origin"] = "*"
    response.headers["access-control-expose-headers"] = "x-request-id, retry-after"
    response.headers["x-request-id"] = note_of(request).request_id
    is_stream = (response.content_type or "").startswith("text/event-stream")
    if not is_stream:  # a stream is logged at its end
        finish_request(request, response.status)


async def render_our_error(request: Request, error: JaxserveError) -> HTTPResponse:
    return error_response(error)


async def render_http_error(request: Request, exception: SanicException) -> HTTPResponse:
    return render_sanic_exception(request, exception)


async def render_too_large(request: Request, exception: PayloadTooLarge) -> HTTPResponse:
    """Read on for a while before answering: a client that is still sending would miss the answer."""
    stream = request.stream
    if isinstance(stream, Http) and stream.request_body:
        stream.request_max_size = _MAX_DRAIN_FACTOR * request.app.config.REQUEST_MAX_SIZE
        try:
            async with asyncio.timeout(_MAX_DRAIN_S):
                while stream.request_body:
                    await stream.read()
        except (SanicException, TimeoutError):
            logger.info("request %s: its body was not read to the end", note_of(request).request_id)
    return render_sanic_exception(request, exception)


async def render_cancelled(request: Request, exception: RequestCancelled) -> HTTPResponse:
    """The client has left and reads nothing; this gives the log its 499."""
    return error_response(ClientGoneError("The client closed its connection."))


async def render_bug(request: Request, exception: Exception) -> HTTPResponse:
    """Whatever nobody foresaw: logged with its traceback, told without its details."""
    request_id = note_of(request).request_id
    logger.error("request %s failed: %s %s", request_id, request.method, request.path, exc_info=exception)
    return error_response(InternalError(f"The server failed; its log names request {request_id}."))
