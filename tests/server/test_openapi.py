"""/openapi.json and /docs say what the server does: every route, every field, true examples."""

from __future__ import annotations

import re

import jsonschema
import pytest

from jaxserve.server.app import create_app
from jaxserve.server.openapi import ROUTES, describe_api
from jaxserve.server.schemas import (
    IGNORED_FIELDS,
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
    REFUSED_BY_GENERATE,
    ChatBody,
    CompletionBody,
    GenerateBody,
)
from tests.fakes import FAKE_SETTINGS, FakeEngine, make_text_tools
from tests.server.events import read_events

USER = [{"role": "user", "content": "Hi"}]


def test_every_route_is_described_and_every_description_is_a_route():
    app = create_app(FakeEngine(), make_text_tools(), FAKE_SETTINGS)
    served = {
        (re.sub(r"<(\w+):\w+>", r"{\1}", f"/{route.path}"), method)
        for route in app.router.routes
        for method in route.methods
    }
    assert served == {(route.path, method) for route in ROUTES for method in route.methods}
    orders = {
        f"/{route.path}" for route in app.router.routes if getattr(route.ctx, "is_for_operators", False)
    }
    assert orders == {route.path for route in ROUTES if route.is_for_operators}


def test_document_is_sound(client):
    api = client.get("/openapi.json").json()
    assert api == describe_api()
    assert api["openapi"] == "3.2.0"
    for schema in api["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = set(re.findall(r"#/components/schemas/(\w+)", str(api)))
    assert references <= set(api["components"]["schemas"])
    ids = [operation["operationId"] for path in api["paths"].values() for operation in operations(path)]
    assert len(ids) == len(set(ids))


def operations(path: dict) -> list[dict]:
    return [value for key, value in path.items() if key != "parameters"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "a"}),
        ("/generate", {"text": "a"}),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"n": 2}}),
        ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True, "return_token_ids": True}),
        ("/v1/completions", {"prompt": "a", "beam_width": 2, "return_cached_tokens_details": True}),
        (
            "/generate",
            {
                "text": "ab",
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 1,
                "token_ids_logprob": [5],
            },
        ),
    ],
)
def test_replies_and_events_fit_their_schemas(client, path, body):
    api = describe_api()
    content = api["paths"][path]["post"]["responses"]["200"]["content"]
    whole = {**content["application/json"]["schema"], "components": api["components"]}
    _, data = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    event = {**data["contentSchema"], "components": api["components"]}
    jsonschema.validate(client.post(path, json=body).json(), whole)
    options = {} if path == "/generate" else {"stream_options": {"include_usage": True}}
    for item in read_events(client.post(path, json={**body, "stream": True, **options})):
        jsonschema.validate(item, event)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/fake-model", "/model_info"])
def test_information_fits_its_schema(client, path):
    api = describe_api()
    described = "/v1/models/{model_id}" if path.endswith("fake-model") else path
    schema = api["paths"][described]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(client.get(path).json(), {**schema, "components": api["components"]})


def test_errors_fit_their_schema(client):
    api = describe_api()
    schema = {"$ref": "#/components/schemas/ErrorBody", "components": api["components"]}
    for response in (client.get("/nothing"), client.post("/generate", json={}), client.get("/generate")):
        jsonschema.validate(response.json(), schema)


@pytest.mark.parametrize(
    ("body_type", "refused"),
    [
        (ChatBody, REFUSED_BY_CHAT),
        (CompletionBody, REFUSED_BY_COMPLETIONS),
        (GenerateBody, REFUSED_BY_GENERATE),
    ],
)
def test_no_field_is_accepted_and_refused_or_ignored_at_once(body_type, refused):
    accepted = set(body_type.__struct_fields__)
    assert accepted & set(refused) == set()
    assert accepted & set(IGNORED_FIELDS) == set()
    assert set(refused) & set(IGNORED_FIELDS) == set()


def test_page_names_every_route_and_needs_no_other_host(client):
    page = client.get("/docs").text
    assert all(f"<code>{route.path}</code>" in page for route in ROUTES)
    assert all(f"<code>{name}</code>" in page for name in (*IGNORED_FIELDS, *REFUSED_BY_CHAT))
    assert "<script" not in page
    assert re.findall(r"(?:src|href)=['\"](http[^'\"]*)", page) == []
