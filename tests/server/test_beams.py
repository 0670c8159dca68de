"""Beam search in the replies of the three routes: choices best first, their scores, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeEngine, open_client, score_by_id
from tests.server.events import read_events
from tests.server.scored import scores_asked

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
USER: Any = [{"role": "user", "content": "Hi"}]
ROUTES = {
    GENERATE: {"text": "Hi"},
    CHAT: {"messages": USER},
    COMPLETIONS: {"prompt": "Hi"},
}


def searching(**settings) -> FakeEngine:
    return FakeEngine(score=score_by_id, **settings)


def total_of(text: str) -> float:
    """The sum of a beam's logprobs, its closing token included, as the fake has them."""
    return sum(-((token_id - 65) % 512 + 1) / 1024 for token_id in [*text.encode(), EOS_ID])


def test_the_engine_is_asked_for_one_greedy_search_with_a_candidate_a_beam():
    engine = searching()
    with open_client(engine) as client:
        for path, body in ROUTES.items():
            assert client.post(path, json={**body, "beam_width": 3, "rid": "r"}).status_code == 200
        client.post(CHAT, json={"messages": USER, "beam_width": 2, "top_logprobs": 7, "logprobs": True})
        client.post(CHAT, json={"messages": USER, "beam_width": 3, "top_logprobs": 1, "logprobs": True})
    asked = [(item.params.beam_width, item.params.temperature) for item in engine.submitted]
    assert asked == [(3, 0.0), (3, 0.0), (3, 0.0), (2, 0.0), (3, 0.0)]
    assert [item.rid for item in engine.submitted][:3] == ["r"] * 3
    scores = [scores_asked(engine, order) for order in range(5)]
    assert [(item.num_top, item.of_output) for item in scores] == [(num, True) for num in (3, 3, 3, 7, 3)]
    assert scores[4].num_told == 1  # of the three that the search needs


def test_chat_has_a_choice_a_beam_best_first_and_counts_them_all():
    with open_client(searching()) as client:
        body = {"messages": USER, "beam_width": 2, "logprobs": True, "top_logprobs": 4, "temperature": 0}
        reply = client.post(CHAT, json=body).json()
    assert [(choice["index"], choice["message"]["content"]) for choice in reply["choices"]] == [
        (0, "Yes"),
        (1, "No"),
    ]
    for choice, text in zip(reply["choices"], ("Yes", "No"), strict=True):
        content = choice["logprobs"]["content"]
        assert [item["token"] for item in content] == [*text, "<|eos|>"]
        assert [len(item["top_logprobs"]) for item in content] == [4] * len(content)
        assert choice["cumulative_logprob"] == total_of(text)
        assert choice["cumulative_logprob"] == sum(item["logprob"] for item in content)
        assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", EOS_ID)
    assert reply["usage"]["completion_tokens"] == len("Yes") + len("No") + 2
    assert reply["usage"]["prompt_tokens"] == 52


@pytest.mark.parametrize(
    ("asked", "num_shown"),
    [
        ({}, 3),  # as many as beams, unless told
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 1}, 1),
        ({"top_logprobs": 5}, 5),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 5}, None),
    ],
)
def test_chat_shows_logprobs_unless_told_not_to(asked, num_shown):
    with open_client(searching()) as client:
        reply = client.post(CHAT, json={"messages": USER, "beam_width": 3, **asked}).json()
    for choice in reply["choices"]:
        shown = choice["logprobs"] and {len(item["top_logprobs"]) for item in choice["logprobs"]["content"]}
        assert shown == (None if num_shown is None else {num_shown})
        assert "cumulative_logprob" in choice


def test_completions_answer_each_prompt_with_all_its_beams():
    with open_client(searching()) as client:
        body = {"prompt": ["ab", "c"], "beam_width": 2, "max_tokens": 20, "logprobs": 4}
        reply = client.post(COMPLETIONS, json=body).json()
    choices = reply["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "Yes"),
        (1, "No"),
        (2, "Yes"),
        (3, "No"),
    ]
    assert choices[1]["logprobs"]["tokens"] == ["N", "o", "<|eos|>"]
    assert choices[1]["logprobs"]["text_offset"] == [0, 1, 2]
    assert choices[1]["cumulative_logprob"] == total_of("No")
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 17,
        "completion_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": None,
        "reasoning_tokens": 0,
    }


def test_beams_end_for_reasons_of_their_own():
    with open_client(searching(beam_replies=("Y", "Nope"))) as client:
        reply = client.post(COMPLETIONS, json={"prompt": "a", "beam_width": 2, "max_tokens": 3}).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [
        ("Y", "stop"),
        ("Nop", "length"),
    ]


def test_generate_gives_a_list_and_shows_logprobs_only_if_asked():
    params = {"beam_width": 2}
    with open_client(searching()) as client:
        plain = client.post(GENERATE, json={"text": "Hi", "sampling_params": params}).json()
        body = {"text": "Hi", "beam_width": 2, "return_logprob": True, "logprob_start_len": 0}
        scored = client.post(GENERATE, json={**body, "top_logprobs_num": 1}).json()
    assert [(reply["text"], reply["output_ids"][-1]) for reply in plain] == [("Yes", EOS_ID), ("No", EOS_ID)]
    assert [reply["meta_info"]["cumulative_logprob"] for reply in plain] == [total_of("Yes"), total_of("No")]
    assert [reply["meta_info"]["completion_tokens"] for reply in plain] == [4, 3]
    assert all("output_token_logprobs" not in reply["meta_info"] for reply in plain)
    for reply in scored:
        meta = reply["meta_info"]
        assert [item[1] for item in meta["output_token_logprobs"]] == reply["output_ids"]
        assert {len(tops) for tops in meta["output_top_logprobs"]} == {1}  # of the two that the search needs
        assert [item[1] for item in meta["input_token_logprobs"]] == [ord("H"), ord("i")]


