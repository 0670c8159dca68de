"""/v1/chat/completions: the quickstart's shapes key for key, sampling defaults, messages and templates."""

from __future__ import annotations

import pytest

from jaxserve.server.settings import SamplingDefaults, read_sampling_defaults
from tests.fakes import EOS_ID, FakeEngine, make_text_tools, open_client
from tests.server.events import read_events

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.submitted[-1].prompt_ids).decode()


def test_reply_has_the_quickstarts_keys_in_their_order():
    with open_client(FakeEngine(reply="Paris.")) as client:
        reply = client.post(PATH, json={"model": "any/Name", "messages": USER, "rid": "my-id"}).json()
    created = reply.pop("created")
    assert isinstance(created, int)
    assert reply == {
        "id": "my-id",
        "object": "chat.completion",
        "model": "any/Name",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Paris.",
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": EOS_ID,
            }
        ],
        "usage": {
            "prompt_tokens": 52,
            "total_tokens": 59,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": None,
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }
    assert list(reply) == ["id", "object", "model", "choices", "usage", "metadata"]


def test_stream_is_a_role_chunk_then_text_then_one_finish_chunk():
    with open_client(FakeEngine(reply="Yes")) as client:
        events = read_events(client.post(PATH, json={"messages": USER, "stream": True, "rid": "s"}))
    assert {(event["id"], event["object"], event["model"]) for event in events} == {
        ("s", "chat.completion.chunk", "fake-model")
    }
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert all(
        list(choice) == ["index", "delta", "logprobs", "finish_reason", "matched_stop"] for choice in choices
    )
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "", "reasoning_content": None},
        {"content": "Y", "reasoning_content": None},
        {"content": "e", "reasoning_content": None},
        {"content": "s", "reasoning_content": None},
        {"reasoning_content": None},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]
    assert choices[-1]["matched_stop"] == EOS_ID


def test_usage_comes_last_and_only_when_asked_for():
    options = {"include_usage": True, "continuous_usage_stats": True}
    with open_client(FakeEngine(reply="ab")) as client:
        body = {"messages": USER, "stream": True, "stream_options": options, "max_tokens": 2}
        events = read_events(client.post(PATH, json=body))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 2
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 1, 2, 2]


def test_each_of_n_choices_has_its_role_and_finish_chunk():
    with open_client(FakeEngine(reply="ok", delay_s=0.001)) as client:
        body = {"messages": USER, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
        events = read_events(client.post(PATH, json=body))
        whole = client.post(PATH, json={"messages": USER, "n": 3}).json()
    for index in range(3):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "ok"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    # The prompt is counted once, the output of every choice.
    for usage in (events[-1]["usage"], whole["usage"]):
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (52, 9)


def test_stop_string_is_cut_off_and_reported():
    with open_client(FakeEngine(reply="one\n\ntwo")) as client:
        reply = client.post(PATH, json={"messages": USER, "stop": "\n\n"}).json()
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["matched_stop"]) == (
        "one",
        "stop",
        "\n\n",
    )


def test_what_a_request_leaves_null_comes_from_generation_config():
    engine = FakeEngine()
    config = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 5}
    with open_client(engine, sampling_defaults=read_sampling_defaults(config)) as client:
        client.post(PATH, json={"messages": USER, "temperature": None})
        client.post(PATH, json={"messages": USER, "temperature": 0, "top_k": -1})
        client.post("/v1/completions", json={"prompt": "a"})
        client.post("/generate", json={"text": "a"})
    seen = [
        (p.temperature, p.top_p, p.top_k, p.repetition_penalty) for p in (s.params for s in engine.submitted)
    ]
    assert seen == [(0.7, 0.8, 20, 1.1), (0, 0.8, 0, 1.1), (1.0, 1.0, 0, 1.0), (1.0, 1.0, 0, 1.0)]


