"""POST /v1/sample against a scripted engine, which expects behind each position the token that is there.

One token a byte, so that the token at a position is the byte of the prompt.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import jsonschema
import pytest

from jaxserve.server.openapi import describe_api
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.types import FinishReason, ScoreParams, TokenScores
from tests.fakes import EOS_ID, FAKE_INFO, FakeEngine, make_text_tools, open_client
from tests.server.test_disconnect import send, wait_until
from tests.server.test_errors import check_body

SELECTOR = {"type": "literal", "value": "<e>"}
BODY = {"model": "fake-model", "prompt": "a<e>bc<e>", "selector": SELECTOR}


def test_a_choice_for_each_match_in_order_with_the_row_before_it():
    engine = FakeEngine()
    with open_client(engine) as client:
        response = client.post("/v1/sample", json={**BODY, "logprobs": 2, "request_id": "sample-demo-001"})
    assert response.status_code == 200
    reply = response.json()
    created = reply.pop("created")
    assert isinstance(created, int)
    assert reply == {
        "id": "sample-demo-001",
        "object": "sample_completion",
        "model": "fake-model",
        "choices": [
            {
                "index": 0,
                "text": "a",
                "logprobs": {"tokens": ["a", "b"], "token_ids": [97, 98], "token_logprobs": [-0.5, -1.5]},
                "finish_reason": "selector_match",
            },
            {
                "index": 1,
                "text": "c",
                "logprobs": {
                    "tokens": ["c", "d"],
                    "token_ids": [99, 100],
                    "token_logprobs": [-0.505, -1.505],
                },
                "finish_reason": "selector_match",
            },
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
    (asked,) = engine.submitted
    assert asked.prompt_ids == list(b"a<e>bc<e>")
    assert asked.params.max_new_tokens == 0
    assert asked.params.scores == ScoreParams(prompt_rows=(0, 5), num_top=2)


def test_defaults_are_five_tokens_and_an_id_of_the_servers(client):
    api = describe_api()
    schema = api["paths"]["/v1/sample"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    reply = client.post("/v1/sample", json=BODY).json()
    jsonschema.validate(reply, {**schema, "components": api["components"]})
    assert reply["id"].startswith("sample-")
    assert [len(choice["logprobs"]["tokens"]) for choice in reply["choices"]] == [5, 5]


def test_matches_of_one_row_are_asked_for_once():
    engine = FakeEngine()
    tools = make_text_tools()
    with open_client(engine, text=replace(tools, chat_template=ChatTemplate(None, "", ""))) as client:
        body = {**BODY, "prompt": "a<|eos|>b", "selector": {"type": "literal", "value": "|"}}
        reply = client.post("/v1/sample", json=body).json()
    assert engine.submitted[0].params.scores == ScoreParams(prompt_rows=(0,), num_top=5)
    assert [choice["text"] for choice in reply["choices"]] == ["a", "a"]
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_match_with_nothing_before_it_is_empty_but_counted(client):
    body = {**BODY, "prompt": "<e>x<e>"}
    reply = client.post("/v1/sample", json=body).json()
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["empty_logprobs", "selector_match"]
    assert reply["choices"][0]["text"] == ""
    assert reply["choices"][0]["logprobs"] == {"tokens": [], "token_ids": [], "token_logprobs": []}
    assert reply["usage"]["completion_tokens"] == 2
    alone = client.post("/v1/sample", json={**BODY, "prompt": "<e>"}).json()
    assert [choice["finish_reason"] for choice in alone["choices"]] == ["empty_logprobs"]


def test_a_special_token_is_spelled_and_half_a_character_shown_as_bytes():
    def score(prompt_ids, row, params):
        return TokenScores(-7.0, [EOS_ID, 0xE6, 65], [-0.1, -2.0, -3.0], [])

    with open_client(FakeEngine(score=score)) as client:
        choice = client.post("/v1/sample", json=BODY).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<|eos|>", "selector_match")
    assert choice["logprobs"]["tokens"] == ["<|eos|>", r"bytes:\xe6", "A"]


def test_what_is_not_a_number_is_left_out():
    def score(prompt_ids, row, params):
        logprobs = [math.nan] * 3 if row == 0 else [-0.5, -math.inf, -math.inf]
        return TokenScores(math.nan, [65, 66, 67], logprobs, [])

    with open_client(FakeEngine(score=score)) as client:
        first, second = client.post("/v1/sample", json=BODY).json()["choices"]
    assert (first["text"], first["logprobs"]["tokens"], first["finish_reason"]) == ("", [], "empty_logprobs")
    assert (second["text"], second["logprobs"]["tokens"], second["finish_reason"]) == (
        *("A", ["A"], "selector_match"),
    )


def body_with(**fields: object) -> dict:
    return {"model": "other", "prompt": "<e>", **fields}


# Bodies with several mistakes, and the one that is told. "other" is a mistake too, the last to be noticed.
CHECKS = [
    ({}, "model is required."),
    (body_with(model="", logprobs=9), "model is required."),
    (body_with(prompt=None), "prompt is required."),
    (body_with(prompt="", selector={}), "prompt is required."),
    (body_with(logprobs=0), "selector is required."),
    (body_with(selector=None), "selector is required."),
    (body_with(selector={}, logprobs=0), "selector.type must be literal."),
    (body_with(selector={"value": "<e>"}), "selector.type must be literal."),
    (body_with(selector={"type": "regex", "value": "<e>"}), "selector.type must be literal."),
    (body_with(selector={"type": "literal"}, logprobs=0), "selector.value is required."),
    (body_with(selector={"type": "literal", "value": ""}), "selector.value is required."),
    (body_with(selector=SELECTOR, logprobs=0), "logprobs must be between 1 and 5, got 0."),
    (body_with(selector=SELECTOR, logprobs=6), "logprobs must be between 1 and 5, got 6."),
    (body_with(selector=SELECTOR, logprobs=-1), "logprobs must be between 1 and 5, got -1."),
]


@pytest.fixture(scope="module", params=["ready", "starting"])
def any_client(request):
    """Mistakes are told also while no request could be served."""
    with open_client(FakeEngine(status=request.param)) as client:
        yield client


@pytest.mark.parametrize(("body", "message"), CHECKS)
def test_the_first_mistake_in_xllms_order_is_told(any_client, body, message):
    response = any_client.post("/v1/sample", json=body)
    assert (response.status_code, response.json()["message"]) == (400, message)
    check_body(response.json(), code=400, kind="BadRequestError", status="INVALID_ARGUMENT")


def test_a_model_that_is_not_served_is_unknown(any_client):
    response = any_client.post("/v1/sample", json=body_with(selector=SELECTOR))
    assert (response.status_code, response.json()["status"]) == (404, "UNKNOWN")
    assert response.json()["message"] == "The model 'other' does not exist; this server serves 'fake-model'."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": "5"}, "logprobs must be an integer or null, got a string."),
        ({"prompt": ["a"]}, "prompt must be a string or null, got a list."),
        ({"selector": "<e>"}, "selector must be an object or null, got a string."),
        (
            {"selector": {"type": "literal", "value": 5}},
            "selector.value must be a string or null, got an integer.",
        ),
        ({"request_id": "x" * 257}, "request_id must have at most 256 characters, got 257."),
    ],
)
def test_wrong_types_are_named(client, fields, message):
    response = client.post("/v1/sample", json={**BODY, **fields})
    assert (response.status_code, response.json()["message"]) == (400, message)


def test_unknown_fields_the_default_model_and_any_content_type_pass(client):
    body = {**BODY, "model": "DEFAULT", "stream": True, "temperature": 2, "logprobs": None, "n": 0}
    assert client.post("/v1/sample", json=body).json()["model"] == "DEFAULT"
    headers = {"content-type": "application/x-www-form-urlencoded"}
    content = client.build_request("POST", "/v1/sample", json=BODY).content
    assert client.post("/v1/sample", content=content, headers=headers).status_code == 200


@pytest.mark.parametrize("status", ["starting", "draining", "dead"])
def test_no_match_is_answered_whatever_state_the_engine_is_in(status):
    with open_client(FakeEngine(status=status, info=None)) as client:
        none = client.post("/v1/sample", json={**BODY, "prompt": "no such thing"})
        some = client.post("/v1/sample", json=BODY)
    assert none.status_code == 200
    assert none.json()["choices"] == []
    assert none.json()["usage"] == {"prompt_tokens": 13, "completion_tokens": 0, "total_tokens": 13}
    assert some.status_code == 503
    check_body(some.json(), code=503, kind="ServiceUnavailableError", status="UNAVAILABLE")


def test_no_match_is_answered_at_the_concurrency_limit_and_a_match_is_429():
    engine = FakeEngine(hang_after=0)
    with open_client(engine, max_concurrent_requests=1) as client:
        raw = send(client, "/v1/sample", BODY)
        wait_until(lambda: engine.submitted)
        full = client.post("/v1/sample", json=BODY)
        none = client.post("/v1/sample", json={**BODY, "prompt": "none"})
        raw.close()
        wait_until(lambda: engine.left)
        engine.hang_after = None
        assert client.post("/v1/sample", json=BODY).status_code == 200
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    check_body(full.json(), code=429, kind="RateLimitError", status="RESOURCE_EXHAUSTED")
    assert (none.status_code, none.json()["choices"]) == (200, [])


def test_a_prompt_longer_than_the_context_is_refused_if_something_matches(client):
    context = FAKE_INFO.context_length
    response = client.post("/v1/sample", json={**BODY, "prompt": "<e>" + "x" * context})
    assert response.status_code == 400
    assert f"({context + 3} tokens) is longer than the model's context length" in response.json()["message"]
    assert client.post("/v1/sample", json={**BODY, "prompt": "x" * context}).json()["choices"] == []


def test_one_request_id_may_be_open_twice_and_ends_by_abort_request():
    engine = FakeEngine(hang_after=0)
    with open_client(engine) as client:
        sockets = [send(client, "/v1/sample", {**BODY, "request_id": "mine"}) for _ in range(2)]
        wait_until(lambda: len(engine.submitted) == 2)
        assert client.post("/abort_request", json={"rid": "mine"}).status_code == 200
        replies = [raw.recv(65536).decode() for raw in sockets]
        wait_until(lambda: not list(engine.live_rids()))
    assert all('"id":"mine"' in reply and '"empty_logprobs"' in reply for reply in replies)
    for raw in sockets:
        raw.close()


def test_a_failure_of_the_engine_is_told_with_its_status():
    failure = FinishReason(kind="abort", message="The logits were not finite.", http_status=500)
    with open_client(FakeEngine(fail_after=0, failure=failure)) as client:
        response = client.post("/v1/sample", json=BODY)
    assert (response.status_code, response.json()["message"]) == (500, "The logits were not finite.")


def test_the_log_holds_ids_and_counts_and_nothing_of_the_prompt(caplog):
    secret = {"type": "literal", "value": "sesame"}
    with open_client(FakeEngine()) as client, caplog.at_level(logging.DEBUG):
        body = {**BODY, "prompt": "open sesame, sesame", "selector": secret, "request_id": "r 1\n"}
        client.post("/v1/sample", json=body)
        client.post("/v1/sample", json={**body, "prompt": "private", "request_id": "r2"})
        client.post("/v1/sample", json={**body, "prompt": "sesame" * 99, "request_id": "r3"})
    lines = [record.getMessage() for record in caplog.records if record.name == "jaxserve.access"]
    assert len(lines) == 3
    assert "200 request_id=r 1\\n sample_id=0..1 match_count=2 model=fake-model prompt_tokens=19" in lines[0]
    assert "200 request_id=r2 sample_id=none match_count=0 model=fake-model" in lines[1]
    assert "400 request_id=r3 sample_id=0..98 match_count=99 model=fake-model" in lines[2]
    assert not any(word in caplog.text for word in ("sesame", "private"))


def test_a_text_that_cannot_fit_is_refused_by_its_length_but_not_where_nothing_matches(client):
    """The longest token of the fake tokenizer has 7 bytes and its context 256 tokens."""
    sentence = "The input (at least 286 tokens) is longer than the model's context length (256 tokens)."
    for path, body in (
        ("/v1/sample", {**BODY, "prompt": "<e>" + "a" * 1997}),
        ("/generate", {"text": "a" * 2000}),
        ("/v1/completions", {"prompt": ["a", "a" * 2000]}),
    ):
        response = client.post(path, json=body)
        assert (response.status_code, response.json()["message"]) == (400, sentence)
    unmatched = client.post("/v1/sample", json={**BODY, "prompt": "a" * 2000}).json()
    assert unmatched["choices"] == []
    assert unmatched["usage"]["prompt_tokens"] == 2000
