"""One error body for every family of clients, whatever went wrong and wherever it was noticed."""

from __future__ import annotations

import logging
import socket

import pytest

from jaxserve.types import FinishReason
from tests.fakes import FakeEngine, open_client
from tests.server.events import read_events

ROUTES = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def check_body(body: dict, *, code: int, kind: str, status: str) -> None:
    assert list(body) == ["object", "message", "type", "param", "code", "status", "error"]
    assert (body["object"], body["type"], body["code"], body["status"]) == ("error", kind, code, status)
    assert body["error"] == {key: body[key] for key in ("message", "type", "param", "code")}
    assert body["message"].strip().endswith(".")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"rid": "\xff"}', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[1]", "The request body must be a JSON object, got a list."),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    ],
)
def test_malformed_bodies(client, path, content, sentence):
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    check_body(response.json(), code=400, kind="BadRequestError", status="INVALID_ARGUMENT")
    assert sentence in response.json()["message"]


@pytest.mark.parametrize(
    ("path", "extra", "field", "sentence"),
    [
        (
            "/v1/completions",
            {"max_tokens": "5"},
            "max_tokens",
            "max_tokens must be an integer or null, got a string.",
        ),
        ("/v1/completions", {"max_tokens": 1.5}, "max_tokens", "must be an integer or null, got a number"),
        ("/v1/completions", {"stream": 1}, "stream", "must be true or false or null, got an integer"),
        ("/v1/completions", {"prompt": 5}, "prompt", "must be a string or a list, got an integer"),
        ("/v1/completions", {"prompt": [{}]}, "prompt[0]", "got an object"),
        (
            "/v1/completions",
            {"logit_bias": {"x": 1}},
            "logit_bias",
            "The keys of logit_bias must be an integer",
        ),
        ("/v1/chat/completions", {"messages": None}, "messages", "must be a list, got null"),
        ("/v1/chat/completions", {"stop": [1]}, "stop[0]", "must be a string, got an integer"),
        ("/generate", {"sampling_params": 5}, "sampling_params", "must be an object, a list or null"),
        ("/generate", {"sampling_params": {"top_k": True}}, "sampling_params.top_k", "got true or false"),
        (
            "/generate",
            {"sampling_params": {"temprature": 0}},
            "sampling_params.temprature",
            "mean temperature?",
        ),
        (
            "/generate",
            {"sampling_params": {"max_tokens": 4}},
            "sampling_params.max_tokens",
            "mean max_new_tokens?",
        ),
        ("/generate", {"sampling_params": [{"zzz": 4}]}, "sampling_params[0].zzz", "is not a known field."),
        ("/generate", {"sampling_params": {"top_p": 1e999}}, None, ""),
    ],
)
def test_wrong_types_and_unknown_keys_are_named(client, path, extra, field, sentence):
    content = str({**ROUTES[path], **extra}).replace("'", '"').replace("None", "null").replace("True", "true")
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["message"]
    assert field is None or response.json()["param"] == field


def test_missing_field_is_named(client):
    body = client.post("/v1/chat/completions", json={"model": "m"}).json()
    assert (body["message"], body["param"]) == ("messages is required.", "messages")


def test_integers_may_be_written_as_floats():
    engine = FakeEngine()
    with open_client(engine) as client:
        body = {"prompt": [1.0, 2.0], "max_tokens": 3.0, "temperature": 0.5, "logit_bias": {"7": 1.5}}
        assert client.post("/v1/completions", json=body).status_code == 200
    params = engine.submitted[0].params
    assert (params.max_new_tokens, params.temperature, params.logit_bias) == (3, 0.5, ((7, 1.5),))


def test_no_such_route_and_wrong_method(client):
    missing, wrong = client.get("/v1/nothing"), client.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    check_body(missing.json(), code=404, kind="NotFoundError", status="UNKNOWN")
    check_body(wrong.json(), code=405, kind="MethodNotAllowedError", status="INVALID_ARGUMENT")
    assert wrong.headers["allow"] == "POST"


def test_content_type_of_openai_routes_is_400_not_415(client):
    body = b'{"prompt": "a", "text": "a"}'
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 400
    assert client.post("/generate", content=body, headers=headers).status_code == 200


def test_key_is_asked_for_everywhere_but_on_probes():
    with open_client(FakeEngine(), api_key="secret") as client:
        for path in ("/health", "/health_generate", "/ready", "/metrics"):
            assert client.get(path).status_code == 200, path
        assert client.options("/generate").status_code == 204
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = client.post("/generate", json={"text": "a"}, headers=headers)
            assert response.status_code == 401
            check_body(response.json(), code=401, kind="AuthenticationError", status="UNAUTHENTICATED")
        assert client.get("/v1/nothing").status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.post("/generate", json={"text": "a"}, headers=right).status_code == 200


