"""What /v1/chat/completions and /v1/completions share: the model check, usage, finish reasons.

Knows nothing of messages or prompts.
"""

from __future__ import annotations

from typing import TypeVar

from sanic.request import Request

from jaxserve.errors import InvalidRequestError, ModelNotFoundError
from jaxserve.server.decode import decode_request
from jaxserve.server.pieces import Piece
from jaxserve.server.replies import PromptTokensDetails, Usage
from jaxserve.server.schemas import ChatBody, CompletionBody
from jaxserve.server.settings import ServerSettings
from jaxserve.types import FinishReason

Body = TypeVar("Body", ChatBody, CompletionBody)


def read_openai_body(
    request: Request, body_type: type[Body], refusals: dict[str, str], settings: ServerSettings
) -> Body:
    """Decode and check what both routes check. A wrong Content-Type is 400, as in SGLang, not 415."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequestError(f"Content-Type must be application/json, got {content_type!r}.")
    body = decode_request(request.body, body_type, refusals)
    if settings.is_model_name_strict and body.model is not None:
        check_model(body.model, settings)
    return body


def check_model(name: str, settings: ServerSettings) -> None:
    """ModelNotFoundError unless the name is the served one, in any case, or "default"."""
    if name.lower() not in (settings.served_model_name.lower(), "default"):
        raise ModelNotFoundError(
            f"The model {name!r} does not exist; this server serves {settings.served_model_name!r}.",
            param="model",
        )


def finish_name(finish: FinishReason | None) -> str | None:
    """OpenAI's finish_reason: "stop", "length" or "abort", which are our kinds."""
    return None if finish is None else finish.kind


def matched_stop(finish: FinishReason | None) -> int | str | None:
    """The stop token's id or the stop string; null when the length or an abort ended it."""
    return None if finish is None else finish.matched


def read_cache_salt(value: str | None, extra_key: str | None) -> str:
    return value or extra_key or ""


class UsageCounter:
    """Adds up the counts of a run as its pieces pass: each prompt once, each choice's output."""

    def __init__(self, num_choices_per_prompt: int):
        self._num_choices_per_prompt = num_choices_per_prompt
        self._last: dict[int, Piece] = {}

    def note(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._last[piece.index] = piece

    def total(self) -> Usage:
        outputs = list(self._last.values())
        return _add_up([last for last in outputs if last.index % self._num_choices_per_prompt == 0], outputs)

    def of(self, index: int) -> Usage:
        """The usage of one choice alone, for continuous_usage_stats."""
        return _add_up([self._last[index]], [self._last[index]])


def _add_up(prompts: list[Piece], outputs: list[Piece]) -> Usage:
    num_prompt = sum(piece.num_prompt_tokens for piece in prompts)
    num_output = sum(piece.num_output_tokens for piece in outputs)
    num_cached = sum(piece.num_cached_tokens for piece in prompts)
    return Usage(
        prompt_tokens=num_prompt,
        total_tokens=num_prompt + num_output,
        completion_tokens=num_output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )
