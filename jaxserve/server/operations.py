"""Routes for operators that change what the engine does: sleep and wake, pause and go on, other weights.

Three servers' names lead to the same few operations of the engine: xLLM's /sleep, /wakeup, /pause and
/resume, SGLang's /release_memory_occupation, /resume_memory_occupation, /pause_generation,
/continue_generation and /update_weights_from_disk, vLLM's /sleep?level=, /wake_up and /is_sleeping. An order
that was given is carried out even if the client leaves. Knows nothing of generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import structs
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from jaxserve.server.decode import decode_body, refuse_unsupported
from jaxserve.server.errors import error_body
from jaxserve.server.replies import ENCODER, json_response
from jaxserve.server.schemas_operations import (
    GENERATION_PAUSES,
    MAX_WAIT_S,
    PAUSES,
    TAGS,
    WAIT_MODES,
    MemoryBody,
    MessageReply,
    PauseBody,
    PauseGenerationBody,
    ResumeBody,
    SleepBody,
    SleepingReply,
    StatusReply,
    UpdateReply,
    UpdateVersionBody,
    UpdateWeightsBody,
    VersionReply,
    WakeBody,
)
from jaxserve.server.state import AppState, state_of
from jaxserve.types import MEMORY_TAGS

T = TypeVar("T")

logger = logging.getLogger(__name__)

LIGHT, DEEP = 1, 2
LEVELS: dict[int | str, int] = {
    **dict.fromkeys((1, "1", "LIGHT_SLEEP"), LIGHT),
    **dict.fromkeys((2, "2", "DEEP_SLEEP"), DEEP),
}
SLEEP_TIMEOUT_S = 60.0
EMPTY_TYPE = "text/plain; charset=utf-8"
MAX_VERSION_CHARS = 256

REFUSED_BY_WAKEUP = {
    "remote_addrs": "by this server: weights come from host memory or from their files.",
    "src_weight_segments": "by this server: weights come from host memory or from their files.",
}


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("operations")
    get_and_post = ["GET", "POST"]
    for handler, path, methods in (
        (sleep, "/sleep", ["POST"]),
        (wake_up, "/wakeup", ["POST"]),
        (wake_up_tags, "/wake_up", ["POST"]),
        (release_memory, "/release_memory_occupation", get_and_post),
        (resume_memory, "/resume_memory_occupation", get_and_post),
        (pause_generation, "/pause_generation", ["POST"]),
        (continue_generation, "/continue_generation", ["POST"]),
        (pause, "/pause", ["POST"]),
        (resume, "/resume", ["POST"]),
        (update_weights, "/update_weights_from_disk", ["POST"]),
        (update_weight_version, "/update_weight_version", ["POST"]),
    ):
        blueprint.add_route(handler, path, methods=methods, ctx_is_for_operators=True)
    blueprint.add_route(is_sleeping, "/is_sleeping", methods=["GET"])
    return blueprint


async def sleep(request: Request) -> HTTPResponse:
    """Give the device's memory back: xLLM's body, or vLLM's ?level= without one."""
    state = state_of(request)
    query = request.get_args(keep_blank_values=True)
    level = query.get("level")
    body = _decode(request, SleepBody)
    if body.model_id is not None or level is None:
        _check_model_id(body.model_id, state)
    if level is not None:
        level = _read_level(level, "level")
        if body.master_status is not None and _read_level(body.master_status) != level:
            raise InvalidRequestError(
                f"master_status {body.master_status!r} contradicts ?level={level}; send one of them.",
                param="master_status",
            )
    else:
        level = _read_level(body.master_status)
    mode = _read_choice(body.mode or query.get("mode"), WAIT_MODES, "wait")
    timeout_s = _read_timeout_s(body.timeout)
    _require_engine(state)
    present = _present_level(state)
    if present >= level:
        raise InvalidRequestError(f"Model is already sleeping, at level {present}.", param="master_status")
    await state.engine.release_memory(
        MEMORY_TAGS, keeps_weights=level == LIGHT, mode=mode, timeout_s=timeout_s
    )
    return HTTPResponse(status=200, content_type=EMPTY_TYPE)


