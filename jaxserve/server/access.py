"""Who may call: keys, and the web pages that may give an operator's orders.

Called by middleware.py before a request's body is read, and by routes of which only a part is for operators.
A browser sends what any page tells it to, and without asking if it looks like a form; so an order from a
page is taken only if the page is this server's own or its origin was named at launch. Knows of routes only
which of them need no key and which are for operators (`is_for_operators` in a route's ctx).
"""

from __future__ import annotations

import hmac

from sanic.request import Request

from jaxserve.errors import ForbiddenError, UnauthorizedError
from jaxserve.server.state import state_of

# Probes and scrapes carry no key.
OPEN_PATHS = ("/health", "/ready", "/metrics")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def check_caller(request: Request) -> None:
    """UnauthorizedError without the key of the route, ForbiddenError for a foreign page's order."""
    if request.method == "OPTIONS" or request.path.startswith(OPEN_PATHS):
        return
    if request.route is not None and getattr(request.route.ctx, "is_for_operators", False):
        check_operator(request)
    else:
        settings = state_of(request).settings
        if settings.api_key:
            _check_key(request, "API key", settings.api_key, settings.admin_api_key)


def check_operator(request: Request) -> None:
    """The admin key if there is one, else the API key; and no page of somebody else's."""
    _check_page(request)
    settings = state_of(request).settings
    if settings.admin_api_key:
        _check_key(request, "admin API key", settings.admin_api_key)
    elif settings.api_key:
        _check_key(request, "API key", settings.api_key)


def _check_key(request: Request, name: str, *keys: str | None) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given_bytes = given.strip().encode(errors="replace")
    # A header has no blanks at its ends, so those of a key (the line break of its file) do not count either.
    rights = [key.strip().encode() for key in keys if key and key.strip()]
    is_right = any(hmac.compare_digest(given_bytes, right) for right in rights)
    if scheme.lower() != "bearer" or not is_right:
        raise UnauthorizedError(f"The {name} is missing or wrong; send it as Authorization: Bearer KEY.")


def _check_page(request: Request) -> None:
    """Browsers say where a request comes from in Origin, or at least in Sec-Fetch-Site (of an image, say);
    other clients send neither."""
    origin = request.headers.get("origin")
    if origin is not None and origin in state_of(request).settings.allowed_origins:
        return
    is_foreign = origin is not None and not _is_own_origin(origin, request.headers.get("host", ""))
    if is_foreign or request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        page = "A web page of another origin" if origin is None else f"A web page of origin {origin!r}"
        raise ForbiddenError(
            f"{page} may not call {request.path}, which is for operators. Call it from a program, or name "
            "the page's origin in --allowed-origins (* does not count here)."
        )


def _is_own_origin(origin: str, host: str) -> bool:
    """Whether both name the same host and port; "null", which sandboxed pages send, names none."""
    scheme, _, place = origin.lower().partition("://")
    default = _DEFAULT_PORTS.get(scheme, "")
    return bool(place) and place.removesuffix(default) == host.lower().removesuffix(default)