def test_top_k_zero_in_generation_config_means_off():
    assert read_sampling_defaults({"top_k": 0}) == SamplingDefaults(top_k=-1)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [({}, 256 - 52), ({"max_tokens": 9}, 9), ({"max_tokens": 9, "max_completion_tokens": 4}, 4)],
)
def test_length_is_the_context_unless_told(lengths, expected):
    engine = FakeEngine()
    with open_client(engine) as client:
        assert client.post(PATH, json={"messages": USER, **lengths}).status_code == 200
    assert engine.submitted[0].params.max_new_tokens == expected


def test_messages_go_through_the_template_without_a_second_bos():
    engine = FakeEngine()
    messages = [
        {"role": "Developer", "content": "Be brief."},
        {"role": "USER", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    with open_client(engine) as client:
        client.post(PATH, json={"messages": messages})
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_final_message_can_be_continued():
    engine = FakeEngine()
    messages = [*USER, {"role": "assistant", "content": "The answer is"}]
    with open_client(engine) as client:
        client.post(PATH, json={"messages": messages, "continue_final_message": True})
        wrong = client.post(PATH, json={"messages": USER, "continue_final_message": True})
        reply = client.post(PATH, json={"messages": messages, "continue_final_message": True}).json()
    assert prompt_of(engine).endswith("<|im_start|>assistant\nThe answer is")
    assert reply["choices"][0]["message"]["content"] == "Hello there."  # what comes after it
    assert (wrong.status_code, wrong.json()["param"]) == (400, "continue_final_message")


def test_input_ids_take_the_place_of_the_template():
    engine = FakeEngine(reply="ok")
    body = {"messages": USER, "input_ids": [1, 2, 3], "return_prompt_token_ids": True}
    with open_client(engine, text=make_text_tools(None)) as client:
        reply = client.post(PATH, json=body).json()
    assert engine.submitted[0].prompt_ids == [1, 2, 3]
    assert reply["choices"][0]["prompt_token_ids"] == [1, 2, 3]
    assert "response_token_ids" not in reply["choices"][0]


def test_what_sglangs_clients_ask_to_be_added():
    wanted = ("return_token_ids", "return_meta_info", "return_cached_tokens_details")
    with open_client(FakeEngine(reply="ok")) as client:
        body = {"messages": USER, **dict.fromkeys(wanted, True), "n": 2}
        reply = client.post(PATH, json=body).json()
    for choice in reply["choices"]:
        assert len(choice["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
        assert choice["response_token_ids"] == [*b"ok", EOS_ID]
        assert choice["meta_info"]["completion_tokens"] == 3
    assert list(reply["sglext"]) == ["cached_tokens_details"]


def test_names_that_xllms_clients_use():
    engine = FakeEngine(reply="a, b")
    body = {"messages": USER, "request_id": "mine", "priority": "LOW", "stop": ","}
    with open_client(engine) as client:
        reply = client.post(PATH, json={**body, "include_stop_str_in_output": True}).json()
        client.post(PATH, json={"messages": USER, "rid": "ours", "request_id": "theirs"})
    assert (reply["id"], reply["choices"][0]["message"]["content"]) == ("mine", "a,")
    assert [(item.rid, item.priority) for item in engine.submitted] == [("mine", -1), ("ours", 0)]


def test_special_tokens_are_put_around_a_conversation_only_if_asked():
    engine = FakeEngine()
    with open_client(engine, text=make_text_tools(adds_bos=True)) as client:
        for asked in (None, False, True):
            client.post(PATH, json={"messages": USER, "add_special_tokens": asked})
    assert [item.prompt_ids[0] == 257 for item in engine.submitted] == [False, False, True]


def test_preferred_sampling_stands_between_the_request_and_the_model():
    engine = FakeEngine()
    preferred = {"temperature": 0.3, "top_k": 5, "max_new_tokens": 7, "stop": ["x"], "ignore_eos": True}
    recommended = SamplingDefaults(temperature=0.7, top_p=0.8)
    with open_client(engine, preferred_sampling_params=preferred, sampling_defaults=recommended) as client:
        client.post(PATH, json={"messages": USER})
        client.post(PATH, json={"messages": USER, "temperature": 0, "max_tokens": 3, "ignore_eos": False})
        client.post("/v1/completions", json={"prompt": "a"})
        client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": None}})
    seen = [(p.temperature, p.top_p, p.top_k, p.max_new_tokens) for p in (s.params for s in engine.submitted)]
    assert seen == [(0.3, 0.8, 5, 7), (0.0, 0.8, 5, 3), (0.3, 1.0, 5, 7), (0.3, 1.0, 5, 255)]
    assert [bool(item.params.stop_ids) for item in engine.submitted] == [False, True, False, False]


def test_tools_and_template_variables_reach_the_template():
    engine = FakeEngine()
    template = "{{ tools | tojson }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ messages[0].content }}"
    tool = {"type": "function", "function": {"name": "f"}}
    body = {
        "messages": USER,
        "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    }
    with open_client(engine, text=make_text_tools(template)) as client:
        client.post(PATH, json=body)
        shown = prompt_of(engine)
        client.post(PATH, json={**body, "tool_choice": "none"})
    assert shown == '[{"type": "function", "function": {"name": "f"}}]|False|low|Hi'
    assert prompt_of(engine).startswith("null|")


@pytest.mark.parametrize(
    ("extra", "field", "sentence"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "must be one of system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "does not accept images",
        ),
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"max_completion_tokens": 999}, "max_completion_tokens", "max_completion_tokens is too large"),
        ({"best_of": 2}, "best_of", "best_of above n (1)"),
        ({"input_ids": []}, "input_ids", "input_ids cannot be empty"),
        (
            {"min_tokens": 5, "max_tokens": 4},
            "min_tokens",
            "min_tokens must be at most max_tokens (4), got 5.",
        ),
        ({"return_token_ids": True, "stream": True}, "return_token_ids", "set stream to false"),
        ({"priority": "later"}, "priority", "one of HIGH, DEFAULT, NORMAL, LOW"),
        ({"response_format": {"type": "json_object"}}, "response_format", "except for the type text"),
        ({"guided_json": {"type": "object"}}, "guided_json", "not supported"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"tool_choice": "sometimes"}, "tool_choice", "must be"),
        ({"chat_template": "{{ x }}"}, "chat_template", "--chat-template"),
        ({"n": 0}, "n", "at least 1"),
        ({"temperature": -1}, "temperature", "temperature must be"),
    ],
)
def test_impossible_requests_get_a_sentence_about_the_field(client, extra, field, sentence):
    response = client.post(PATH, json={"messages": USER, **extra})
    assert response.status_code == 400
    assert sentence in response.json()["message"]
    assert response.json()["param"] == field


def test_harmless_openai_fields_pass():
    extra = {
        "user": "u1",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "beam_width": 1,
        "logprobs": False,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
    }
    with open_client(FakeEngine()) as client:
        assert client.post(PATH, json={"messages": USER, **extra}).status_code == 200


def test_a_model_without_a_template_says_so():
    with open_client(FakeEngine(), text=make_text_tools(None)) as client:
        response = client.post(PATH, json={"messages": USER})
    assert response.status_code == 400
    assert "no chat template" in response.json()["message"]


def test_model_name_is_checked_only_when_strict():
    with open_client(FakeEngine(), is_model_name_strict=True) as client:
        names = ("FAKE-model", "default", "other")
        statuses = [client.post(PATH, json={"messages": USER, "model": name}).status_code for name in names]
        body = client.post(PATH, json={"messages": USER, "model": "other"}).json()
    assert statuses == [200, 200, 404]
    assert body["error"]["code"] == "model_not_found"
    assert (body["code"], body["status"], body["param"]) == (404, "UNKNOWN", "model")