async def wake_up(request: Request) -> HTTPResponse:
    """Undo a sleep, of any kind."""
    state = state_of(request)
    body = _decode(request, WakeBody)
    refuse_unsupported(request.body or b"{}", REFUSED_BY_WAKEUP)
    _check_model_id(body.model_id, state)
    _require_engine(state)
    if state.engine.status == "ready":
        raise InvalidRequestError("Model is already awake.", param="model_id")
    await state.engine.resume_memory(MEMORY_TAGS)
    return HTTPResponse(status=200, content_type=EMPTY_TYPE)


async def wake_up_tags(request: Request) -> HTTPResponse:
    """The same under vLLM's name: no body, ?tags= for a part, and nothing to do is no error."""
    await _resume_tags(state_of(request), _read_tags(_list_tags(request)))
    return HTTPResponse(status=200, content_type=EMPTY_TYPE)


async def is_sleeping(request: Request) -> HTTPResponse:
    return json_response(SleepingReply(is_sleeping=bool(state_of(request).engine.stats.released)))


async def release_memory(request: Request) -> HTTPResponse:
    """Give back the memory of `tags`, kept in host memory if it is the weights; null if done."""
    state = state_of(request)
    body = _decode(request, MemoryBody)
    tags = _read_tags(_list_tags(request) if body.tags is None else body.tags)
    mode = _read_choice(body.mode, WAIT_MODES, "wait")
    timeout_s = _read_timeout_s(body.timeout)
    _require_engine(state)
    if tags:
        await state.engine.release_memory(tags, keeps_weights=True, mode=mode, timeout_s=timeout_s)
    return json_response(None)


async def resume_memory(request: Request) -> HTTPResponse:
    """Take the memory of `tags` again; null if done, or if there was nothing to do."""
    body = _decode(request, ResumeBody)
    tags = _read_tags(_list_tags(request) if body.tags is None else body.tags)
    await _resume_tags(state_of(request), tags)
    return json_response(None)


async def pause_generation(request: Request) -> HTTPResponse:
    """Stand still; requests wait until /continue_generation."""
    mode = _read_choice(_decode(request, PauseGenerationBody).mode, GENERATION_PAUSES, "abort")
    await state_of(request).engine.pause(mode)
    return json_response(MessageReply(message="Generation paused successfully."))


async def continue_generation(request: Request) -> HTTPResponse:
    await state_of(request).engine.resume()
    return json_response(MessageReply(message="Generation continued successfully."))


async def pause(request: Request) -> HTTPResponse:
    """The same under xLLM's name and modes."""
    given = _decode(request, PauseBody).mode or request.get_args(keep_blank_values=True).get("mode")
    mode = _read_choice(given, PAUSES, "abort")
    await state_of(request).engine.pause("retract" if mode == "keep" else mode)
    return json_response(StatusReply(status="paused"))


async def resume(request: Request) -> HTTPResponse:
    await state_of(request).engine.resume()
    return json_response(StatusReply(status="running"))


async def update_weights(request: Request) -> HTTPResponse:
    """Serve another checkpoint of the same architecture. 400 with the reason, and all as before, if not."""
    state = state_of(request)
    body = decode_body(request.body, UpdateWeightsBody)
    if not body.model_path:
        raise InvalidRequestError("model_path cannot be empty.", param="model_path")
    if body.weight_version is not None:
        _check_version(body.weight_version, "weight_version")
    _require_engine(state)
    try:
        return json_response(await _carry_through(state, _update_weights(state, body)))
    except UnavailableError as error:
        if state.engine.status not in ("ready", "asleep"):
            raise
        failure = structs.asdict(error_body(InvalidRequestError(error.message)))
        content = ENCODER.encode({**failure, "success": False, "num_paused_requests": 0})
        return HTTPResponse(content, status=400, content_type="application/json")


