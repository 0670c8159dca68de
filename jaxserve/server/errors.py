"""One error, one body: from our error tree and from Sanic's exceptions.

Used by the app's error handler, by streams that fail half way, and by health routes. The body
serves SGLang's clients (flat keys), OpenAI's (nested `error`) and xLLM's (`status`) at once.
Knows nothing of routes.
"""

from __future__ import annotations

import msgspec
from sanic.exceptions import MethodNotAllowed, NotFound, PayloadTooLarge, SanicException
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

METHOD_NOT_ALLOWED = ErrorKind(405, "MethodNotAllowedError", "INVALID_ARGUMENT")


def kind_of(error: JaxserveError) -> ErrorKind:
    return ERROR_KINDS.get(type(error), ERROR_KINDS[InternalError])


def error_body(error: JaxserveError, kind: ErrorKind | None = None) -> ErrorBody:
    """Render an error for every family of clients; `kind` overrides the table (for 405)."""
    kind = kind or kind_of(error)
    is_model = isinstance(error, ModelNotFoundError) and error.param == "model"
    code = "model_not_found" if is_model else kind.http_status
    detail = ErrorDetail(message=error.message, type=kind.openai_type, param=error.param, code=code)
    return ErrorBody(
        message=error.message,
        type=kind.openai_type,
        param=error.param,
        code=kind.http_status,
        status=kind.status_name,
        error=detail,
    )


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
        limit = request.app.config.REQUEST_MAX_SIZE
        return error_response(RequestTooLargeError(f"The request is larger than the limit of {limit} bytes."))
    if exception.status_code == 503:
        return error_response(UnavailableError(str(exception)))
    if exception.status_code >= 500:
        return error_response(InternalError(str(exception)))
    kind = ErrorKind(exception.status_code, "BadRequestError", "INVALID_ARGUMENT")
    return error_response(InvalidRequestError(f"The HTTP request is malformed: {exception}."), kind)
