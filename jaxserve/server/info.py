"""What the server says of itself: /v1/models, /model_info, /server_info, under old and new names.

All answer 503 until the engine is ready, so that whoever waits for them waits for the model. Knows
nothing of generation.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve import __version__
from jaxserve.server.engine_port import count_devices
from jaxserve.server.openai_protocol import check_model
from jaxserve.server.replies import ModelCard, ModelInfo, ModelList, json_response
from jaxserve.server.state import AppState, state_of
from jaxserve.types import EngineInfo, EngineStats

_SECRET_ARGS = ("api_key", "admin_api_key")


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("info")
    blueprint.add_route(list_models, "/v1/models", methods=["GET"])
    blueprint.add_route(show_model, "/v1/models/<model_id:path>", methods=["GET"])
    for path in ("/model_info", "/get_model_info"):
        blueprint.add_route(show_model_info, path, methods=["GET"], name=path[1:])
    for path in ("/server_info", "/get_server_info"):
        blueprint.add_route(show_server_info, path, methods=["GET"], name=path[1:])
    return blueprint


async def list_models(request: Request) -> HTTPResponse:
    return json_response(ModelList(data=[_make_card(state_of(request))]))


async def show_model(request: Request, model_id: str) -> HTTPResponse:
    if not model_id:  # /v1/models/: on every other route a slash at the end changes nothing
        return await list_models(request)
    state = state_of(request)
    # OpenAI's client writes the slash of ORG/NAME as %2F, and Sanic unquotes no parameter that is a path.
    check_model(unquote(model_id), state.settings)
    return json_response(_make_card(state))


def _make_card(state: AppState) -> ModelCard:
    info = _require_info(state)
    name = state.settings.served_model_name
    return ModelCard(id=name, created=int(state.started_at_s), root=name, max_model_len=info.context_length)


def _require_info(state: AppState) -> EngineInfo:
    """The engine's facts once it has told them, even while it drains."""
    return state.engine.info or state.generator.require_ready()


async def show_model_info(request: Request) -> HTTPResponse:
    state = state_of(request)
    info, settings = _require_info(state), state.settings
    body = ModelInfo(
        model_path=state.weights.model_path,
        served_model_name=settings.served_model_name,
        tokenizer_path=settings.tokenizer_path or settings.model_path,
        preferred_sampling_params=dict(settings.preferred_sampling_params) or None,
        weight_version=state.weights.version,
        load_format=settings.load_format,
        has_image_understanding=state.text.images is not None,
        model_type=info.model_type,
        architectures=[info.architecture],
    )
    return json_response(body)


async def show_server_info(request: Request) -> HTTPResponse:
    """Every resolved flag, then the facts and live counts that benchmark clients read. Sizes are of one
    engine, counts of all; `internal_states` has an entry for each."""
    state = state_of(request)
    info, settings = _require_info(state), state.settings
    flags = {name: value for name, value in settings.server_args.items() if name not in _SECRET_ARGS}
    facts: dict[str, Any] = {
        "model_path": state.weights.model_path,
        "served_model_name": settings.served_model_name,
        "tokenizer_path": settings.tokenizer_path or settings.model_path,
        "launch_command": settings.launch_command,
        "version": __version__,
        "frontend": "sanic",
        "status": state.engine.status,
        "startup_time": info.startup_s,
        "platform": info.platform,
        "device_kind": info.device_kind,
        "num_devices": count_devices(state.engine),
        "dtype": info.dtype,
        "quantization": info.quantization,
        "context_length": info.context_length,
        "page_size": info.page_size,
        "num_pages": info.num_pages,
        "chunked_prefill_size": info.chunked_prefill_size,
        "max_running_requests": info.max_running_requests,
        "max_total_num_tokens": info.max_total_tokens,
        "max_req_input_len": info.context_length - 1,
        "weight_version": state.weights.version,
        **_count_load(state.engine.stats),
        **_describe_memory(state.engine.stats),
        "internal_states": [
            _describe_engine(each.info or info, each.stats, len(state.engine.engines))
            for each in state.engine.engines
        ],
    }
    return json_response({**flags, **facts})


def _count_load(stats: EngineStats) -> dict[str, Any]:
    """The live counts: here and in `internal_states`, for whoever looks in either place."""
    return {
        "num_running_reqs": stats.num_running,
        "num_queue_reqs": stats.num_queued,
        "num_free_pages": stats.num_free_pages,
        "num_cached_pages": stats.num_cached_pages,
        "is_paused": stats.is_paused,
        "is_sleeping": bool(stats.released),
    }


def _describe_memory(stats: EngineStats) -> dict[str, Any]:
    """Bytes held now: by kind on the device, all that the device's allocator counts, and on the host."""
    return {
        "param_bytes": stats.param_bytes,
        "kv_bytes": stats.kv_bytes,
        "slot_bytes": stats.slot_bytes,
        "device_bytes": stats.device_bytes or stats.param_bytes + stats.kv_bytes + stats.slot_bytes,
        "host_param_bytes": stats.host_param_bytes,
    }


def _describe_engine(info: EngineInfo, stats: EngineStats, dp_size: int) -> dict[str, Any]:
    return {
        "last_gen_throughput": stats.gen_throughput,
        "avg_spec_accept_length": stats.spec_accept_length or None,
        "effective_max_running_requests_per_dp": info.max_running_requests,
        "dp_size": dp_size,
        "memory_usage": {
            "weight": round(stats.param_bytes / 2**30, 3),  # GiB
            "kvcache": round(stats.kv_bytes / 2**30, 3),
            "token_capacity": info.max_total_tokens,
        },
        **_count_load(stats),
        "num_steps": stats.num_steps,
        "num_retractions": stats.num_retractions,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_computed_tokens": stats.num_computed_tokens,
        "num_evicted_tokens": stats.num_evicted_tokens,
        "num_compiles": stats.num_compiles,
        "num_late_compiles": stats.num_late_compiles,
        "is_warm": stats.is_warm,
    }
