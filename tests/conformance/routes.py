"""Every route that takes a body, with a right one: what the tests of wrong bodies start from.

Read from the same description that /openapi.json serves; a route without a body here fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxserve.server.openapi import describe_api

USER = [{"role": "user", "content": "Say hello."}]
GREEDY = {"temperature": 0, "max_new_tokens": 4}

# A right body by path.
RIGHT_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 4, "temperature": 0, "stop": ["x"], "seed": 1},
    "/v1/completions": {"prompt": "Say hello.", "max_tokens": 4, "temperature": 0, "stream": False, "n": 1},
    "/generate": {"text": "Say hello.", "sampling_params": GREEDY, "stream": False, "rid": "a"},
    "/v1/sample": {
        "model": "default",
        "prompt": "Hello <emb> there <emb>",
        "selector": {"type": "literal", "value": "<emb>"},
        "logprobs": 2,
        "request_id": "a",
    },
    "/tokenize": {"prompt": "Hello.", "add_special_tokens": True},
    "/v1/tokenize": {"messages": USER},
    "/detokenize": {"tokens": [72, 105], "skip_special_tokens": True},
    "/v1/detokenize": {"tokens": [[72, 105], [72]]},
    "/flush_cache": {},
    "/abort_request": {"rid": "no-such", "abort_all": False},
}
# Those that change what the engine does: afterwards it may be asleep or paused.
OPERATORS_BODIES: dict[str, dict[str, Any]] = {
    "/sleep": {"model_id": "fake-model", "master_status": 1, "mode": "wait", "timeout": 1},
    "/wakeup": {"model_id": "fake-model"},
    "/wake_up": {},
    "/release_memory_occupation": {"tags": ["kv_cache"], "mode": "wait", "timeout": 1},
    "/resume_memory_occupation": {"tags": ["kv_cache"]},
    "/pause_generation": {"mode": "in_place"},
    "/continue_generation": {},
    "/pause": {"mode": "keep"},
    "/resume": {},
    "/update_weights_from_disk": {"model_path": "no/such", "load_format": "auto", "weight_version": "2"},
    "/update_weight_version": {"new_version": "2", "abort_all_requests": False},
}


def paths_with_bodies() -> list[str]:
    return [path for path, methods in describe_api()["paths"].items() if "post" in methods]


def known_fields(path: str) -> dict[str, list[str]]:
    """Field names of the route's body and of the objects in it, each with its JSON types."""
    api = describe_api()
    body = api["paths"][path]["post"].get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    fields: dict[str, list[str]] = {}
    for name, described in _properties(schema, api["components"]["schemas"], set()):
        fields.setdefault(name, []).extend(_types(described))
    return {name: types or ["object"] for name, types in fields.items()} or {"timeout": ["number"]}


def _properties(
    schema: dict[str, Any], components: dict[str, Any], seen: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    reference = schema.get("$ref", "").rpartition("/")[2]
    if reference and reference not in seen:
        yield from _properties(components[reference], components, seen | {reference})
    for inner in schema.get("anyOf", ()):
        yield from _properties(inner, components, seen)
    if "items" in schema:
        yield from _properties(schema["items"], components, seen)
    for name, inner in schema.get("properties", {}).items():
        yield name, inner
        yield from _properties(inner, components, seen)


def _types(schema: dict[str, Any]) -> list[str]:
    if "anyOf" in schema:
        return [kind for inner in schema["anyOf"] for kind in _types(inner)]
    return [schema["type"]] if schema.get("type", "null") != "null" else []
