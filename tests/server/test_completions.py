"""/v1/completions: OpenAI's text_completion shape, defaults, and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import AddedToken

from jaxserve.server.settings import TextTools
from jaxserve.text.tokenizer import Tokenizer, byte_tokenizer
from tests.fakes import FakeEngine, make_text_tools, open_client
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
            "completion_tokens_details": None,
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
        ({"suffix": "x"}, "suffix", "its vocabulary has no fill-in-the-middle tokens"),
        ({"token_ids": [1]}, "token_ids", "the prompt may be a list of ids"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens must be at most max_tokens (16), got 20."),
        ({"stop_regex": "["}, "stop_regex", "not a valid regular expression"),
        ({"return_meta_info": True, "stream": True}, "return_meta_info", "set stream to false"),
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


def test_token_ids_come_beside_the_text_streamed_or_not():
    with open_client(FakeEngine(reply="né")) as client:
        body = {"prompt": "ab", "return_token_ids": True}
        choice = client.post(PATH, json=body).json()["choices"][0]
        events = read_events(client.post(PATH, json={**body, "stream": True}))
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [*"né".encode(), 256])
    chunks = [event["choices"][0] for event in events]
    assert [(chunk["text"], chunk["token_ids"]) for chunk in chunks] == [
        ("n", [110]),
        ("é", [0xC3, 0xA9]),
        ("", [256]),
    ]


def test_meta_info_and_cache_details_are_generates_own():
    with open_client(FakeEngine(reply="a")) as client:
        body = {
            "prompt": "xyz",
            "return_meta_info": True,
            "return_cached_tokens_details": True,
            "logprobs": 0,
        }
        reply = client.post(PATH, json=body).json()
        options = {"stream": True, "return_cached_tokens_details": True}
        events = read_events(client.post(PATH, json={"prompt": "xyz", **options}))
    meta = reply["choices"][0]["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": 256}
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[97, "a"], [256, "<|eos|>"]]
    assert reply["sglext"] == {"cached_tokens_details": {"device": 0, "host": 0}}
    assert events[-1]["choices"] == []
    assert events[-1]["sglext"] == {"cached_tokens_details": {"device": 2, "host": 0}}


@pytest.mark.parametrize(
    ("extra", "prompt_ids"),
    [({}, [257, 97]), ({"add_special_tokens": True}, [257, 97]), ({"add_special_tokens": False}, [97])],
)
def test_special_tokens_are_put_around_a_prompt_unless_told_otherwise(extra, prompt_ids):
    engine = FakeEngine()
    with open_client(engine, text=make_text_tools(adds_bos=True)) as client:
        client.post(PATH, json={"prompt": "a", **extra})
    assert engine.submitted[0].prompt_ids == prompt_ids


def test_names_that_xllms_clients_use():
    engine = FakeEngine(reply="a, b")
    with open_client(engine) as client:
        body = {"prompt": "x", "request_id": "mine", "priority": "high", "offline": True, "ttft_slo_ms": 5}
        reply = client.post(
            PATH, json={**body, "stop": [","], "include_stop_str_in_output": True, "best_of": 1}
        ).json()
    assert (reply["id"], reply["choices"][0]["text"]) == ("mine", "a,")
    assert (engine.submitted[0].rid, engine.submitted[0].priority) == ("mine", 1)


def make_code_tools() -> TextTools:
    """The fake's text tools, with fill-in-the-middle tokens 500, 501 and 502."""
    backend = byte_tokenizer(500)._backend
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = Tokenizer(backend, bos_id=257, eos_ids=[256])
    return replace(make_text_tools(), tokenizer=tokenizer)


def test_suffix_asks_for_the_middle():
    engine = FakeEngine(reply="mid")
    with open_client(engine, text=make_code_tools()) as client:
        body = {"prompt": ["a", "<|eos|>"], "suffix": "z", "max_tokens": 9, "stop_token_ids": [7]}
        reply = client.post(PATH, json=body).json()
        ids = client.post(PATH, json={"prompt": [1], "suffix": "z"})
        echo = client.post(PATH, json={"prompt": "a", "suffix": "z", "echo": True})
        plain = client.post(PATH, json={"prompt": "a", "suffix": ""})
    assert [choice["text"] for choice in reply["choices"]] == ["mid", "mid"]
    prompts = [item.prompt_ids for item in engine.submitted]
    assert prompts == [[500, 97, 501, 122, 502], [500, *b"<|eos|>", 501, 122, 502], [97]]
    assert set(engine.submitted[0].params.stop_ids) == {256, 7, 500, 501, 502}
    assert (ids.status_code, ids.json()["param"]) == (400, "suffix")
    assert (echo.status_code, echo.json()["param"]) == (400, "echo")
    assert plain.status_code == 200


@pytest.mark.parametrize("stop", [None, "", [], [""]])
def test_a_stop_that_says_nothing_stops_nothing(stop):
    with open_client(FakeEngine(reply="ab")) as client:
        reply = client.post(PATH, json={"prompt": "x", "stop": stop, "stop_regex": stop}).json()
    assert reply["choices"][0]["text"] == "ab"