def test_streamed_choices_come_once_they_are_final():
    body = {"beam_width": 2, "stream": True, "stream_options": {"include_usage": True}}
    with open_client(searching()) as client:
        chat = read_events(client.post(CHAT, json={"messages": USER, **body}))
        text = read_events(client.post(COMPLETIONS, json={"prompt": "a", **body}))
        native = read_events(client.post(GENERATE, json={"text": "a", "beam_width": 2, "stream": True}))
    for index, words in enumerate(("Yes", "No")):
        mine = [c for event in chat for c in event["choices"] if c["index"] == index]
        assert [choice["delta"].get("content") for choice in mine] == ["", words, None]
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]
        assert [item["token"] for item in mine[1]["logprobs"]["content"]] == list(words)
        assert [item["token"] for item in mine[2]["logprobs"]["content"]] == ["<|eos|>"]
        assert mine[2]["cumulative_logprob"] == total_of(words)
    assert chat[-1]["usage"]["completion_tokens"] == text[-1]["usage"]["completion_tokens"] == 7
    assert [c["text"] for event in text for c in event["choices"]] == ["Yes", "No"]
    assert [(event["index"], event["text"]) for event in native] == [(0, "Yes"), (1, "No")]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("width", [0, 1, None])
def test_narrow_beams_are_no_search(path, width):
    engine = FakeEngine(reply="ok")
    with open_client(engine) as client:
        reply = client.post(path, json={**ROUTES[path], "beam_width": width}).json()
    assert not isinstance(reply, list)
    assert engine.submitted[0].params.beam_width == 1
    assert engine.submitted[0].params.scores is None


def test_recommended_sampling_does_not_reach_a_search():
    engine = searching()
    preferred = {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "max_new_tokens": 5}
    with open_client(engine, preferred_sampling_params=preferred) as client:
        for path, body in ROUTES.items():
            assert client.post(path, json={**body, "beam_width": 2}).status_code == 200
    assert {(item.params.temperature, item.params.max_new_tokens) for item in engine.submitted} == {(0.0, 5)}


REFUSED_WITH_BEAMS = [
    ({"beam_width": -1}, "beam_width", "beam_width must be between 0 and 128"),
    ({"beam_width": 129}, "beam_width", "beam_width must be between 0 and 128"),
    ({"beam_width": 9}, "beam_width", "beam_width must be at most 8, the sequences that"),
    ({"n": 2}, "n", "n cannot be combined with beam_width above 1."),
    ({"temperature": 0.7}, "temperature", "temperature must be 0 with beam_width above 1, got 0.7."),
    ({"stop": "x"}, "stop", "stop cannot be combined with beam_width above 1."),
    ({"stop_regex": "x"}, "stop_regex", "stop_regex cannot be combined"),
    ({"frequency_penalty": 1}, "frequency_penalty", "cannot be combined"),
    ({"presence_penalty": 1}, "presence_penalty", "cannot be combined"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "cannot be combined"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "cannot be combined"),
    ({"top_k": 5}, "top_k", "cannot be combined"),
    ({"top_p": 0.5}, "top_p", "cannot be combined"),
    ({"min_tokens": 2}, "min_tokens", "cannot be combined"),
    ({"min_new_tokens": 2}, "min_new_tokens", "cannot be combined"),
    ({"best_of": 2}, "best_of", "best_of above n (1)"),
    ({"num_return_sequences": 3}, "num_return_sequences", "left out or equal beam_width (2), got 3"),
    ({"echo": True}, "echo", "echo cannot be combined with beam_width above 1."),
]
FOREIGN_FIELDS = {
    GENERATE: ("min_tokens", "best_of", "num_return_sequences", "echo"),
    CHAT: ("echo", "min_new_tokens"),
    COMPLETIONS: ("min_new_tokens",),
}


@pytest.mark.parametrize(
    ("path", "extra", "field", "sentence"),
    [(path, *case) for path in ROUTES for case in REFUSED_WITH_BEAMS if case[1] not in FOREIGN_FIELDS[path]],
)
def test_what_a_search_has_no_meaning_for_is_refused(client, path, extra, field, sentence):
    sampling = {"beam_width": 2, **extra}
    body = {**ROUTES[path], **({"sampling_params": sampling} if path == GENERATE else sampling)}
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["param"]) == (400, field)
    assert sentence in response.json()["message"]


def test_the_width_may_be_said_twice_but_not_differently(client):
    for width, status in ((2, 200), (3, 400)):
        body = {"text": "Hi", "beam_width": width, "sampling_params": {"beam_width": 2}}
        assert client.post(GENERATE, json=body).status_code == status
    nothing = {"text": "Hi", "beam_width": 2, "sampling_params": {"max_new_tokens": 0}}
    response = client.post(GENERATE, json=nothing)
    assert (response.status_code, response.json()["param"]) == (400, "max_new_tokens")


def test_what_xllm_names_the_number_of_beams_is_fine_where_it_agrees(client):
    body = {"messages": USER, "beam_width": 2, "num_return_sequences": 2}
    assert len(client.post(CHAT, json=body).json()["choices"]) == 2
    response = client.post(CHAT, json={"messages": USER, "num_return_sequences": 2})
    assert (response.status_code, response.json()["param"]) == (400, "num_return_sequences")
