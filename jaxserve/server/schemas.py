"""What the routes accept: request bodies as msgspec structs. Null always means the default.

Decoded by `decode`, turned into SamplingParams by `sampling`, and the source of /openapi.json. The
tables at the end say what is read but has no effect, and what is refused; docs print them.
Knows nothing of generation.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of /generate, under SGLang's names. `seed` is a shorter sampling_seed."""

    max_new_tokens: int | UnsetType | None = UNSET  # null: until the context is full; absent: 128
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: int | None = None
    logit_bias: dict[int, float] | None = None
    sampling_seed: int | None = None
    seed: int | None = None
    stream_interval: int | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    stop_regex: Any = None
    custom_params: Any = None
    beam_width: Any = None
    watermark: Any = None
    choice: Any = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """POST or PUT /generate. One of text and input_ids; lists of them make a batch."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    return_prompt_token_ids: bool | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatBody(msgspec.Struct, kw_only=True):
    """POST /v1/chat/completions: OpenAI's fields and SGLang's additions."""

    messages: Annotated[
        list[dict[str, Any]],
        msgspec.Meta(
            description="Each has a role (system, developer, user, assistant, tool or function) and a "
            "content: a string, or a list of parts of the type text.",
            examples=[[{"role": "user", "content": "What is the capital of France?"}]],
        ),
    ]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # wins over max_tokens; both null: fill the context
    min_tokens: int | None = None
    temperature: float | None = None  # these five: null takes the model's generation_config
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: int | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | float | None = None  # handed to the chat template
    tools: list[dict[str, Any]] | None = None  # handed to the chat template
    tool_choice: str | dict[str, Any] | None = None  # "auto" or "none"
    rid: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None


class CompletionBody(msgspec.Struct, kw_only=True):
    """POST /v1/completions: OpenAI's fields and SGLang's additions. Lists make a batch."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: int | None = None  # null: 16
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: int | None = None
    best_of: int | None = None  # accepted up to n
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | list[str] | None = None
    extra_key: str | list[str] | None = None


class AbortBody(msgspec.Struct, kw_only=True):
    """POST /abort_request. Every live request whose id begins with `rid` is ended."""

    rid: str | None = None
    abort_all: bool | None = None


# Read and without effect: they concern accounts, caches, routing or parsers that we do not have.
IGNORED_FIELDS: tuple[str, ...] = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"),
    *("verbosity", "parallel_tool_calls", "separate_reasoning", "stream_reasoning", "require_reasoning"),
    *("mm_processor_kwargs", "max_dynamic_patch", "mm_hashes", "mm_content_hashes", "log_metrics", "no_logs"),
    *(
        "custom_labels",
        "routing_key",
        "conversation_id",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
    ),
    *("routed_dp_rank", "data_parallel_rank", "decode_tp_size", "kv_hints", "return_text_in_logprobs"),
    *("logprob_start_len", "routed_experts_start_len", "spaces_between_special_tokens"),
)

_NOT_YET = "by this version."
_TEXT_ONLY = "by this server: the model reads text only."

# Refused when they ask for something; the value ends the sentence "FIELD is not supported ...".
REFUSED_BY_ALL: dict[str, str] = {
    "beam_width": _NOT_YET,
    "stop_regex": _NOT_YET,
    "regex": _NOT_YET,
    "ebnf": _NOT_YET,
    "structural_tag": _NOT_YET,
    "json_schema": _NOT_YET,
    "lora_path": "by this version: no adapters can be loaded.",
    "session_params": _NOT_YET,
    "session_id": _NOT_YET,
    "custom_logit_processor": "by this server: it would run code sent by clients.",
    "custom_params": _NOT_YET,
    "return_hidden_states": _NOT_YET,
    "return_routed_experts": _NOT_YET,
    "max_thinking_tokens": _NOT_YET,
}
REFUSED_BY_GENERATE: dict[str, str] = {
    **REFUSED_BY_ALL,
    "input_embeds": "by this version: send text or input_ids.",
    "image_data": _TEXT_ONLY,
    "video_data": _TEXT_ONLY,
    "audio_data": _TEXT_ONLY,
    "return_logprob": _NOT_YET,
    "top_logprobs_num": _NOT_YET,
    "token_ids_logprob": _NOT_YET,
    "return_flat_raw_top_logprobs": _NOT_YET,
    "return_sampling_mask": _NOT_YET,
    "return_entropy": _NOT_YET,
}
REFUSED_BY_OPENAI: dict[str, str] = {
    **REFUSED_BY_ALL,
    "logprobs": _NOT_YET,
    "top_logprobs": _NOT_YET,
    "response_format": "by this version, except for the type text.",
    "return_token_ids": _NOT_YET,
    "return_prompt_token_ids": _NOT_YET,
    "return_meta_info": _NOT_YET,
    "return_cached_tokens_details": _NOT_YET,
}
REFUSED_BY_CHAT: dict[str, str] = {
    **REFUSED_BY_OPENAI,
    "functions": "by this server: use tools.",
    "function_call": "by this server: use tool_choice.",
    "modalities": "by this server, except for text.",
    "audio": _TEXT_ONLY,
    "web_search_options": "by this server.",
    "chat_template": "in a request; give the server one with --chat-template.",
    "input_ids": "by /v1/chat/completions; use /generate.",
}
REFUSED_BY_COMPLETIONS: dict[str, str] = {
    **REFUSED_BY_OPENAI,
    "echo": _NOT_YET,
    "suffix": _NOT_YET,
}

# Values of refused fields that ask for nothing special.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "beam_width": (1,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "function_call": ("none",),
}
