"""What a launch decides about the HTTP side: names, limits and defaults, frozen.

Built once by the composition root and read by every route. Knows nothing of flags or YAML (the
launcher turns those into this) and nothing of the engine's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.images import ImageReader
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTools:
    """The model's text side, as the text room made it, and what reads images if the model takes them."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    images: ImageReader | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """The model's own generation_config.json, used by chat where a request leaves a field null."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """Take the sampling fields out of a generation_config.json; its top_k 0 (off) becomes our -1."""
    top_k = generation_config.get("top_k")
    return SamplingDefaults(
        temperature=generation_config.get("temperature"),
        top_p=generation_config.get("top_p"),
        top_k=-1 if top_k == 0 else top_k,
        min_p=generation_config.get("min_p"),
        repetition_penalty=generation_config.get("repetition_penalty"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Everything the routes need to know beyond the engine and the text tools.

    `server_args` are the resolved flags, shown by /server_info (keys are never shown there).
    `heartbeat_limit_s` is how long the engine may be silent before /health says so; a step that takes
    longer than this would be reported as a failure. `max_sequences` bounds prompts x n of one request.
    """

    served_model_name: str
    model_path: str
    tokenizer_path: str = ""  # "" means model_path
    load_format: str = "auto"
    api_key: str | None = None
    admin_api_key: str | None = None  # for operators' routes; None: the API key, if there is one
    allowed_origins: tuple[str, ...] = ("*",)  # whose pages may call; "*" is any
    weight_version: str = "default"
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    # Under the names of /generate's sampling_params, for what a request leaves open, on every route.
    preferred_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    is_model_name_strict: bool = False
    random_seed: int | None = None  # starts the seeds of requests that bring none; None: unpredictable
    max_concurrent_requests: int | None = None
    max_sequences: int = 4096
    max_n: int | None = None  # None: only max_sequences bounds it
    max_prompt_tokens: int | None = None  # None: what the context holds
    max_body_bytes: int = 64 * 1024 * 1024
    upload_timeout_s: float = 120.0  # for a request's body to arrive
    stream_interval: int = 1  # tokens a streamed frame, at least
    is_streaming_incremental: bool = False  # /generate frames hold only what is new
    keep_alive_s: float = 15.0  # silence before a comment is sent on a stream
    heartbeat_limit_s: float = 30.0
    health_generate_timeout_s: float = 20.0
    is_access_logged: bool = True
    launch_command: str = ""
    server_args: Mapping[str, Any] = field(default_factory=dict)
