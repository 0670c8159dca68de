"""/openapi.json and /docs, made from the same msgspec schemas that decode requests and encode replies.

The table of routes below is compared with the app's router by a test. The page needs nothing from
outside. Knows nothing of how routes work.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec
from sanic import Blueprint
from sanic.request import Request
from sanic.response import HTTPResponse

from jaxserve.server.docs_page import render_page
from jaxserve.server.replies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    ErrorBody,
    GenerateReply,
    HealthReply,
    ModelCard,
    ModelInfo,
    ModelList,
    json_response,
)
from jaxserve.server.route_doc import GET, POST, PROBE, RouteDoc
from jaxserve.server.sample import SampleBody, SampleReply
from jaxserve.server.schemas import AbortBody, ChatBody, CompletionBody, GenerateBody
from jaxserve.server.schemas_operations import OPERATOR_ROUTES
from jaxserve.server.state import state_of
from jaxserve.server.tokens import TOKEN_ROUTES

_REF = "#/components/schemas/{name}"
_ERROR_STATUSES = {
    "400": "The request asks for something impossible or not supported; the message names the field.",
    "401": "The API key is missing or wrong.",
    "403": "A web page of another origin may not call an operators' route.",
    "404": "No such model or route.",
    "413": "The body is larger than the server reads.",
    "429": "The queue or the concurrency limit is full; Retry-After says when to come back.",
    "500": "The server failed.",
    "503": "The engine is starting, asleep, draining or dead.",
}


ROUTES: tuple[RouteDoc, ...] = (
    RouteDoc(
        path="/v1/chat/completions",
        methods=POST,
        tag="OpenAI",
        summary="Continue a conversation",
        body=ChatBody,
        reply=ChatCompletion,
        event=ChatChunk,
    ),
    RouteDoc(
        path="/v1/completions",
        methods=POST,
        tag="OpenAI",
        summary="Continue one or many prompts",
        body=CompletionBody,
        reply=Completion,
        event=Completion,
    ),
    RouteDoc(path="/v1/models", methods=GET, tag="OpenAI", summary="The served model", reply=ModelList),
    RouteDoc(
        path="/v1/models/{model_id}", methods=GET, tag="OpenAI", summary="One model by name", reply=ModelCard
    ),
    RouteDoc(
        path="/generate",
        methods=("POST", "PUT"),
        tag="Native",
        summary="Continue texts or token ids; a list for a batch",
        body=GenerateBody,
        reply=GenerateReply,
        event=GenerateReply,
    ),
    RouteDoc(
        path="/v1/sample",
        methods=POST,
        tag="xLLM",
        summary="The likeliest tokens wherever a prompt holds a literal",
        body=SampleBody,
        reply=SampleReply,
    ),
    *TOKEN_ROUTES,
    RouteDoc(path="/health", methods=PROBE, tag="Health", summary="Is the engine alive", reply=HealthReply),
    RouteDoc(path="/ready", methods=PROBE, tag="Health", summary="Are requests taken", reply=HealthReply),
    RouteDoc(path="/ping", methods=PROBE, tag="Health", summary="The same for SageMaker", reply=HealthReply),
    RouteDoc(path="/health_generate", methods=GET, tag="Health", summary="Make one token", reply=HealthReply),
    RouteDoc(path="/model_info", methods=GET, tag="Info", summary="About the model", reply=ModelInfo),
    RouteDoc(
        path="/get_model_info", methods=GET, tag="Info", summary="/model_info's older name", reply=ModelInfo
    ),
    RouteDoc(path="/server_info", methods=GET, tag="Info", summary="Every setting, and live counts"),
    RouteDoc(path="/get_server_info", methods=GET, tag="Info", summary="/server_info's older name"),
    RouteDoc(path="/metrics", methods=GET, tag="Operation", summary="Prometheus metrics", reply="text/plain"),
    RouteDoc(
        path="/flush_cache",
        methods=("GET", "POST"),
        tag="Operation",
        summary="Empty the prefix cache, waiting up to timeout seconds",
        reply="text/plain",
        query=("timeout",),
        is_for_operators=True,
    ),
    RouteDoc(
        path="/abort_request",
        methods=POST,
        tag="Operation",
        summary="End requests by id or its first words, or all",
        body=AbortBody,
        reply="text/plain",
    ),
    *OPERATOR_ROUTES,
    RouteDoc(path="/docs", methods=GET, tag="Docs", summary="The API as a page", reply="text/html"),
    RouteDoc(path="/openapi.json", methods=GET, tag="Docs", summary="The OpenAPI description"),
)


def make_blueprint() -> Blueprint:
    blueprint = Blueprint("openapi")
    blueprint.add_route(show_openapi, "/openapi.json", methods=["GET"])
    blueprint.add_route(show_docs, "/docs", methods=["GET"])
    return blueprint


async def show_openapi(request: Request) -> HTTPResponse:
    return json_response(describe_api())


async def show_docs(request: Request) -> HTTPResponse:
    page = render_page(describe_api(), state_of(request).settings.served_model_name)
    return HTTPResponse(page, content_type="text/html; charset=utf-8")


@cache
def describe_api() -> dict[str, Any]:
    """The OpenAPI 3.2 document: the first version that can describe streams of events."""
    types: list[type] = [ErrorBody]
    for route in ROUTES:
        types += [item for item in (route.body, route.reply, route.event) if isinstance(item, type)]
    types = list(dict.fromkeys(types))
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "jaxserve",
            "version": "1",
            "description": "OpenAI's, SGLang's and xLLM's request formats on one port.",
        },
        "paths": {route.path: _describe_path(route) for route in ROUTES},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _describe_path(route: RouteDoc) -> dict[str, Any]:
    path: dict[str, Any] = {method.lower(): _describe_operation(route, method) for method in route.methods}
    names = re.findall(r"{(\w+)}", route.path)
    parameters = [_parameter(name, "path", "string") for name in names]
    parameters += [_parameter(name, "query", "number") for name in route.query]
    parameters += [_parameter(name, "query", "string") for name in route.text_query]
    if parameters:
        path["parameters"] = parameters
    return path


def _parameter(name: str, place: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": kind}}


def _describe_operation(route: RouteDoc, method: str) -> dict[str, Any]:
    slug = re.sub(r"\W+", "_", route.path).strip("_")
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{slug}",
        "tags": [route.tag],
        "summary": route.summary,
        "responses": {"200": _describe_reply(route)} | _describe_errors(),
    }
    if route.body is not None and method != "GET":
        content = {"application/json": {"schema": _reference(route.body)}}
        operation["requestBody"] = {"required": route.is_body_required, "content": content}
    return operation


def _describe_reply(route: RouteDoc) -> dict[str, Any]:
    if isinstance(route.reply, str):
        content: dict[str, Any] = {route.reply: {}}
    else:
        schema = _reference(route.reply)
        if route.path == "/generate":
            schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
        content = {"application/json": {"schema": schema}}
    if route.event is not None:
        content["text/event-stream"] = {"itemSchema": _describe_event(route.event)}
    return {"description": "Success", "content": content}


def _describe_event(event: type) -> dict[str, Any]:
    """One server-sent event: JSON in its data, an error in the worst case, and [DONE] at the end."""
    failure = {"type": "object", "required": ["error"], "properties": {"error": _reference(ErrorBody)}}
    content = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(event), failure]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, content]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _describe_errors() -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(ErrorBody)}}
    return {status: {"description": text, "content": content} for status, text in _ERROR_STATUSES.items()}


def _reference(body_type: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=body_type.__name__)}
