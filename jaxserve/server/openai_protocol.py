"""What /v1/chat/completions and /v1/completions share: checks, usage, finish reasons, additions to choices.

Knows nothing of messages or prompts.
"""

from __future__ import annotations

from typing import TypeVar

from msgspec import UNSET, UnsetType
from sanic.request import Request

from jaxserve.errors import InvalidRequestError, ModelNotFoundError
from jaxserve.server.decode import decode_request
from jaxserve.server.generation import Run
from jaxserve.server.meta_info import MetaInfoWriter
from jaxserve.server.pieces import Piece
from jaxserve.server.replies import (
    CachedTokensDetails,
    Extension,
    MetaInfo,
    PromptTokensDetails,
    Usage,
)
from jaxserve.server.schemas import ChatBody, CompletionBody
from jaxserve.server.settings import ServerSettings
from jaxserve.server.state import AppState
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
    if body.stream:
        _refuse_in_streams(body)
    return body


def _refuse_in_streams(body: ChatBody | CompletionBody) -> None:
    """As in SGLang: whole replies only, but for the token ids of completions."""
    wanted = {
        "return_meta_info": body.return_meta_info,
        "return_prompt_token_ids": body.return_prompt_token_ids,
        "return_token_ids": body.return_token_ids and isinstance(body, ChatBody),
    }
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise InvalidRequestError(
                f"{name} is not supported with stream; set stream to false.", param=name
            )


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


def cumulative_logprob(piece: Piece) -> float | UnsetType:
    """The score of a whole beam; no key for any other choice."""
    return UNSET if piece.cumulative_logprob is None else piece.cumulative_logprob


class Additions:
    """What a request asked to be added to its choices and its reply; UNSET where it did not."""

    def __init__(self, body: ChatBody | CompletionBody, run: Run, state: AppState):
        self._run = run
        self._has_prompt_ids = bool(body.return_prompt_token_ids or body.return_token_ids)
        self._has_ids = bool(body.return_token_ids)
        self._has_cached_details = bool(body.return_cached_tokens_details)
        self._meta_info: MetaInfoWriter | None = None
        if body.return_meta_info:
            self._meta_info = MetaInfoWriter(run, state.text.tokenizer, state.weights, has_text=True)

    def prompt_token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return self._run.choices[piece.index].prompt_ids if self._has_prompt_ids else UNSET

    def token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return piece.token_ids if self._has_ids else UNSET

    def meta_info(self, piece: Piece) -> MetaInfo | UnsetType:
        return UNSET if self._meta_info is None else self._meta_info.describe(piece)

    def extension(self, first: Piece | None) -> Extension | UnsetType:
        """`sglext`, told of the first choice as SGLang does."""
        if first is None or not self._has_cached_details:
            return UNSET
        return Extension(cached_tokens_details=CachedTokensDetails(device=first.num_cached_tokens, host=0))


class UsageCounter:
    """Adds up the counts of a run as its pieces pass: each prompt once, each choice's output."""

    def __init__(self, num_choices_per_prompt: int):
        self._num_choices_per_prompt = num_choices_per_prompt
        self._last: dict[int, Piece] = {}

    def note(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._last[piece.index] = piece

    @property
    def first(self) -> Piece | None:
        """The last piece of the first choice, if one has come."""
        return self._last.get(0)

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
