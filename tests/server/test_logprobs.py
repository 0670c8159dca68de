"""Log-probabilities of /generate: SGLang's layout to the key, and every number at its token."""

from __future__ import annotations

import pytest

from tests.fakes import EOS_ID, FakeEngine, open_client
from tests.server.events import read_events
from tests.server.scored import logprob_of, score_as_impossible, scored, scores_asked

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"


def entry(token: str | int, text: str | None = None) -> list:
    return [logprob_of(token), token if isinstance(token, int) else ord(token), text]


def first_entry(token: str) -> list:
    return [None, ord(token), None]


def test_generate_has_triples_of_the_output_alone_by_default():
    engine = scored()
    with open_client(engine) as client:
        meta = client.post(GENERATE, json={"text": "xyz", "return_logprob": True}).json()["meta_info"]
    assert meta["output_token_logprobs"] == [entry(token) for token in ("C", "A", "B", EOS_ID)]
    assert (meta["output_token_logprobs_length"], meta["input_token_logprobs"]) == (4, [])
    assert not {key for key in meta if key.endswith(("top_logprobs", "ids_logprobs"))}
    assert scores_asked(engine).prompt_rows == ()


def test_generate_tells_of_the_prompt_from_where_it_is_asked():
    body = {
        "text": "wxyz",
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
        "token_ids_logprob": [70, 66],
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 2},
    }
    engine = scored()
    with open_client(engine) as client:
        meta = client.post(GENERATE, json=body).json()["meta_info"]
    tops, watched = [entry("A", "A"), entry("B", "B")], [entry("F", "F"), entry("B", "B")]
    assert meta["prompt_tokens"] - 1 == len(meta["input_token_logprobs"])
    assert meta["input_token_logprobs"] == [[None, ord("x"), "x"], entry("y", "y"), entry("z", "z")]
    assert meta["input_top_logprobs"] == [None, tops, tops]
    assert meta["input_token_ids_logprobs"] == [None, watched, watched]
    assert meta["output_token_logprobs"] == [entry("C", "C"), entry("A", "A")]
    assert meta["output_top_logprobs"] == [tops] * 2
    assert meta["output_token_ids_logprobs"] == [watched] * 2
    scores = scores_asked(engine)
    assert (scores.prompt_rows, scores.num_top, scores.watched_ids) == ((1, 2), 2, (70, 66))


@pytest.mark.parametrize(("start", "expected"), [(2, [first_entry("z")]), (3, [])])
def test_generate_from_the_end_of_the_prompt_computes_no_rows(start, expected):
    engine = scored()
    with open_client(engine) as client:
        body = {"text": "xyz", "return_logprob": True, "logprob_start_len": start}
        meta = client.post(GENERATE, json=body).json()["meta_info"]
    assert meta["input_token_logprobs"] == expected
    assert scores_asked(engine).prompt_rows == ()


def test_generate_without_new_tokens_is_pure_scoring():
    body = {
        "input_ids": [65, 66, 67],
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 0},
    }
    with open_client(scored()) as client:
        reply = client.post(GENERATE, json=body).json()
    assert (reply["text"], reply["output_ids"]) == ("", [])
    assert reply["meta_info"]["input_token_logprobs"] == [first_entry("A"), entry("B"), entry("C")]
    assert reply["meta_info"]["output_token_logprobs"] == []
    assert reply["meta_info"]["output_token_logprobs_length"] == 0


def test_generate_spreads_lists_over_a_batch_and_n():
    body = {
        "text": ["abc", "de"],
        "return_logprob": [True, False],
        "logprob_start_len": [0, 5],
        "top_logprobs_num": [1, 0],
        "token_ids_logprob": [[70], None],
        "sampling_params": {"max_new_tokens": 1, "n": 2},
    }
    with open_client(scored()) as client:
        metas = [reply["meta_info"] for reply in client.post(GENERATE, json=body).json()]
    for meta in metas[:2]:
        assert meta["input_token_logprobs"] == [first_entry("a"), entry("b"), entry("c")]
        assert meta["output_token_ids_logprobs"] == [[entry("F")]]
    assert all("output_token_logprobs" not in meta for meta in metas[2:])


@pytest.mark.parametrize("prompt_scores_per_delta", [None, 1])
def test_generate_streams_cumulative_logprobs_and_no_frame_for_the_prompt_alone(prompt_scores_per_delta):
    engine = scored(prompt_scores_per_delta=prompt_scores_per_delta)
    body = {"text": "xyz", "return_logprob": True, "logprob_start_len": 0, "stream": True}
    with open_client(engine) as client:
        events = read_events(client.post(GENERATE, json={**body, "top_logprobs_num": 1}))
    metas = [event["meta_info"] for event in events]
    assert [meta["completion_tokens"] for meta in metas] == [1, 2, 3, 4]
    output = [entry(token) for token in ("C", "A", "B", EOS_ID)]
    assert [meta["output_token_logprobs"] for meta in metas] == [output[:end] for end in (1, 2, 3, 4)]
    assert [len(meta["output_top_logprobs"]) for meta in metas] == [1, 2, 3, 4]
    assert all(meta["input_token_logprobs"] == [first_entry("x"), entry("y"), entry("z")] for meta in metas)


