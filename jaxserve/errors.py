"""The error tree, and the one table from error to HTTP status, OpenAI type and xLLM status name.

    JaxserveError                 a sentence for a person, and the field it is about
    |- InvalidRequestError        400  the request asks for something impossible
    |- UnauthorizedError          401  API key missing or wrong
    |- ForbiddenError             403  a web page of another origin gives an operator's order
    |- ModelNotFoundError         404  no such model (or route)
    |- RequestTooLargeError       413  body larger than the server reads
    |- OverloadedError            429  queue or concurrency limit reached; carries Retry-After
    |- ClientGoneError            499  the client closed its connection (logs only, never sent)
    |- InternalError              500  our fault
    |- UnavailableError           503  starting, draining, or the engine is being restarted
    |- ConfigError                --   a flag or a YAML key (launch time)
    `- WeightError                --   a checkpoint (launch time)

Errors are raised at the boundary where they are noticed, as sentences that name the field, the value
and the range. `assert` is for our own invariants. Knows nothing of HTTP libraries.
"""

from __future__ import annotations

from dataclasses import dataclass


class JaxserveError(Exception):
    """A failure with a sentence for a person. `param` names the field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(JaxserveError):
    pass


class UnauthorizedError(JaxserveError):
    pass


class ForbiddenError(JaxserveError):
    pass


class ModelNotFoundError(JaxserveError):
    pass


class RequestTooLargeError(JaxserveError):
    pass


class OverloadedError(JaxserveError):
    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1):
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class ClientGoneError(JaxserveError):
    pass


class InternalError(JaxserveError):
    pass


class UnavailableError(JaxserveError):
    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1):
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class ConfigError(JaxserveError):
    pass


class WeightError(JaxserveError):
    pass


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of error is told to each family of clients."""

    http_status: int
    openai_type: str
    status_name: str


ERROR_KINDS: dict[type[JaxserveError], ErrorKind] = {
    InvalidRequestError: ErrorKind(400, "BadRequestError", "INVALID_ARGUMENT"),
    UnauthorizedError: ErrorKind(401, "AuthenticationError", "UNAUTHENTICATED"),
    ForbiddenError: ErrorKind(403, "PermissionDeniedError", "PERMISSION_DENIED"),
    ModelNotFoundError: ErrorKind(404, "NotFoundError", "UNKNOWN"),
    RequestTooLargeError: ErrorKind(413, "RequestTooLargeError", "INVALID_ARGUMENT"),
    OverloadedError: ErrorKind(429, "RateLimitError", "RESOURCE_EXHAUSTED"),
    ClientGoneError: ErrorKind(499, "ClientClosedRequest", "CANCELLED"),
    InternalError: ErrorKind(500, "InternalServerError", "INTERNAL"),
    UnavailableError: ErrorKind(503, "ServiceUnavailableError", "UNAVAILABLE"),
}

# How a failure is named when it crosses from the engine to its clients in a FinishReason.
ERROR_BY_STATUS: dict[int, type[JaxserveError]] = {kind.http_status: cls for cls, kind in ERROR_KINDS.items()}
