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
    stop_regex: str | list[str] | None = None
    beam_width: int | None = None  # above 1: beam search; 0 and 1: none
    stream_interval: int | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    custom_params: Any = None
    watermark: Any = None
    choice: Any = None


ImageData = str | dict[str, Any]


class GenerateBody(msgspec.Struct, kw_only=True):
    """POST or PUT /generate. One of text and input_ids; lists of them make a batch."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None  # the switch for the five below
    logprob_start_len: int | list[int] | None = None  # -1: of the output only
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None  # a list of lists for a batch
    return_text_in_logprobs: bool | None = None
    logprobs_mode: str | None = None  # "raw" or "scaled"
    beam_width: int | None = None  # as in sampling_params
    rid: str | list[str] | None = None
    priority: int | str | None = None
    routed_dp_rank: int | None = None  # which engine is to serve it, of --dp-size
    data_parallel_rank: int | None = None  # its older name
    cache_salt: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    return_prompt_token_ids: bool | None = None
    image_data: ImageData | list[ImageData | list[ImageData] | None] | None = None  # URLs or base64
    mm_processor_kwargs: dict[str, Any] | None = None  # min_pixels and max_pixels of the images


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatBody(msgspec.Struct, kw_only=True):
    """POST /v1/chat/completions: OpenAI's fields and SGLang's additions."""

    messages: Annotated[
        list[dict[str, Any]],
        msgspec.Meta(
            description="Each has a role (system, developer, user, assistant, tool or function) and a "
            "content: a string, or a list of parts of the type text, or image_url if the model takes images.",
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
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = None
    best_of: int | None = None  # accepted up to n
    beam_width: int | None = None
    num_return_sequences: int | None = None  # accepted where it says what beam_width does
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logprobs_mode: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    input_ids: list[int] | None = None  # instead of what the template makes of the messages
    add_special_tokens: bool | None = None  # null: false
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | float | None = None  # handed to the chat template
    tools: list[dict[str, Any]] | None = None  # handed to the chat template
    tool_choice: str | dict[str, Any] | None = None  # "auto" or "none"
    rid: str | None = None
    request_id: str | None = None
    priority: int | str | None = None
    routed_dp_rank: int | None = None  # which engine is to serve it, of --dp-size
    data_parallel_rank: int | None = None  # its older name
    cache_salt: str | None = None
    extra_key: str | None = None
    return_prompt_token_ids: bool | None = None
    return_token_ids: bool | None = None
    return_meta_info: bool | None = None
    return_cached_tokens_details: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = None  # min_pixels and max_pixels of the images


class CompletionBody(msgspec.Struct, kw_only=True):
    """POST /v1/completions: OpenAI's fields and SGLang's additions. Lists make a batch."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None  # text that comes after what is generated
    model: str | None = None
    max_tokens: int | None = None  # null: 16; 0 with echo: only score the prompt
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
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = None
    best_of: int | None = None  # accepted up to n
    beam_width: int | None = None
    num_return_sequences: int | None = None  # accepted where it says what beam_width does
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    logprobs_mode: str | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None  # null: true
    rid: str | list[str] | None = None
    request_id: str | None = None
    priority: int | str | None = None
    routed_dp_rank: int | None = None  # which engine is to serve it, of --dp-size
    data_parallel_rank: int | None = None  # its older name
    cache_salt: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    return_prompt_token_ids: bool | None = None
    return_token_ids: bool | None = None
    return_meta_info: bool | None = None
    return_cached_tokens_details: bool | None = None


class AbortBody(msgspec.Struct, kw_only=True):
    """POST /abort_request. Every live request whose id begins with `rid` is ended: with whole words of it, or
    with eight characters."""

    rid: str | None = None
    abort_all: bool | None = None


# Read and without effect: they concern accounts, caches, routing or parsers that we do not have.
IGNORED_FIELDS: tuple[str, ...] = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"),
    *("verbosity", "parallel_tool_calls", "separate_reasoning", "stream_reasoning", "require_reasoning"),
    *("thinking", "task", "images_config", "video_config", "use_audio_in_video"),
    *("max_dynamic_patch", "min_dynamic_patch", "mm_hashes", "mm_content_hashes", "log_metrics", "no_logs"),
    *("custom_labels", "routing_key", "conversation_id", "session_id", "bootstrap_host", "bootstrap_port"),
    *("bootstrap_room", "bootstrap_pair_key", "decode_tp_size"),
    *("disagg_prefill_dp_rank", "kv_hints", "routed_experts_start_len", "spaces_between_special_tokens"),
    *("return_flat_raw_top_logprobs_b64", "return_spec_tokens_details"),
    # xLLM's scheduling classes and what its own services send each other
    *("offline", "ttft_slo_ms", "tpot_slo_ms", "ttlt_slo_ms", "ttft_priority_weight", "tpot_priority_weight"),
    *("ttlt_priority_weight", "priority_weight", "service_request_id", "source_xservice_addr", "routing"),
    *("x_request_id", "x_request_time"),
)

_NOT_YET = "by this version."
_TEXT_ONLY = "by this server: the model reads text only."

# Refused when they ask for something; the value ends the sentence "FIELD is not supported ...".
REFUSED_BY_ALL: dict[str, str] = {
    "regex": _NOT_YET,
    "ebnf": _NOT_YET,
    "structural_tag": _NOT_YET,
    "json_schema": _NOT_YET,
    "lora_path": "by this version: no adapters can be loaded.",
    "session_params": _NOT_YET,
    "custom_logit_processor": "by this server: it would run code sent by clients.",
    "custom_params": _NOT_YET,
    "watermark": _NOT_YET,
    "return_hidden_states": _NOT_YET,
    "return_routed_experts": _NOT_YET,
    "max_thinking_tokens": _NOT_YET,
    "return_sampling_mask": _NOT_YET,
    "sampling_logprobs_mode": "by this version; use logprobs_mode.",
    "return_flat_raw_top_logprobs": _NOT_YET,
    "return_flat_raw_output_top_logprobs": _NOT_YET,
    "return_entropy": _NOT_YET,
}
REFUSED_BY_GENERATE: dict[str, str] = {
    **REFUSED_BY_ALL,
    "input_embeds": "by this version: send text or input_ids.",
    "video_data": _TEXT_ONLY,
    "audio_data": _TEXT_ONLY,
}
REFUSED_BY_OPENAI: dict[str, str] = {
    **REFUSED_BY_ALL,
    "response_format": "by this version, except for the type text.",
    **dict.fromkeys(
        # vLLM's names for grammars, which its clients send beside OpenAI's fields
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
        _NOT_YET,
    ),
    "return_input_ids_in_sglext": "by this version; use return_prompt_token_ids.",
    "return_output_ids_in_sglext": "by this version; use return_token_ids.",
}
REFUSED_BY_CHAT: dict[str, str] = {
    **REFUSED_BY_OPENAI,
    "functions": "by this server: use tools.",
    "function_call": "by this server: use tool_choice.",
    "modalities": "by this server, except for text.",
    "audio": _TEXT_ONLY,
    "web_search_options": "by this server.",
    "chat_template": "in a request; give the server one with --chat-template.",
    "token_ids": "by /v1/chat/completions; use input_ids.",
}
REFUSED_BY_COMPLETIONS: dict[str, str] = {
    **REFUSED_BY_OPENAI,
    "token_ids": "by /v1/completions; the prompt may be a list of ids.",
    "input_tensors": "by this version.",
}

# Values of refused fields that ask for nothing special.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "sampling_logprobs_mode": ("selected",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "function_call": ("none",),
}
