"""One error, one body: from our error tree and from Sanic's exceptions.

Used by the app's error handler, by streams that fail half way, and by health routes. The body
serves SGLang's clients (flat keys), OpenAI's (nested `error`) and xLLM's (`status`) at once.
Knows nothing of routes.
"""

from __future__ import annotations

import msgspec
from sanic.exceptions import MethodNotAllowed, NotFound, PayloadTooLarge, RequestTimeout, SanicException
from sanic.http import Http
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import (
    ERROR_KINDS,
    ErrorKind,
    InternalError,
    InvalidRequestError,
    JaxserveError,
    ModelNotFoundError,
    OverloadedError,
    RequestTooLargeError,
    UnavailableError,
)
from jaxserve.server.replies import ErrorBody, ErrorDetail

_MAX_MESSAGE_CHARS = 800
METHOD_NOT_ALLOWED = ErrorKind(405, "MethodNotAllowedError", "INVALID_ARGUMENT")
REQUEST_TIMEOUT = ErrorKind(408, "RequestTimeoutError", "DEADLINE_EXCEEDED")


def kind_of(error: JaxserveError) -> ErrorKind:
    return ERROR_KINDS.get(type(error), ERROR_KINDS[InternalError])


def error_body(error: JaxserveError, kind: ErrorKind | None = None) -> ErrorBody:
    """Render an error for every family of clients; `kind` overrides the table (for 405)."""
    kind = kind or kind_of(error)
    is_model = isinstance(error, ModelNotFoundError) and error.param == "model"
    code = "model_not_found" if is_model else kind.http_status
    message = _make_readable(error.message)
    param = error.param and _make_readable(error.param)
    detail = ErrorDetail(message=message, type=kind.openai_type, param=param, code=code)
    return ErrorBody(
        message=message,
        type=kind.openai_type,
        param=param,
        code=kind.http_status,
        status=kind.status_name,
        error=detail,
    )


def _make_readable(text: str) -> str:
    """One printable line of bounded length: sentences quote keys and values that clients sent."""
    if len(text) > _MAX_MESSAGE_CHARS:
        half = _MAX_MESSAGE_CHARS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def error_response(error: JaxserveError, kind: ErrorKind | None = None) -> HTTPResponse:
    kind = kind or kind_of(error)
    headers = {}
    if isinstance(error, (OverloadedError, UnavailableError)):
        headers["retry-after"] = str(error.retry_after_s)
    if kind.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    body = msgspec.json.encode(error_body(error, kind))
    return HTTPResponse(body, status=kind.http_status, headers=headers, content_type="application/json")


def render_sanic_exception(request: Request, exception: SanicException) -> HTTPResponse:
    """Give Sanic's own refusals (no such route, wrong method, too large, malformed) our body."""
    if isinstance(exception, NotFound):
        return error_response(
            ModelNotFoundError(f"There is no route {request.path}; GET /docs lists the routes.")
        )
    if isinstance(exception, MethodNotAllowed):
        allowed = exception.headers.get("Allow", "")
        error = InvalidRequestError(f"{request.path} does not take {request.method}; allowed: {allowed}.")
        response = error_response(error, METHOD_NOT_ALLOWED)
        response.headers["allow"] = allowed
        return response
    if isinstance(exception, PayloadTooLarge):
        is_head = "header" in str(exception)  # Sanic's words are the only sign
        limit = Http.HEADER_MAX_SIZE if is_head else request.app.config.REQUEST_MAX_SIZE
        what = "request's head" if is_head else "request"
        return error_response(RequestTooLargeError(f"The {what} is larger than the limit of {limit} bytes."))
    if isinstance(exception, RequestTimeout):
        return error_response(InvalidRequestError(str(exception)), REQUEST_TIMEOUT)
    if exception.status_code == 503:
        return error_response(UnavailableError(str(exception)))
    if exception.status_code >= 500:
        return error_response(InternalError(str(exception)))
    kind = ErrorKind(exception.status_code, "BadRequestError", "INVALID_ARGUMENT")
    reason = str(exception).rstrip(".")
    return error_response(InvalidRequestError(f"The HTTP request is malformed: {reason}."), kind)