def test_generate_streams_new_logprobs_only_where_frames_are_incremental():
    body = {"text": "xyz", "return_logprob": True, "logprob_start_len": 0, "stream": True}
    params = {"stream_interval": 2, "max_new_tokens": 4}
    with open_client(scored(), is_streaming_incremental=True) as client:
        events = read_events(client.post(GENERATE, json={**body, "sampling_params": params}))
    metas = [event["meta_info"] for event in events]
    output = [entry(token) for token in ("C", "A", "B", EOS_ID)]
    assert [meta["output_token_logprobs"] for meta in metas] == [output[:1], output[1:3], output[3:]]
    assert [meta["output_token_logprobs_length"] for meta in metas] == [1, 3, 4]
    assert [len(meta["input_token_logprobs"]) for meta in metas] == [3, 3, 3]


def test_generate_tells_only_of_the_tokens_before_a_stop_string():
    engine = scored("one, two", tokens_per_delta=8)
    with open_client(engine) as client:
        body = {"text": "a", "return_logprob": True, "sampling_params": {"stop": ", "}}
        reply = client.post(GENERATE, json=body).json()
    assert reply["text"] == "one"
    assert reply["meta_info"]["output_token_logprobs"] == [entry(token) for token in "one, "]


def test_generate_has_null_for_what_is_not_a_number():
    with open_client(FakeEngine(reply="A", score=score_as_impossible)) as client:
        body = {"text": "a", "return_logprob": True, "sampling_params": {"max_new_tokens": 1}}
        response = client.post(GENERATE, json=body)
    assert response.json()["meta_info"]["output_token_logprobs"] == [[None, 65, None]]


@pytest.mark.parametrize(
    ("extra", "field", "sentence"),
    [
        ({"logprob_start_len": 4}, "logprob_start_len", "at most the number of prompt tokens (3), got 4."),
        (
            {"logprob_start_len": -2},
            "logprob_start_len",
            "logprob_start_len must be -1 or at least 0, got -2.",
        ),
        ({"top_logprobs_num": 129}, "top_logprobs_num", "must be between 0 and 128, got 129."),
        ({"top_logprobs_num": -1}, "top_logprobs_num", "must be between 0 and 128, got -1."),
        ({"token_ids_logprob": [[1]]}, "token_ids_logprob", "must be a flat list of integers"),
        ({"token_ids_logprob": [1, [2]]}, "token_ids_logprob", "must be a flat list of integers"),
        ({"token_ids_logprob": [None]}, "token_ids_logprob", "must be a flat list of integers"),
        ({"token_ids_logprob": [1, None]}, "token_ids_logprob", "must be a flat list of integers"),
        (
            {"token_ids_logprob": [512]},
            "token_ids_logprob",
            "out-of-vocabulary id 512; ids are in [0, 512)",
        ),
        ({"token_ids_logprob": [-1]}, "token_ids_logprob", "the out-of-vocabulary id -1"),
        ({"token_ids_logprob": [1] * 129}, "token_ids_logprob", "must be at most 128 ids, got 129 ids."),
        ({"token_ids_logprob": ["a"]}, "token_ids_logprob[0]", "must be an integer"),
        ({"top_logprobs_num": [1]}, "top_logprobs_num", "only be a list when there is a list of prompts"),
        ({"logprobs_mode": "cooked"}, "logprobs_mode", "must be one of raw, scaled, got 'cooked'."),
        ({"return_sampling_mask": True}, "return_sampling_mask", "not supported by this version"),
    ],
)
def test_generate_refuses_with_a_sentence_about_the_field(client, extra, field, sentence):
    response = client.post(GENERATE, json={"text": "xyz", "return_logprob": True, **extra})
    assert (response.status_code, response.json()["param"]) == (400, field)
    assert sentence in response.json()["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"text": "a", "return_logprob": True}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}),
        (COMPLETIONS, {"prompt": "a", "logprobs": 0}),
    ],
)
def test_the_distribution_is_the_models_own_unless_the_scaled_one_is_asked_for(path, body):
    engine = scored()
    with open_client(engine) as client:
        for mode in (None, "raw", "scaled"):
            assert client.post(path, json={**body, "logprobs_mode": mode}).status_code == 200
    assert [scores_asked(engine, order).is_scaled for order in range(3)] == [False, False, True]
