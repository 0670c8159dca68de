"""Routes for operators: health, readiness, metrics, aborting requests, emptying the prefix cache.

Health is what the engine's status and heartbeat say: it answers in milliseconds and never queues
anything; only /health_generate runs a real token. An engine that sleeps or is paused is healthy, and not
ready. Knows nothing of reply formats.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.errors import InternalError, InvalidRequestError, UnavailableError
from jaxserve.server.access import check_operator
from jaxserve.server.decode import decode_body
from jaxserve.server.generation import new_rid
from jaxserve.server.replies import HealthReply, json_response
from jaxserve.server.schemas import AbortBody
from jaxserve.server.state import AppState, state_of
from jaxserve.types import TokenParams

_METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_FLUSH_WAIT_S = 600.0
_UNGUESSED_CHARS = 8


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("admin")
    for path in ("/health", "/ping"):
        blueprint.add_route(check_health, path, methods=["GET", "HEAD"], name=path[1:])
    blueprint.add_route(check_readiness, "/ready", methods=["GET", "HEAD"])
    blueprint.add_route(check_health_by_generating, "/health_generate", methods=["GET"])
    blueprint.add_route(show_metrics, "/metrics", methods=["GET"])
    blueprint.add_route(flush_cache, "/flush_cache", methods=["GET", "POST"], ctx_is_for_operators=True)
    blueprint.add_route(abort_request, "/abort_request", methods=["POST"])
    return blueprint


async def check_health(request: Request) -> HTTPResponse:
    """200 while the engine is there, awake or asleep, and has spoken lately; else 503 with the reason."""
    state = state_of(request)
    _require_health(state)
    return _describe_health(state)


async def check_readiness(request: Request) -> HTTPResponse:
    """200 while a request would be served at once; 503 with the reason otherwise."""
    state = state_of(request)
    _require_health(state)
    _require_readiness(state)
    return _describe_health(state)


def _describe_health(state: AppState) -> HTTPResponse:
    age_s = round(state.engine.heartbeat_age_s, 3)
    return json_response(HealthReply(engine=state.engine.status, heartbeat_age_s=age_s))


def _require_readiness(state: AppState) -> None:
    state.generator.require_ready()
    if state.engine.stats.is_paused:
        raise UnavailableError("Generation is paused; requests wait until it goes on.")


def _require_health(state: AppState) -> None:
    if state.engine.status != "asleep":
        state.generator.require_ready()
    age_s, limit_s = state.engine.heartbeat_age_s, state.settings.heartbeat_limit_s
    if age_s > limit_s:
        raise UnavailableError(f"The engine has been silent for {age_s:.1f} s; the limit is {limit_s:g} s.")


async def check_health_by_generating(request: Request) -> HTTPResponse:
    """200 once the engine has made one token, within the time limit. All who ask meanwhile wait for the same
    token: this path needs no key, and must not keep the engine busy."""
    state = state_of(request)
    _require_health(state)
    _require_readiness(state)
    probe = state.token_probe
    if probe.task is None or probe.task.done():
        probe.task = asyncio.create_task(_generate_in_time(state))
        probe.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have left
    await asyncio.shield(probe.task)
    return _describe_health(state)


async def _generate_in_time(state: AppState) -> None:
    limit_s = state.settings.health_generate_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            await _generate_one_token(state)
    except TimeoutError:
        raise UnavailableError(f"The engine made no token within {limit_s:g} s.") from None


async def _generate_one_token(state: AppState) -> None:
    prompt_ids = state.text.tokenizer.encode("The capital of France is")[:1]
    deltas = state.engine.generate(f"health-{new_rid()}", prompt_ids, TokenParams(max_new_tokens=1))
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.finish is None:
                continue
            if delta.finish.kind == "abort":
                raise UnavailableError(f"The engine aborted a one-token request: {delta.finish.message}")
            return
    raise InternalError("The engine ended a one-token request without a result.")


async def show_metrics(request: Request) -> HTTPResponse:
    return HTTPResponse(state_of(request).metrics.render(), content_type=_METRICS_CONTENT_TYPE)


async def flush_cache(request: Request) -> HTTPResponse:
    """Empty the prefix cache; waits up to ?timeout= seconds for running requests to end."""
    state = state_of(request)
    state.generator.require_ready()
    if await state.engine.flush_cache(_read_timeout_s(request)):
        return HTTPResponse("Cache flushed.\n", content_type="text/plain; charset=utf-8")
    text = "Cache not flushed: requests are running or waiting.\n"
    return HTTPResponse(text, status=400, content_type="text/plain; charset=utf-8")


def _read_timeout_s(request: Request) -> float:
    given = request.get_args(keep_blank_values=True).get("timeout")
    try:
        timeout_s = 0.0 if given is None else float(given)
    except ValueError:
        timeout_s = -1.0
    if not 0 <= timeout_s <= _MAX_FLUSH_WAIT_S:
        raise InvalidRequestError(
            f"timeout must be a number of seconds in [0, {_MAX_FLUSH_WAIT_S:g}], got {given!r}.",
            param="timeout",
        )
    return timeout_s


async def abort_request(request: Request) -> HTTPResponse:
    """End the live requests that `rid` means (`_is_meant`), or all, which is an operator's order."""
    engine = state_of(request).engine
    body = decode_body(request.body, AbortBody)
    if body.abort_all:
        check_operator(request)
    for rid in list(engine.live_rids()):
        if body.abort_all or _is_meant(rid, body.rid or ""):
            engine.abort(rid)
    return HTTPResponse(status=200, content_type="text/plain; charset=utf-8")


def _is_meant(rid: str, prefix: str) -> bool:
    """Whether an id begins so: with whole words of it, or with so much that nobody guesses it. Else sixteen
    digits would end everybody's requests, which is an operator's to order."""
    if not prefix or not rid.startswith(prefix):
        return False
    around = prefix[-1] + rid[len(prefix) :][:1]
    return len(prefix) >= _UNGUESSED_CHARS or len(around) < 2 or not around.isalnum()
