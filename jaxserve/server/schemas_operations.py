"""What the operators' routes accept and send: sleep, pause, memory, weights. Null always means the default.

The names are xLLM's, SGLang's and vLLM's; unknown fields are ignored, as those servers do. Used by
operations.py and openapi.py. Knows nothing of how anything is done.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from jaxserve.server.route_doc import GET, GET_POST, POST, RouteDoc

MAX_WAIT_S = 3600.0

# Choices are strings to the decoder and checked by hand: its own refusals do not say what is allowed.
WAIT_MODES = ("wait", "refuse", "abort")
GENERATION_PAUSES = ("abort", "retract", "in_place")
PAUSES = ("keep", "abort", "wait")
TAGS = ("weights", "kv_cache", "cuda_graph")

WaitMode = Annotated[
    str,
    msgspec.Meta(
        description="Open requests end first (wait), are a reason to refuse (refuse), or get 503 (abort).",
        extra_json_schema={"enum": list(WAIT_MODES)},
    ),
]
Timeout = Annotated[
    float,
    msgspec.Meta(
        description="Seconds that open requests have to end.",
        extra_json_schema={"minimum": 0, "maximum": MAX_WAIT_S},
    ),
]


def _choice(*values: str) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema={"enum": list(values)})


class SleepBody(msgspec.Struct, kw_only=True):
    """POST /sleep. Level 1 keeps the weights in host memory, level 2 drops them."""

    model_id: str | None = None
    master_status: Annotated[
        int | str | None, msgspec.Meta(description="1 or LIGHT_SLEEP, 2 or DEEP_SLEEP.", examples=[1])
    ] = None
    mode: WaitMode | None = None  # null: wait
    timeout: Timeout | None = None  # null: 60


class WakeBody(msgspec.Struct, kw_only=True):
    """POST /wakeup."""

    model_id: str | None = None


class MemoryBody(msgspec.Struct, kw_only=True):
    """/release_memory_occupation; null or empty tags are all of them."""

    tags: list[Annotated[str, _choice(*TAGS)]] | None = None
    mode: WaitMode | None = None
    timeout: Timeout | None = None


class ResumeBody(msgspec.Struct, kw_only=True):
    """/resume_memory_occupation; null or empty tags are all of them."""

    tags: list[Annotated[str, _choice(*TAGS)]] | None = None


class PauseGenerationBody(msgspec.Struct, kw_only=True):
    """POST /pause_generation."""

    mode: Annotated[str, _choice(*GENERATION_PAUSES)] | None = None  # null: abort


class PauseBody(msgspec.Struct, kw_only=True):
    """POST /pause: keep what runs for later, end it, or wait for its end."""

    mode: Annotated[str, _choice(*PAUSES)] | None = None  # null: abort


class UpdateWeightsBody(msgspec.Struct, kw_only=True):
    """POST /update_weights_from_disk. `model_path` is what --model-path takes."""

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool | None = None
    weight_version: str | None = None  # null: the present label and a count
    flush_cache: bool | None = None  # null: true
    keep_pause: bool | None = None


class UpdateVersionBody(msgspec.Struct, kw_only=True):
    """POST /update_weight_version: another label for the same weights."""

    new_version: str
    abort_all_requests: bool | None = None  # null: true, as in SGLang


# Read and without effect: they concern CUDA graphs, torch, or what this server does anyway.
IGNORED_BY_UPDATE = ("is_async", "torch_empty_cache", "recapture_cuda_graph", "token_step", "manifest")


class SleepingReply(msgspec.Struct, kw_only=True):
    is_sleeping: bool


class MessageReply(msgspec.Struct, kw_only=True):
    message: str
    status: Literal["ok"] = "ok"


class StatusReply(msgspec.Struct, kw_only=True):
    status: Literal["paused", "running"]


class UpdateReply(msgspec.Struct, kw_only=True):
    """What a failure sends has these keys too, beside those of every error, and `success` false."""

    success: Literal[True] = True
    message: str
    num_paused_requests: int


class VersionReply(msgspec.Struct, kw_only=True):
    success: Literal[True] = True
    message: str
    new_version: str


def _order(path: str, tag: str, summary: str, body: type | None = None, **facts: Any) -> RouteDoc:
    """An operators' route, whose body may be left out."""
    facts = {"methods": POST, "is_body_required": False, "is_for_operators": True, **facts}
    return RouteDoc(path=path, tag=tag, summary=summary, body=body, **facts)


OPERATOR_ROUTES: tuple[RouteDoc, ...] = (
    _order(
        "/sleep",
        "Sleep",
        "Give device memory back; level 1 keeps the weights in host memory, level 2 drops them",
        SleepBody,
        reply="text/plain",
        query=("level",),
        text_query=("mode",),
    ),
    _order("/wakeup", "Sleep", "Take it again", WakeBody, is_body_required=True, reply="text/plain"),
    _order("/wake_up", "Sleep", "The same under vLLM's name", reply="text/plain", text_query=("tags",)),
    RouteDoc(
        path="/is_sleeping",
        tag="Sleep",
        summary="Whether device memory is given back",
        reply=SleepingReply,
        methods=GET,
    ),
    _order(
        "/release_memory_occupation",
        "Sleep",
        "Give the memory of weights, kv_cache or both back; the weights stay in host memory",
        MemoryBody,
        methods=GET_POST,
        text_query=("tags",),
    ),
    _order(
        "/resume_memory_occupation",
        "Sleep",
        "Take the memory of weights, kv_cache or both again",
        ResumeBody,
        methods=GET_POST,
        text_query=("tags",),
    ),
    _order("/pause_generation", "Pause", "Stand still", PauseGenerationBody, reply=MessageReply),
    _order("/continue_generation", "Pause", "Go on", reply=MessageReply),
    _order(
        "/pause", "Pause", "Stand still, in xLLM's words", PauseBody, reply=StatusReply, text_query=("mode",)
    ),
    _order("/resume", "Pause", "Go on", reply=StatusReply),
    _order(
        "/update_weights_from_disk",
        "Weights",
        "Serve another checkpoint of the same architecture",
        UpdateWeightsBody,
        is_body_required=True,
        reply=UpdateReply,
    ),
    _order(
        "/update_weight_version",
        "Weights",
        "Give the weights another label",
        UpdateVersionBody,
        is_body_required=True,
        reply=VersionReply,
    ),
    RouteDoc(
        path="/v1/loads",
        tag="Info",
        summary="How busy the engine is",
        methods=GET,
        query=("dp_rank",),
        text_query=("include", "format"),
    ),
    RouteDoc(path="/get_load", tag="Info", summary="The same in an older form", methods=GET),
)
