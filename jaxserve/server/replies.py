"""What the routes send: response bodies as msgspec structs, in the key order clients print.

Shapes are those of SGLang's quickstart and source (0.5.x, a superset of its versions) and of the
OpenAI API. A field of type Unset is left out of the JSON when it is not set; None is sent as null.
Knows nothing of how the values come about.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType
from sanic.response import HTTPResponse

from jaxserve.types import FinishReason

T = TypeVar("T")

ENCODER = msgspec.json.Encoder()


def seal(value: T) -> T:
    """The value as finished JSON, for a reply that holds very many: it takes less memory, and the encoding
    of the whole, which nothing can interrupt, has only to copy it. Nobody can look into it any more."""
    return cast(T, msgspec.Raw(ENCODER.encode(value)))


def json_response(body: Any) -> HTTPResponse:
    """A 200 with a struct, or anything else that msgspec encodes."""
    return HTTPResponse(ENCODER.encode(body), content_type="application/json")


class ErrorDetail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: int | str


class ErrorBody(msgspec.Struct, kw_only=True):
    object: Literal["error"] = "error"
    message: str
    type: str
    param: str | None
    code: int
    status: str
    error: ErrorDetail


LogprobEntry = tuple[
    float | None, int, str | None
]  # log-probability, token id, the token's text if asked for


class MetaInfo(msgspec.Struct, kw_only=True):
    """Counts, times and logprobs of one /generate output; both spellings of the retraction count are sent.

    The entries of `input_...` begin with the position that was asked for, whose logprob is null.
    """

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    weight_version: str
    total_retractions: int
    num_retractions: int
    reasoning_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_tokens_details: dict[str, int]
    dp_rank: int | None
    e2e_latency: float  # seconds
    response_sent_to_client_ts: float  # unix time
    input_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    output_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    output_token_logprobs_length: int | UnsetType = UNSET
    input_top_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    input_token_ids_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    output_token_ids_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    cumulative_logprob: float | UnsetType = UNSET  # of a beam
    spec_verify_ct: int | UnsetType = UNSET  # steps after the first token; all five if anything was guessed
    spec_accept_length: float | UnsetType = UNSET  # tokens a step
    spec_accept_rate: float | UnsetType = UNSET
    spec_accept_token_num: int | UnsetType = UNSET
    spec_draft_token_num: int | UnsetType = UNSET


def render_finish(finish: FinishReason | None, num_output_tokens: int) -> dict[str, Any] | None:
    """The `finish_reason` of a native reply; None while the sequence goes on."""
    if finish is None:
        return None
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": num_output_tokens}
    return {"type": "abort", "message": finish.message or "Aborted", "status_code": None, "err_type": None}


class GenerateReply(msgspec.Struct, kw_only=True):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET  # streamed batches only
    prompt_token_ids: list[int] | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: dict[str, int] | None = None  # as in SGLang, which counts no kinds of tokens
    reasoning_tokens: int = 0


class Metadata(msgspec.Struct, kw_only=True):
    weight_version: str


class CachedTokensDetails(msgspec.Struct, kw_only=True):
    device: int
    host: int


class Extension(msgspec.Struct, kw_only=True):
    """What SGLang adds to a whole OpenAI reply, under the key sglext."""

    cached_tokens_details: CachedTokensDetails


class TopLogprob(msgspec.Struct, kw_only=True, gc=False):
    """One token as an alternative. `bytes` are exact where `token` cannot be: half a character, say."""

    token: str
    bytes: list[int]
    logprob: float
    token_id: int


class TokenLogprob(msgspec.Struct, kw_only=True, gc=False):
    token: str
    bytes: list[int]
    logprob: float
    token_id: int
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Lists side by side, an entry a token; `text_offset` counts characters of the choice's whole text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]
    token_ids: list[int]


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    matched_stop: int | str | None = None
    cumulative_logprob: float | UnsetType = UNSET  # of a beam
    prompt_token_ids: list[int] | UnsetType = UNSET
    response_token_ids: list[int] | UnsetType = UNSET
    meta_info: MetaInfo | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: Metadata
    sglext: Extension | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | None = None  # always present: clients read the attribute unguarded


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    cumulative_logprob: float | UnsetType = UNSET  # of a beam, on its last chunk


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    sglext: Extension | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    cumulative_logprob: float | UnsetType = UNSET  # of a beam
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    meta_info: MetaInfo | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A /v1/completions reply; a streamed chunk is the same object with the last two left out."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    sglext: Extension | UnsetType = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxserve"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelInfo(msgspec.Struct, kw_only=True):
    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool = True
    preferred_sampling_params: dict[str, Any] | None = None
    weight_version: str
    load_format: str
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    disaggregation_mode: str = "null"
    has_image_understanding: bool = False
    has_audio_understanding: bool = False
    model_type: str
    architectures: list[str]


class HealthReply(msgspec.Struct, kw_only=True):
    status: Literal["healthy"] = "healthy"
    engine: str
    heartbeat_age_s: float