def test_blanks_around_the_key_do_not_lock_everybody_out():
    with open_client(FakeEngine(), api_key="secret\r\n") as client:
        for key, want in (("secret", 200), ("", 401), ("secre", 401)):
            status = client.get("/v1/models", headers={"authorization": f"Bearer {key}".strip()}).status_code
            assert status == want, key


def test_bearer_none_is_fine_without_a_key(client):
    assert client.get("/v1/models", headers={"authorization": "Bearer None"}).status_code == 200


def test_large_body_is_413_and_the_client_gets_to_read_it():
    with open_client(FakeEngine(), max_body_bytes=100_000) as client:
        response = client.post("/generate", json={"text": "x" * 300_000})
        assert response.status_code == 413
        check_body(response.json(), code=413, kind="RequestTooLargeError", status="INVALID_ARGUMENT")
        assert client.post("/generate", json={"text": "x"}).status_code == 200


def test_malformed_http_gets_the_body_too(client):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(b"NONSENSE\r\n\r\n")
        answer = raw.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 400")
    assert '"status":"INVALID_ARGUMENT"' in answer


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("status", ["starting", "draining", "dead"])
def test_503_unless_ready(path, status):
    engine = FakeEngine(status=status, status_message="Loading weights, 40 %.", info=None)
    with open_client(engine) as client:
        for stream in (False, True):
            response = client.post(path, json={**ROUTES[path], "stream": stream})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            check_body(response.json(), code=503, kind="ServiceUnavailableError", status="UNAVAILABLE")
            assert response.json()["message"] == f"The engine is {status}. Loading weights, 40 %."


@pytest.mark.parametrize("stream", [False, True])
def test_429_from_the_engines_queue(stream):
    with open_client(FakeEngine(max_live=0)) as client:
        response = client.post("/generate", json={"text": "a", "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    check_body(response.json(), code=429, kind="RateLimitError", status="RESOURCE_EXHAUSTED")


def test_429_at_the_concurrency_limit_and_room_again_afterwards():
    engine = FakeEngine(hang_after=1)
    with open_client(engine, max_concurrent_requests=1) as client:
        with client.stream("POST", "/generate", json={"text": "a", "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            refused = client.post("/generate", json={"text": "a"})
        engine.hang_after = None
        while engine.live_rids():
            pass
        accepted = client.post("/generate", json={"text": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert accepted.status_code == 200


@pytest.mark.parametrize(("http_status", "kind"), [(400, "BadRequestError"), (500, "InternalServerError")])
@pytest.mark.parametrize("path", ROUTES)
def test_engine_failure_before_the_first_token_has_the_real_status(path, http_status, kind):
    failure = FinishReason(kind="abort", message="The logits were not finite.", http_status=http_status)
    with open_client(FakeEngine(fail_after=0, failure=failure)) as client:
        for extra in ({"stream": False}, {"stream": True}):
            response = client.post(path, json={**ROUTES[path], **extra})
            assert response.status_code == http_status
            assert response.json()["type"] == kind
            assert response.json()["message"] == "The logits were not finite."


@pytest.mark.parametrize("path", ROUTES)
def test_engine_failure_later_is_an_error_event_and_then_done(path):
    failure = FinishReason(kind="abort", message="The engine stopped.", http_status=503)
    with open_client(FakeEngine(fail_after=2, failure=failure)) as client:
        response = client.post(path, json={**ROUTES[path], "stream": True})
        whole = client.post(path, json=ROUTES[path])
    assert response.status_code == 200
    check_body(
        read_events(response)[-1]["error"], code=503, kind="ServiceUnavailableError", status="UNAVAILABLE"
    )
    assert whole.status_code == 503


def test_one_failing_sequence_of_a_batch_fails_the_request_and_ends_the_others():
    failure = FinishReason(kind="abort", message="Out of pages.", http_status=500)
    engine = FakeEngine(fail_after=2, failure=failure, delay_s=0.001)
    with open_client(engine) as client:
        response = client.post("/generate", json={"text": ["a", "b", "c"]})
    assert response.status_code == 500
    assert list(engine.live_rids()) == []


@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_bug_is_logged_with_its_request_id_and_told_without_details(fail_at, caplog):
    def reply(prompt_ids):
        return [*[97] * fail_at, "not a token id"]

    with open_client(FakeEngine(reply=reply)) as client, caplog.at_level(logging.ERROR):
        headers = {"x-request-id": "trace-1"}
        body = {"text": "private words", "stream": True}
        response = client.post("/generate", json=body, headers=headers)
    told = response.json() if fail_at == 0 else read_events(response)[-1]["error"]
    check_body(told, code=500, kind="InternalServerError", status="INTERNAL")
    assert told["message"] == "The server failed; its log names request trace-1."
    assert "trace-1" in caplog.text
    assert "private words" not in caplog.text
