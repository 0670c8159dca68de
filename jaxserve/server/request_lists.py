"""One value or a list of them: how batches are written in request bodies.

Used by /generate and /v1/completions. Pure functions; knows nothing of what the values mean.
"""

from __future__ import annotations

from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.server.generation import new_rid, read_rid


def spread(value: Any, num_prompts: int, is_list: bool, field: str) -> list[Any]:
    """One value for all prompts, or a list with one for each of a list of prompts."""
    if not isinstance(value, list):
        return [value] * num_prompts
    if not is_list:
        raise InvalidRequestError(f"{field} may only be a list when there is a list of prompts.", param=field)
    if len(value) != num_prompts:
        raise InvalidRequestError(
            f"{field} must have one entry for each of the {num_prompts} prompts, got {len(value)}.",
            param=field,
        )
    return value


def name_prompts(rid: str | list[str] | None, num_prompts: int, is_list: bool) -> list[str]:
    """A request id for each prompt: new ones, the client's list, or its one id numbered."""
    if isinstance(rid, list):
        return [read_rid(item) for item in spread(rid, num_prompts, is_list, "rid")]
    if not rid:
        return [new_rid() for _ in range(num_prompts)]
    name = read_rid(rid)
    return [f"{name}_{order}" for order in range(num_prompts)] if is_list else [name]


def read_id_lists(ids: list[Any], field: str) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of several, and whether there was a list of prompts."""
    nested = [item for item in ids if isinstance(item, list)]
    if nested and len(nested) < len(ids):
        raise InvalidRequestError(
            f"{field} must be a list of token ids or a list of such lists, got a mixture.", param=field
        )
    return (nested, True) if nested else ([ids], False)
