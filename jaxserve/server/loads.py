"""/v1/loads and /get_load: what load balancers ask, in SGLang's shape, from counts that are there already.

There is one entry for each engine behind this server, by dp_rank. Knows nothing of generation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve import __version__
from jaxserve.errors import InvalidRequestError
from jaxserve.server.engine_port import count_devices
from jaxserve.server.replies import json_response
from jaxserve.server.state import AppState, state_of
from jaxserve.types import EngineInfo, EngineStats

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
GIB = 2**30


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("loads")
    blueprint.add_route(show_loads, "/v1/loads", methods=["GET"])
    blueprint.add_route(show_load, "/get_load", methods=["GET"])
    return blueprint


async def show_loads(request: Request) -> HTTPResponse:
    """?include= sections (all), ?format= json or prometheus, ?dp_rank= a filter."""
    state = state_of(request)
    info = _require_info(state)
    query = request.get_args(keep_blank_values=True)
    sections = _read_sections(query.get("include"))
    layout = query.get("format", "json")
    if layout not in ("json", "prometheus"):
        raise InvalidRequestError(f"format must be json or prometheus, got {layout!r}.", param="format")
    rank = _read_rank(query.get("dp_rank"))
    loads = [
        {"dp_rank": order, **_describe_load(each.info or info, each.stats, sections)}
        for order, each in enumerate(state.engine.engines)
        if rank in (None, order)
    ]
    if layout == "prometheus":
        return HTTPResponse(_render_gauges(loads), content_type="text/plain; version=0.0.4; charset=utf-8")
    body = {
        "timestamp": datetime.now(UTC).isoformat(),
        "version": __version__,
        "accelerator": info.device_kind,
        "num_accelerators": count_devices(state.engine),
        "loads": loads,
    }
    return json_response(body)


async def show_load(request: Request) -> HTTPResponse:
    """The older form of /v1/loads: a list with the same entries."""
    state = state_of(request)
    info = _require_info(state)
    entries = [
        {"dp_rank": rank, **_count_load(each.info or info, each.stats)}
        for rank, each in enumerate(state.engine.engines)
    ]
    return json_response(entries)


def _count_load(info: EngineInfo, stats: EngineStats) -> dict[str, Any]:
    return {
        "num_reqs": stats.num_running + stats.num_queued,
        "num_waiting_reqs": stats.num_queued,
        "num_tokens": _count_used(info, stats) + stats.num_waiting_tokens,
        "num_pending_tokens": stats.num_waiting_tokens,
        "ts_tic": time.time(),
    }


def _require_info(state: AppState) -> EngineInfo:
    """The engine's facts once it has told them, asleep or not."""
    return state.engine.info or state.generator.require_ready()


def _describe_load(info: EngineInfo, stats: EngineStats, sections: Sequence[str]) -> dict[str, Any]:
    num_used = _count_used(info, stats)
    hit_rate = stats.num_cached_tokens / stats.num_prompt_tokens if stats.num_prompt_tokens else 0.0
    load: dict[str, Any] = {
        "timestamp": time.time(),
        "num_running_reqs": stats.num_running,
        "num_waiting_reqs": stats.num_queued,
        "num_used_tokens": num_used,
        "num_total_tokens": num_used + stats.num_waiting_tokens,
        "max_total_num_tokens": info.max_total_tokens,
        "token_usage": num_used / max(info.max_total_tokens, 1),
        "gen_throughput": stats.gen_throughput,
        "cache_hit_rate": hit_rate,
        "utilization": stats.num_running / max(info.max_running_requests, 1),
        "max_running_requests": info.max_running_requests,
    }
    if "memory" in sections:
        load["memory"] = {
            "weight_gb": stats.param_bytes / GIB,
            "kv_cache_gb": stats.kv_bytes / GIB,
            "graph_gb": 0.0,
            "token_capacity": info.max_total_tokens,
        }
    if "queues" in sections:
        load["queues"] = {
            "waiting": stats.num_queued,
            "grammar": 0,
            "paused": stats.num_running + stats.num_queued if stats.is_paused else 0,
            "retracted": stats.num_retracted,
        }
    return load


def _count_used(info: EngineInfo, stats: EngineStats) -> int:
    return max(info.num_pages - stats.num_free_pages, 0) * info.page_size


def _read_sections(include: str | None) -> Sequence[str]:
    sections = ["all"] if include is None else [word.strip() for word in include.split(",")]
    for section in sections:
        if section not in SECTIONS:
            raise InvalidRequestError(
                f"include must be some of {', '.join(SECTIONS)}, separated by commas; got {section!r}.",
                param="include",
            )
    return SECTIONS if "all" in sections else sections


def _read_rank(given: str | None) -> int | None:
    if given is None:
        return None
    if not given.isdecimal() or len(given) > 9:
        raise InvalidRequestError(f"dp_rank must be a whole number, got {given!r}.", param="dp_rank")
    return int(given)


def _render_gauges(loads: list[dict[str, Any]]) -> str:
    samples: dict[str, list[str]] = {}
    for load in loads:
        flat = {key: value for key, value in load.items() if isinstance(value, int | float)}
        for section in ("memory", "queues"):
            flat |= {f"{section}_{key}": value for key, value in load.get(section, {}).items()}
        rank = flat.pop("dp_rank")
        for key, value in flat.items():
            samples.setdefault(key, []).append(f'sglang_{key}{{dp_rank="{rank}"}} {value}')
    lines = [line for key, found in samples.items() for line in (f"# TYPE sglang_{key} gauge", *found)]
    return "\n".join(lines) + "\n"