async def _update_weights(state: AppState, body: UpdateWeightsBody) -> UpdateReply:
    engine = state.engine
    if body.abort_all_requests:
        _abort_all(state)
    num_paused = await engine.update_weights(
        body.model_path, body.load_format or "auto", flushes_cache=body.flush_cache is not False
    )
    version = state.weights.note_update(body.model_path, body.weight_version)
    if engine.stats.is_paused and not body.keep_pause:
        await engine.resume()
    message = f"Succeeded to update model weights. Weight version updated to {version}."
    return UpdateReply(message=message, num_paused_requests=num_paused)


async def update_weight_version(request: Request) -> HTTPResponse:
    """Give the present weights another label."""
    state = state_of(request)
    body = decode_body(request.body, UpdateVersionBody)
    _check_version(body.new_version, "new_version")
    if body.abort_all_requests is not False:
        _abort_all(state)
    state.weights.rename(body.new_version)
    message = f"Weight version updated to {body.new_version}"
    return json_response(VersionReply(message=message, new_version=body.new_version))


def _decode(request: Request, body_type: type[T]) -> T:
    """The body; none at all is an empty one."""
    return decode_body(request.body or b"{}", body_type)


async def _carry_through(state: AppState, work: Coroutine[Any, Any, T]) -> T:
    """Do it to its end, whether or not the client waits for it."""
    task = asyncio.create_task(work)
    state.chores.add(task)
    task.add_done_callback(state.chores.discard)
    task.add_done_callback(_log_failure)
    return await asyncio.shield(task)


def _log_failure(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.warning("%s", error)


async def _resume_tags(state: AppState, tags: Sequence[str]) -> None:
    _require_engine(state)
    if tags and state.engine.status != "ready":
        await state.engine.resume_memory(tags)


def _abort_all(state: AppState) -> None:
    for rid in list(state.engine.live_rids()):
        state.engine.abort(rid)


def _require_engine(state: AppState) -> None:
    """UnavailableError unless the model is loaded, awake or asleep."""
    if state.engine.status != "asleep":
        state.generator.require_ready()


def _check_model_id(model_id: str | None, state: AppState) -> None:
    if not model_id:
        raise InvalidRequestError("model_id is required.", param="model_id")
    name = state.settings.served_model_name
    if model_id.lower() not in (name.lower(), name.rpartition("/")[2].lower()):
        raise ModelNotFoundError(
            f"The model {model_id!r} does not exist; this server serves {name!r}.", param="model_id"
        )


def _read_level(value: int | str | None, field: str = "master_status") -> int:
    if value not in LEVELS:
        got = "nothing" if value is None else repr(value)
        raise InvalidRequestError(
            f"{field} must be 1 (LIGHT_SLEEP) or 2 (DEEP_SLEEP), got {got}.", param=field
        )
    return LEVELS[value]


def _present_level(state: AppState) -> int:
    """0 unless all memory is given back."""
    stats = state.engine.stats
    if set(stats.released) != set(MEMORY_TAGS):
        return 0
    return LIGHT if stats.host_param_bytes else DEEP


def _read_choice(value: str | None, choices: Sequence[str], default: str, field: str = "mode") -> str:
    if value is not None and value not in choices:
        raise InvalidRequestError(f"{field} must be one of {', '.join(choices)}, got {value!r}.", param=field)
    return value or default


def _read_timeout_s(value: float | None) -> float:
    if value is not None and not 0 <= value <= MAX_WAIT_S:
        raise InvalidRequestError(
            f"timeout must be a number of seconds in [0, {MAX_WAIT_S:g}], got {value:g}.", param="timeout"
        )
    return SLEEP_TIMEOUT_S if value is None else value


def _check_version(version: str, field: str) -> None:
    if not 0 < len(version) <= MAX_VERSION_CHARS:
        raise InvalidRequestError(
            f"{field} must have 1 to {MAX_VERSION_CHARS} characters, got {len(version)}.", param=field
        )


def _list_tags(request: Request) -> list[str]:
    """Those of ?tags=, which may come several times."""
    return request.get_args(keep_blank_values=True).getlist("tags")


def _read_tags(tags: Sequence[str]) -> list[str]:
    """Those that mean something here; none given are all. cuda_graph has no effect."""
    for tag in tags:
        _read_choice(tag, TAGS, "", "tags")
    return [tag for tag in MEMORY_TAGS if tag in (tags or TAGS)]
