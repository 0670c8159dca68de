"""Whatever is sent, the answer is a reply or a sentence: no 5xx, and the server goes on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.server.schemas import (
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
    REFUSED_BY_GENERATE,
    ChatBody,
    CompletionBody,
    GenerateBody,
    SamplingBody,
)

ROUTES: dict[str, tuple[dict[str, Any], type, dict[str, str]]] = {
    "/generate": ({"text": "a"}, GenerateBody, REFUSED_BY_GENERATE),
    "/v1/completions": ({"prompt": "a"}, CompletionBody, REFUSED_BY_COMPLETIONS),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "a"}]}, ChatBody, REFUSED_BY_CHAT),
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-3, max_value=300),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1e300, 0.5, -0.0, 1.0]),
    st.text(max_size=8),
    st.sampled_from(["", "auto", "required", "user", "text", "a", "\x00", "🙂", "<|im_end|>"]),
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "tool_calls", "function", "arguments", "name", "0", ""]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("path", ROUTES)
def test_mutated_bodies_never_give_5xx(client, path):
    valid, body_type, refused = ROUTES[path]
    names = [*body_type.__struct_fields__, *refused, "unknown"]

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    def send(changes):
        response = client.post(path, json={**valid, **changes})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert response.json()["message"]

    send()
    assert client.post(path, json=valid).status_code == 200


def test_mutated_sampling_params_never_give_5xx(client):
    @settings(max_examples=150)
    @given(st.dictionaries(st.sampled_from([*SamplingBody.__struct_fields__, "unknown"]), VALUES, max_size=3))
    def send(params):
        response = client.post("/generate", json={"text": "a", "sampling_params": params})
        assert response.status_code in (200, 400), response.text

    send()


@given(st.binary(max_size=60))
def test_random_bytes_never_give_5xx(client, content):
    for path in ROUTES:
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400


def test_neighbours_are_not_disturbed_by_bad_requests(client):
    for _ in range(5):
        assert client.post("/generate", content=b"\xff" * 100).status_code == 400
        assert client.post("/generate", json={"text": "a"}).json()["text"] == "Hello there."
