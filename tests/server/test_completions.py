"""/v1/completions: OpenAI's text_completion shape, defaults, and batches."""

from __future__ import annotations

import pytest

from tests.fakes import FakeEngine, open_client
from tests.server.events import read_events

PATH = "/v1/completions"


def test_reply_has_every_key():
    with open_client(FakeEngine(reply="Hello")) as client:
        reply = client.post(PATH, json={"model": "m", "prompt": "abc", "max_tokens": 4, "rid": "r1"}).json()
    assert isinstance(reply.pop("created"), int)
    assert reply == {
        "id": "r1",
        "object": "text_completion",
        "model": "m",
        "choices": [
            {"index": 0, "text": "Hell", "logprobs": None, "finish_reason": "length", "matched_stop": None}
        ],
        "usage": {
            "prompt_tokens": 3,
            "total_tokens": 7,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }


def test_finish_reason_rides_on_the_last_text_chunk():
    with open_client(FakeEngine(reply="abc")) as client:
        body = {"prompt": "x", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
        events = read_events(client.post(PATH, json=body))
    choices = [choice for event in events for choice in event["choices"]]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        ("a", None),
        ("b", None),
        ("c", "length"),
    ]
    assert all("metadata" not in event for event in events)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 4


def test_default_is_sixteen_tokens_at_temperature_one():
    engine = FakeEngine()
    with open_client(engine) as client:
        client.post(PATH, json={"prompt": "x"})
    params = engine.submitted[0].params
    assert (params.max_new_tokens, params.temperature, params.top_k) == (16, 1.0, 0)


@pytest.mark.parametrize(
    ("prompt", "prompt_ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompt_is_text_or_ids_one_or_many(prompt, prompt_ids):
    engine = FakeEngine()
    with open_client(engine) as client:
        reply = client.post(PATH, json={"prompt": prompt, "n": 2, "max_tokens": 1}).json()
    expected = [ids for ids in prompt_ids for _ in range(2)]
    assert [item.prompt_ids for item in engine.submitted] == expected
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(expected)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, prompt_ids))
    assert reply["usage"]["completion_tokens"] == len(expected)


@pytest.mark.parametrize(
    ("extra", "field", "sentence"),
    [
        ({"prompt": ""}, "prompt", "Prompt cannot be empty"),
        ({"prompt": []}, "prompt", "Prompt cannot be empty"),
        ({"prompt": ["a", ""]}, "prompt", "Prompt cannot be empty"),
        ({"prompt": ["a", 1]}, "prompt", "a mixture"),
        ({"prompt": [[]]}, "prompt", "prompt cannot be empty"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logprobs": 1}, "logprobs", "not supported"),
        ({"best_of": 3, "n": 2}, "best_of", "best_of above n (2)"),
    ],
)
def test_impossible_requests_get_a_sentence_about_the_field(client, extra, field, sentence):
    response = client.post(PATH, json={"prompt": "a", **extra})
    assert response.status_code == 400
    assert sentence in response.json()["message"]
    assert response.json()["param"] == field


def test_best_of_up_to_n_is_what_benchmark_clients_send():
    with open_client(FakeEngine()) as client:
        assert client.post(PATH, json={"prompt": "a", "best_of": 1, "ignore_eos": True}).status_code == 200
