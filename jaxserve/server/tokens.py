"""POST /tokenize and /detokenize: text to token ids and back, as the model's own requests are treated.

Needs the tokenizer only, so both answer while the engine is busy, paused, asleep, starting or gone. Knows
nothing of generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_body
from jaxserve.server.openai_protocol import check_model
from jaxserve.server.replies import json_response
from jaxserve.server.route_doc import POST, RouteDoc
from jaxserve.server.settings import ServerSettings
from jaxserve.server.state import AppState, state_of
from jaxserve.text.tokenizer import Tokenizer

T = TypeVar("T")

_INLINE_ITEMS = 4096  # characters or ids; more are worked on by a thread


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize. Either a prompt or messages; null always means the default."""

    prompt: Annotated[
        str | list[str] | None, Meta(description="A text, or a list of texts.", examples=["Hello"])
    ] = None
    messages: Annotated[
        list[dict[str, Any]] | None, Meta(description="A conversation, as /v1/chat/completions takes it.")
    ] = None
    model: str | None = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Put the model's special tokens around. Default: around a prompt, not messages."),
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Add the text of each token.")] = None
    tools: Annotated[list[dict[str, Any]] | None, Meta(description="With messages.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Meta(description="With messages.")] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="With messages: begin the reply's turn. Default: true.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="With messages: the last one is the beginning of the reply.")
    ] = None


class TokenizeReply(msgspec.Struct, kw_only=True):
    """Lists of each for a list of prompts. `max_model_len` is null until the engine has told it."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int | None
    token_strs: list[str | list[str]] | UnsetType = UNSET


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[
        list[int | list[int]],
        Meta(description="Token ids, or a list of such lists.", examples=[[72, 105]]),
    ]
    model: str | None = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text. Default: true.")
    ] = None


class DetokenizeReply(msgspec.Struct, kw_only=True):
    text: str | list[str]


TOKEN_ROUTES = tuple(
    RouteDoc(path=prefix + path, methods=POST, tag="Tokens", summary=summary, body=body, reply=reply)
    for path, summary, body, reply in (
        ("/tokenize", "Text or messages to token ids", TokenizeBody, TokenizeReply),
        ("/detokenize", "Token ids to text", DetokenizeBody, DetokenizeReply),
    )
    for prefix in ("", "/v1")
)


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("tokens")
    for prefix, name in (("", ""), ("/v1", "v1_")):
        blueprint.add_route(tokenize, f"{prefix}/tokenize", methods=["POST"], name=f"{name}tokenize")
        blueprint.add_route(detokenize, f"{prefix}/detokenize", methods=["POST"], name=f"{name}detokenize")
    return blueprint


async def tokenize(request: Request) -> HTTPResponse:
    state = state_of(request)
    body = decode_body(request.body, TokenizeBody)
    _check_model(body.model, state.settings)
    texts, adds_special_tokens = _read_texts(body, state)
    tokenizer = state.text.tokenizer
    id_lists, strs = await _run(
        lambda: _encode(tokenizer, texts, adds_special_tokens, bool(body.return_token_strs)),
        num_items=len(texts) + sum(map(len, texts)),
    )
    is_list = isinstance(body.prompt, list)
    counts = [len(ids) for ids in id_lists]
    info = state.engine.info
    reply = TokenizeReply(
        tokens=[*id_lists] if is_list else [*id_lists[0]],
        count=counts if is_list else counts[0],
        max_model_len=None if info is None else info.context_length,
    )
    if body.return_token_strs:
        reply.token_strs = [*strs] if is_list else [*strs[0]]
    return json_response(reply)


def _read_texts(body: TokenizeBody, state: AppState) -> tuple[list[str], bool]:
    """The texts to encode, and whether special tokens go around them."""
    if (body.prompt is None) == (body.messages is None):
        got = "neither" if body.prompt is None else "both"
        raise InvalidRequestError(f"Give either prompt or messages, got {got}.", param="prompt")
    if body.messages is None:
        texts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
        return texts, body.add_special_tokens is not False
    text = state.text.chat_template.render(
        body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        extra_kwargs=body.chat_template_kwargs,
    )
    return [text], bool(body.add_special_tokens)


def _encode(
    tokenizer: Tokenizer, texts: list[str], adds_special_tokens: bool, has_strs: bool
) -> tuple[list[list[int]], list[list[str]]]:
    id_lists = tokenizer.encode_batch(texts, adds_special_tokens)
    strs = [[tokenizer.token_text(token_id) for token_id in ids] for ids in id_lists] if has_strs else []
    return id_lists, strs


async def detokenize(request: Request) -> HTTPResponse:
    state = state_of(request)
    body = decode_body(request.body, DetokenizeBody)
    _check_model(body.model, state.settings)
    id_lists, is_list = _read_ids(body.tokens)
    tokenizer, info = state.text.tokenizer, state.engine.info
    # A model may give ids beyond its tokenizer's: padding of its vocabulary, which has no text.
    vocab_size = max(tokenizer.vocab_size, 0 if info is None else info.vocab_size)
    skips = body.skip_special_tokens is not False
    texts = await _run(
        lambda: [_decode(tokenizer, ids, vocab_size, skips) for ids in id_lists],
        num_items=len(id_lists) + sum(map(len, id_lists)),
    )
    return json_response(DetokenizeReply(text=texts if is_list else texts[0]))


def _read_ids(tokens: list[int | list[int]]) -> tuple[list[list[int]], bool]:
    """Lists of ids, and whether there was a list of them."""
    lists = [item for item in tokens if isinstance(item, list)]
    if lists and len(lists) < len(tokens):
        raise InvalidRequestError(
            "tokens must be a list of token ids or of lists of them, got a mixture.", param="tokens"
        )
    return (lists, True) if lists else ([[item for item in tokens if isinstance(item, int)]], False)


def _decode(tokenizer: Tokenizer, ids: list[int], vocab_size: int, skips_special_tokens: bool) -> str:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(
            f"tokens holds {wrong}, which is not a token id in [0, {vocab_size}).", param="tokens"
        )
    return tokenizer.decode(ids, skips_special_tokens, at_text_start=True)


def _check_model(name: str | None, settings: ServerSettings) -> None:
    if settings.is_model_name_strict and name is not None:
        check_model(name, settings)


async def _run(work: Callable[[], T], *, num_items: int) -> T:
    """Do small work here and large work on a thread, so that streams go on meanwhile."""
    return work() if num_items <= _INLINE_ITEMS else await asyncio.to_thread(work)
