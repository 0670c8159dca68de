"""Logprobs of chat and completions: OpenAI's two layouts to the key, and every number at its token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.logprobs import ScoredText
from jaxserve.server.pieces import Piece
from jaxserve.text.output import TextStream
from jaxserve.text.tokenizer import byte_tokenizer
from jaxserve.types import FinishReason, SamplingParams, TokenScores
from tests.fakes import EOS_ID, FAKE_INFO, FakeEngine, open_client
from tests.server.events import read_events
from tests.server.scored import logprob_of, score_as_impossible, scored, scores_asked

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: Any = [{"role": "user", "content": "Hi"}]


def chat_entry(token_id: int, num_top: int = 0) -> dict:
    return {**top_entry(token_id), "top_logprobs": [top_entry(65 + rank) for rank in range(num_top)]}


def top_entry(token_id: int) -> dict:
    text = "<|eos|>" if token_id == EOS_ID else chr(token_id)
    return {
        "token": text,
        "bytes": list(text.encode()),
        "logprob": logprob_of(token_id),
        "token_id": token_id,
    }


def test_chat_content_has_every_token_the_closing_one_included():
    with open_client(scored()) as client:
        body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "n": 2}
        choices = client.post(CHAT, json=body).json()["choices"]
    for choice in choices:
        assert choice["logprobs"] == {"content": [chat_entry(token_id, 2) for token_id in [*b"CAB", EOS_ID]]}


@pytest.mark.parametrize(
    ("asked", "num_top"),
    [
        ({"logprobs": True}, 0),
        ({"top_logprobs": 1}, 1),  # as xLLM's clients ask
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"top_logprobs": 0}, None),
        ({}, None),
    ],
)
def test_chat_logprobs_is_the_switch_and_a_number_alone_switches_on(asked, num_top):
    with open_client(scored("A")) as client:
        body = {"messages": USER, "max_tokens": 1, **asked}
        logprobs = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]
    assert logprobs == (None if num_top is None else {"content": [chat_entry(65, num_top)]})


def stream_chat(engine: FakeEngine, **extra) -> list[tuple[str, str | None, list[str]]]:
    """Of each chunk: its text, its finish reason, the tokens of its logprobs."""
    with open_client(engine) as client:
        body = {"messages": USER, "logprobs": True, "stream": True, **extra}
        choices = [event["choices"][0] for event in read_events(client.post(CHAT, json=body))]
    return [
        (
            choice["delta"].get("content", ""),
            choice["finish_reason"],
            [item["token"] for item in (choice["logprobs"] or {"content": []})["content"]],
        )
        for choice in choices
    ]


def test_chat_chunks_carry_the_logprobs_of_their_own_text_and_the_last_one_the_rest():
    assert stream_chat(scored("CAB")) == [
        ("", None, []),
        ("C", None, ["C"]),
        ("A", None, ["A"]),
        ("B", None, ["B"]),
        ("", "stop", ["<|eos|>"]),
    ]


def test_chat_logprobs_wait_with_the_text_that_could_become_a_stop_string():
    held = stream_chat(scored("a, b, c"), stop=", c")
    assert held == [
        ("", None, []),
        ("a", None, ["a"]),
        (", b", None, [",", " ", "b"]),
        ("", "stop", [",", " ", "c"]),
    ]
    # The same in larger steps: of a delta whose end is held back, only the tokens of what is shown.
    assert stream_chat(scored("a, b, c", tokens_per_delta=5), stop=", c") == [
        ("", None, []),
        ("a, b", None, ["a", ",", " ", "b"]),
        ("", "stop", [",", " ", "c"]),
    ]


def test_chat_logprobs_of_a_character_in_two_tokens_come_with_the_character():
    assert stream_chat(scored("né", tokens_per_delta=2)) == [
        ("", None, []),
        ("n", None, ["n"]),
        ("é", None, ["bytes:\\xc3", "bytes:\\xa9"]),
        ("", "stop", ["<|eos|>"]),
    ]


def test_chat_bytes_are_the_true_ones_of_a_token_that_is_no_whole_character():
    with open_client(scored("é")) as client:
        reply = client.post(CHAT, json={"messages": USER, "logprobs": True}).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == ["bytes:\\xc3", "bytes:\\xa9", "<|eos|>"]
    assert bytes(byte for item in content[:2] for byte in item["bytes"]).decode() == "é"


@given(st.lists(st.sampled_from(b"ab, \xc3\xa9" + b"\xff"), max_size=12), st.data())
def test_tokens_come_in_order_with_their_text_however_the_reply_is_cut(ids, data):
    ids = [*ids, data.draw(st.sampled_from([EOS_ID, 97]))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
    sampling = SamplingParams(stop=(", ",))
    tokenizer = byte_tokenizer(512)
    stream, scored = TextStream(tokenizer, sampling), ScoredText(tokenizer, sampling)
    text, taken = "", []
    for start, end in zip([0, *cuts], cuts, strict=False):
        finish = FinishReason(kind="stop", matched=ids[-1]) if end == len(ids) else None
        delta = stream.push(ids[start:end], finish)
        scores = [TokenScores(0.0, [], [], []) for _ in delta.token_ids]
        scored.note(Piece(0, delta.text, delta.token_ids, delta.finish, 1, 0, 0, 0, [], scores))
        text += delta.text
        new = scored.take(is_last=delta.finish is not None)
        assert delta.finish is not None or all(token.offset < len(text) for token in new)
        taken += new
    whole = TextStream(tokenizer, sampling).push(ids, FinishReason(kind="stop", matched=ids[-1]))
    assert [token.token_id for token in taken] == whole.token_ids
    assert (text, [token.offset for token in taken]) == (whole.text, sorted(token.offset for token in taken))
    assert all(token.offset <= len(text) for token in taken)


@pytest.mark.parametrize(
    ("extra", "field", "sentence"),
    [
        ({"top_logprobs": 129}, "top_logprobs", "top_logprobs must be between 0 and 128, got 129."),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "between 0 and 128, got -1."),
        ({"logprobs": False, "top_logprobs": 3}, "logprobs", "must be true for top_logprobs 3, got false."),
        ({"logprobs": 5}, "logprobs", "logprobs must be true or false or null, got an integer."),
        ({"logprobs_mode": ""}, "logprobs_mode", "must be one of raw, scaled, got ''."),
    ],
)
def test_chat_refuses_with_a_sentence_about_the_field(client, extra, field, sentence):
    response = client.post(CHAT, json={"messages": USER, **extra})
    assert (response.status_code, response.json()["param"]) == (400, field)
    assert sentence in response.json()["message"]


def test_the_openai_client_reads_them_typed():
    with (
        open_client(scored("Aé")) as client,
        openai.Client(base_url=f"{client.base_url}/v1", api_key="None", max_retries=0) as sdk,
    ):
        chat = sdk.chat.completions.create(model="m", messages=USER, logprobs=True, top_logprobs=1)
        chunks = list(sdk.chat.completions.create(model="m", messages=USER, logprobs=True, stream=True))
        old = sdk.completions.create(model="m", prompt="x", logprobs=1, echo=True)
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first, second = logprobs.content[:2]
    assert (first.token, first.bytes, first.logprob) == ("A", [65], -1 / 1024)
    assert first.top_logprobs[0].token == "A"
    assert second.bytes == [0xC3]
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens = [item.token for logprobs in streamed for item in logprobs.content or ()]
    assert tokens == ["A", "bytes:\\xc3", "bytes:\\xa9", "<|eos|>"]
    shown: Any = old.choices[0].logprobs
    assert (shown.tokens[:2], shown.token_logprobs[:2]) == (["x", "A"], [None, -1 / 1024])
    assert (shown.text_offset[:2], shown.top_logprobs[:2]) == ([0, 1], [None, {"A": -1 / 1024}])


def complete(engine: FakeEngine, **body) -> dict:
    with open_client(engine) as client:
        return client.post(COMPLETIONS, json={"prompt": "xy", **body}).json()


def test_completions_have_parallel_lists_with_right_offsets():
    choice = complete(scored("né", tokens_per_delta=3), logprobs=1)["choices"][0]
    assert choice["text"] == "né"
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 1, 2],
        "token_logprobs": [logprob_of(token) for token in ("n", 0xC3, 0xA9, EOS_ID)],
        "tokens": ["n", "bytes:\\xc3", "bytes:\\xa9", "<|eos|>"],
        "top_logprobs": [
            {"A": logprob_of("A"), "n": logprob_of("n")},
            {"A": logprob_of("A"), "bytes:\\xc3": logprob_of(0xC3)},
            {"A": logprob_of("A"), "bytes:\\xa9": logprob_of(0xA9)},
            {"A": logprob_of("A"), "<|eos|>": logprob_of(EOS_ID)},
        ],
        "token_ids": [ord("n"), 0xC3, 0xA9, EOS_ID],
    }


def test_completions_name_the_own_token_even_when_no_alternatives_are_wanted():
    logprobs = complete(scored("CA"), logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"C": logprob_of("C")}, {"A": logprob_of("A")}]


def test_offsets_of_what_a_stop_string_cut_off_stand_at_the_end_of_the_text():
    choice = complete(scored("ab, c"), logprobs=0, stop=", ")["choices"][0]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "b", ",", " "]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["xé", ["xé", "q"], [120, 0xC3, 0xA9]])
def test_echo_puts_the_prompt_and_its_logprobs_before_each_choice(prompt, stream):
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 2, "n": 2}
    with open_client(scored("CA")) as client:
        if stream:
            events = read_events(client.post(COMPLETIONS, json={**body, "stream": True}))
            chunks = [event["choices"][0] for event in events]
        else:
            chunks = client.post(COMPLETIONS, json=body).json()["choices"]
    mine = [chunk for chunk in chunks if chunk["index"] == 1]
    assert "".join(chunk["text"] for chunk in mine) == "xéCA"
    lists = {key: [item for chunk in mine for item in chunk["logprobs"][key]] for key in mine[0]["logprobs"]}
    assert lists["tokens"] == ["x", "bytes:\\xc3", "bytes:\\xa9", "C", "A"]
    assert lists["text_offset"] == [0, 1, 1, 2, 3]
    assert lists["token_logprobs"] == [None, *map(logprob_of, (0xC3, 0xA9, "C", "A"))]
    assert lists["top_logprobs"][0] is None
    assert len([chunk for chunk in mine if chunk["text"].startswith("x")]) == 1


def test_echo_of_ids_leaves_special_tokens_out_of_the_text_unless_they_are_wanted():
    body = {"prompt": [257, 120], "echo": True, "logprobs": 0, "max_tokens": 1}
    hidden = complete(scored("C"), **body)["choices"][0]
    shown = complete(scored("C"), **body, skip_special_tokens=False)["choices"][0]
    assert (hidden["text"], hidden["logprobs"]["text_offset"]) == ("xC", [0, 0, 1])
    assert (shown["text"], shown["logprobs"]["text_offset"]) == ("<|bos|>xC", [0, 7, 8])
    spelled = complete(scored("C"), **{**body, "prompt": "<|bos|>x"})["choices"][0]
    assert (spelled["text"], spelled["logprobs"]["text_offset"]) == ("<|bos|>xC", [0, 7, 8])


def test_echo_without_logprobs_is_text_only():
    engine = scored("CA")
    choice = complete(engine, echo=True, max_tokens=1)["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("xyC", None)
    assert engine.submitted[0].params.scores is None


def test_a_harness_scores_a_prompt_without_generating():
    reply = complete(scored(), echo=True, logprobs=1, max_tokens=0)
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("xy", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, logprob_of("y")]
    assert choice["logprobs"]["top_logprobs"] == [None, {"A": logprob_of("A"), "y": logprob_of("y")}]
    assert reply["usage"]["completion_tokens"] == 0


def test_a_token_that_cannot_come_is_a_number_that_json_has():
    engine = FakeEngine(reply="A", score=score_as_impossible)
    with open_client(engine) as client:
        chat = client.post(CHAT, json={"messages": USER, "logprobs": True, "max_tokens": 1}).json()
    assert chat["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
    old = complete(engine, logprobs=0, max_tokens=1)
    assert old["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize(
    ("extra", "field", "sentence"),
    [
        ({"logprobs": 129}, "logprobs", "logprobs must be between 0 and 128, got 129."),
        ({"logprobs": -1}, "logprobs", "logprobs must be between 0 and 128, got -1."),
        ({"logprobs": True}, "logprobs", "must be an integer or null, got true or false."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "max_tokens must be at least 0, got -1."),
    ],
)
def test_completions_refuse_with_a_sentence_about_the_field(client, extra, field, sentence):
    response = client.post(COMPLETIONS, json={"prompt": "a", **extra})
    assert (response.status_code, response.json()["param"]) == (400, field)
    assert sentence in response.json()["message"]


def test_a_prompt_that_holds_a_stop_string_does_not_end_the_reply():
    choice = complete(scored("CA"), prompt="a, b", echo=True, stop=", ", logprobs=0, max_tokens=1)["choices"][
        0
    ]
    assert (choice["text"], choice["finish_reason"]) == ("a, bC", "length")


def test_memory_of_a_long_scored_prompt_is_that_of_its_rows():
    engine = scored(info=replace(FAKE_INFO, context_length=10_000))
    reply = complete(engine, prompt="x" * 8_000, echo=True, logprobs=1, max_tokens=0)
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 8_000
    assert scores_asked(engine).prompt_rows == tuple(range(7_999))
