"""/generate, as SGLang's quickstart and benchmark clients use it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fakes import EOS_ID, FakeEngine, open_client
from tests.server.events import read_events

META_TYPES = {
    "id": str,
    "finish_reason": dict,
    "prompt_tokens": int,
    "weight_version": str,
    "total_retractions": int,
    "num_retractions": int,
    "reasoning_tokens": int,
    "completion_tokens": int,
    "cached_tokens": int,
    "cached_tokens_details": dict,
    "dp_rank": type(None),
    "e2e_latency": float,
    "response_sent_to_client_ts": float,
}


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_one_text_gives_one_object_with_every_key(method):
    with open_client(FakeEngine(reply="Hello"), weight_version="v7") as client:
        body = {"text": "The capital", "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
        reply = client.request(method, "/generate", json=body).json()
    assert list(reply) == ["text", "output_ids", "meta_info"]
    assert (reply["text"], reply["output_ids"]) == ("Hel", [72, 101, 108])
    meta = reply["meta_info"]
    assert {name: type(value) for name, value in meta.items()} == META_TYPES
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (11, 3, 0)
    assert meta["weight_version"] == "v7"


def test_stop_token_is_in_the_ids_but_not_in_the_text():
    with open_client(FakeEngine(reply="Hi")) as client:
        reply = client.post("/generate", json={"text": "a"}).json()
    assert (reply["text"], reply["output_ids"]) == ("Hi", [72, 105, EOS_ID])
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS_ID}


def test_ignore_eos_switches_off_every_stop_by_token():
    engine = FakeEngine(reply="Hi")
    with open_client(engine) as client:
        params = {"ignore_eos": True, "stop_token_ids": [105], "max_new_tokens": 5}
        reply = client.post("/generate", json={"text": "a", "sampling_params": params}).json()
    assert reply["text"] == "HiHiH"
    assert engine.submitted[0].params.stop_ids == ()


def test_stop_string_ends_the_engine_request():
    engine = FakeEngine(reply="one, two, three")
    with open_client(engine) as client:
        body = {"text": "a", "sampling_params": {"stop": [", t"], "ignore_eos": True}}
        reply = client.post("/generate", json=body).json()
    assert reply["text"] == "one"
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": ", t"}
    assert reply["meta_info"]["completion_tokens"] == len("one, t")
    assert engine.left == [reply["meta_info"]["id"]]


def test_stop_regex_ends_the_engine_request_and_names_the_pattern():
    engine = FakeEngine(reply="call 555-1234 now")
    with open_client(engine) as client:
        body = {"text": "a", "sampling_params": {"stop_regex": r"\d{3}-\d{4}", "ignore_eos": True}}
        reply = client.post("/generate", json=body).json()
    assert reply["text"] == "call "
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": r"\d{3}-\d{4}"}
    assert engine.left == [reply["meta_info"]["id"]]


def test_input_ids_are_used_as_they_are_and_win_over_text():
    engine = FakeEngine()
    with open_client(engine) as client:
        body = {"text": "ignored", "input_ids": [5, 6, 7], "return_prompt_token_ids": True}
        reply = client.post("/generate", json=body).json()
    assert engine.submitted[0].prompt_ids == [5, 6, 7]
    assert reply["prompt_token_ids"] == [5, 6, 7]


def test_cached_tokens_are_reported_on_the_second_call():
    with open_client(FakeEngine()) as client:
        replies = [client.post("/generate", json={"input_ids": list(range(20))}).json() for _ in range(2)]
    assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [0, 19]
    assert replies[1]["meta_info"]["cached_tokens_details"] == {"device": 19, "host": 0}


def test_batch_keeps_order_and_spreads_parameters_ids_and_salts():
    engine = FakeEngine(reply=lambda prompt_ids: prompt_ids)
    with open_client(engine) as client:
        body = {
            "text": ["abc", "xyz"],
            "sampling_params": [{"max_new_tokens": 2, "ignore_eos": True}, {"max_new_tokens": 3}],
            "rid": "batch",
            "cache_salt": ["s0", "s1"],
            "priority": 4,
        }
        replies = client.post("/generate", json=body).json()
    assert [reply["text"] for reply in replies] == ["ab", "xyz"]
    assert [reply["meta_info"]["id"] for reply in replies] == ["batch_0", "batch_1"]
    assert "index" not in replies[0]
    assert sorted((item.rid, item.cache_salt, item.priority) for item in engine.submitted) == [
        ("batch_0", "s0", 4),
        ("batch_1", "s1", 4),
    ]


def test_n_is_prompt_major_with_numbered_ids_and_moving_seeds():
    engine = FakeEngine(reply=lambda prompt_ids: prompt_ids)
    with open_client(engine) as client:
        params = {"n": 2, "max_new_tokens": 1, "sampling_seed": 40}
        replies = client.post(
            "/generate", json={"text": ["a", "b"], "sampling_params": params, "rid": ["p", "q"]}
        ).json()
    assert [(reply["text"], reply["meta_info"]["id"]) for reply in replies] == [
        ("a", "p_0"),
        ("a", "p_1"),
        ("b", "q_0"),
        ("b", "q_1"),
    ]
    assert {item.rid: item.params.seed for item in engine.submitted} == {
        "p_0": 40,
        "p_1": 41,
        "q_0": 40,
        "q_1": 41,
    }


def test_stream_is_cumulative_and_read_by_the_quickstart_loop():
    with open_client(FakeEngine(reply="Paris is big")) as client:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 5}, "stream": True}
        events = read_events(client.post("/generate", json=body))
    printed, previous = "", 0
    for event in events:
        printed += event["text"][previous:]
        previous = len(event["text"])
    assert printed == "Paris"
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5]
    assert [event["output_ids"] for event in events][:2] == [[80], [80, 97]]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 4
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    assert all("index" not in event for event in events)


def test_incremental_stream_holds_only_what_is_new():
    with open_client(FakeEngine(reply="abc"), is_streaming_incremental=True) as client:
        events = read_events(client.post("/generate", json={"text": "a", "stream": True}))
    assert [event["text"] for event in events] == ["a", "b", "c", ""]
    assert [event["output_ids"] for event in events] == [[97], [98], [99], [EOS_ID]]
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3, 4]


def test_batch_stream_carries_the_index_of_each_sequence():
    engine = FakeEngine(reply=lambda prompt_ids: prompt_ids, delay_s=0.002)
    with open_client(engine) as client:
        body = {"text": ["abcd", "wxyz"], "sampling_params": {"max_new_tokens": 4}, "stream": True}
        events = read_events(client.post("/generate", json=body))
    last = {event["index"]: event for event in events}
    assert {index: event["text"] for index, event in last.items()} == {0: "abcd", 1: "wxyz"}
    assert all(event["meta_info"]["finish_reason"] for event in last.values())
    assert len(events) > 2


def test_half_a_character_is_held_back_and_the_frame_stays_one_line():
    with open_client(FakeEngine(reply="né\n好")) as client:
        events = read_events(client.post("/generate", json={"text": "a", "stream": True}))
    assert [event["text"] for event in events][:3] == ["n", "n", "né"]
    assert events[-1]["text"] == "né\n好"


def test_stream_interval_groups_tokens_but_never_delays_the_first_or_the_last():
    params = {"max_new_tokens": 8, "stream_interval": 3}
    with open_client(FakeEngine(reply="abcdefghij")) as client:
        body = {"text": "a", "sampling_params": params, "stream": True}
        events = read_events(client.post("/generate", json=body))
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 4, 7, 8]


def test_abort_by_prefix_answers_200_with_the_partial_text():
    engine = FakeEngine(reply="abcdef", hang_after=3)
    with (
        open_client(engine) as client,
        client.stream("POST", "/generate", json={"text": "a", "rid": "job-7", "stream": True}) as response,
    ):
        lines = response.iter_lines()
        while '"abc"' not in next(lines):
            pass
        assert client.post("/abort_request", json={"rid": "job"}).status_code == 200
        rest = [line for line in lines if line]
    assert '"finish_reason":{"type":"abort","message":"Aborted"' in rest[-2]
    assert '"text":"abc"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("path", "body", "read_text"),
    [
        ("/generate", {"text": "a"}, lambda reply: reply["text"]),
        ("/v1/completions", {"prompt": "a"}, lambda reply: reply["choices"][0]["text"]),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}]},
            lambda reply: reply["choices"][0]["message"]["content"],
        ),
    ],
)
def test_abort_of_a_whole_reply_answers_200_with_the_partial_text(path, body, read_text):
    engine = FakeEngine(reply="abcdef", hang_after=3)
    with open_client(engine) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.post, path, json={**body, "rid": "job-8"})
        while "job-8" not in engine.live_rids():
            pass
        client.post("/abort_request", json={"rid": "job-8"})
        response = waiting.result()
    assert (response.status_code, read_text(response.json())) == (200, "abc")
    assert '"finish_reason":{"type":"abort"' in response.text or '"finish_reason":"abort"' in response.text


@pytest.mark.parametrize(
    ("body", "field", "sentence"),
    [
        ({}, "text", "Either text or input_ids must be given."),
        ({"input_ids": []}, "input_ids", "input_ids cannot be empty."),
        ({"text": ""}, "text", "text cannot be empty."),
        ({"text": []}, "text", "text cannot be empty."),
        ({"input_ids": [1, [2]]}, "input_ids", "got a mixture"),
        ({"input_ids": [1, 512]}, "input_ids", "holds 512, which is not a token id in [0, 512)"),
        ({"input_ids": [-1]}, "input_ids", "holds -1"),
        ({"text": "a", "rid": ["x"]}, "rid", "may only be a list when there is a list of prompts"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid", "one entry for each of the 2 prompts, got 1"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid", "Duplicate request ID"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "one entry for each"),
        ({"text": "a", "rid": "r" * 300}, "rid", "at most 256 characters, got 300"),
        ({"text": "a", "priority": 2**40}, "priority", "priority must be between"),
        ({"text": "a", "sampling_params": {"n": 10**9}}, "n", "at most 4096 sequences"),
        ({"text": "a", "sampling_params": {"stream_interval": 0}}, "stream_interval", "at least 1"),
        ({"text": "a", "sampling_params": {"top_p": 1.5}}, "top_p", "top_p must be in (0, 1], got 1.5."),
        ({"text": "a", "sampling_params": {"top_k": 0}}, "top_k", "-1 (all) or at least 1"),
        ({"text": "a", "sampling_params": {"logit_bias": {"600": 1}}}, "logit_bias", "in [0, 512)"),
        ({"text": "a", "sampling_params": {"regex": "a*"}}, "regex", "regex is not supported"),
        (
            {"text": "a", "sampling_params": {"stop_regex": "("}},
            "stop_regex",
            "not a valid regular expression",
        ),
        ({"text": "a", "sampling_params": {"stop_regex": ["a"] * 33}}, "stop_regex", "at most 32 patterns"),
        (
            {"text": "a", "sampling_params": {"stop_regex": "é" * 129}},
            "stop_regex",
            "at most 256 bytes",
        ),
        ({"text": "a", "sampling_params": {"stop": ["x"] * 33}}, "stop", "at most 32 strings"),
        ({"text": "a", "priority": "URGENT"}, "priority", "an integer or one of HIGH, DEFAULT, NORMAL, LOW"),
        (
            {"text": "a", "return_sampling_mask": True},
            "return_sampling_mask",
            "not supported by this version",
        ),
        ({"text": "a", "image_data": "http://x/y.png"}, "image_data", "reads text only"),
    ],
)
def test_impossible_requests_get_a_sentence_about_the_field(client, body, field, sentence):
    response = client.post("/generate", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["message"]
    assert response.json()["param"] == field


def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored():
    body = {
        "text": "a",
        "sampling_params": {"regex": "", "json_schema": None, "stop": None, "stop_token_ids": None, "n": 1.0},
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": [0],
        "sampling_logprobs_mode": "selected",
        "session_id": "s",
        "lora_path": "",
        "image_data": [],
        "return_routed_experts": False,
        "no_such_field": 1,
    }
    with open_client(FakeEngine()) as client:
        assert client.post("/generate", json=body).status_code == 200


def test_a_live_id_cannot_be_used_twice():
    engine = FakeEngine(hang_after=1)
    body = {"text": "a", "rid": "mine", "stream": True}
    with open_client(engine) as client, client.stream("POST", "/generate", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        second = client.post("/generate", json={"text": "b", "rid": "mine"})
    assert second.status_code == 400
    assert "Duplicate request ID: mine" in second.json()["message"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 128),
        ({"max_new_tokens": None}, 256 - 5),
        ({"max_new_tokens": 0}, 0),
        ({"max_new_tokens": 251}, 251),
    ],
)
def test_how_many_tokens_may_come(params, expected):
    engine = FakeEngine()
    with open_client(engine) as client:
        reply = client.post("/generate", json={"text": "abcde", "sampling_params": params}).json()
    assert engine.submitted[0].params.max_new_tokens == expected
    assert reply["meta_info"]["completion_tokens"] <= expected


def test_a_default_length_is_cut_to_the_context_but_a_wish_is_not():
    engine = FakeEngine()
    with open_client(engine) as client:
        assert client.post("/generate", json={"text": "x" * 200}).status_code == 200
        wish = client.post("/generate", json={"text": "x" * 200, "sampling_params": {"max_new_tokens": 57}})
        too_long = client.post("/generate", json={"text": "x" * 256})
    assert engine.submitted[0].params.max_new_tokens == 56
    assert wish.status_code == too_long.status_code == 400
    assert "Requested token count exceeds the model's maximum context length" in wish.json()["message"]
    assert "is longer than the model's context length (256 tokens)." in too_long.json()["message"]
