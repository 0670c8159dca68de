"""RouteDoc: what /openapi.json and the docs say of one path.

Filled in by openapi.py and schemas_operations.py. Knows nothing of how routes work.
"""

from __future__ import annotations

from dataclasses import dataclass

GET, POST = ("GET",), ("POST",)
GET_POST = ("GET", "POST")
PROBE = ("GET", "HEAD")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDoc:
    """One path of the API. `reply` is a struct type, or a media type for anything that is not JSON."""

    path: str
    methods: tuple[str, ...]
    tag: str
    summary: str
    body: type | None = None
    is_body_required: bool = True
    reply: type | str = "application/json"
    event: type | None = None  # what `stream: true` sends
    query: tuple[str, ...] = ()  # numbers
    text_query: tuple[str, ...] = ()
    is_for_operators: bool = False  # wants the admin key if there is one
