"""/tokenize and /detokenize: the ids that the model would see, one text or many, whatever the engine does."""

from __future__ import annotations

import jsonschema
import pytest

from jaxserve.server.openapi import describe_api
from tests.fakes import FakeEngine, open_client

HI = [{"role": "user", "content": "Hi"}]
CHATML = "<|im_start|>user\nHi<|im_end|>\n"


def ids_of(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_becomes_ids_and_they_become_the_text(client, prefix):
    reply = client.post(f"{prefix}/tokenize", json={"prompt": "héy<|eos|>"}).json()
    assert reply == {"tokens": [*ids_of("héy"), 256], "count": 5, "max_model_len": 256}
    body = {"tokens": reply["tokens"]}
    assert client.post(f"{prefix}/detokenize", json=body).json() == {"text": "héy"}
    body["skip_special_tokens"] = False
    assert client.post(f"{prefix}/detokenize", json=body).json() == {"text": "héy<|eos|>"}


def test_a_list_gives_lists(client):
    reply = client.post("/tokenize", json={"prompt": ["a", ""], "return_token_strs": True}).json()
    assert reply == {"tokens": [[97], []], "count": [1, 0], "max_model_len": 256, "token_strs": [["a"], []]}
    assert client.post("/detokenize", json={"tokens": [[97], []]}).json() == {"text": ["a", ""]}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"text": ""}


def test_the_text_of_each_token_shows_the_bytes_of_half_characters(client):
    reply = client.post("/tokenize", json={"prompt": "é<|bos|>", "return_token_strs": True}).json()
    assert reply["token_strs"] == [r"bytes:\xc3", r"bytes:\xa9", "<|bos|>"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, CHATML + "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, CHATML),
        ({"chat_template_kwargs": {"unused": 1}, "tools": []}, CHATML + "<|im_start|>assistant\n"),
    ],
)
def test_messages_are_rendered_as_chat_renders_them(client, options, text):
    reply = client.post("/tokenize", json={"messages": HI, **options}).json()
    assert bytes(reply["tokens"]).decode() == text
    assert reply["count"] == len(text)


def test_the_count_is_the_usage_of_a_chat(client):
    messages = [*HI, {"role": "assistant", "content": "The"}]
    body = {"messages": messages, "continue_final_message": True}
    usage = client.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]
    assert client.post("/tokenize", json=body).json()["count"] == usage["prompt_tokens"]


def test_long_texts_are_whole_too(client):
    text = "0123456789" * 2000
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == ids_of(text)
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"text": text}


@pytest.mark.parametrize("status", ["starting", "asleep", "dead"])
def test_the_engine_is_not_needed(status):
    with open_client(FakeEngine(status=status, info=None)) as client:
        reply = client.post("/tokenize", json={"prompt": "a"})
        assert (reply.status_code, reply.json()) == (200, {"tokens": [97], "count": 1, "max_model_len": None})
        assert client.post("/detokenize", json={"tokens": [97]}).json() == {"text": "a"}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/tokenize", {}, "Give either prompt or messages, got neither."),
        ("/tokenize", {"prompt": "a", "messages": HI}, "Give either prompt or messages, got both."),
        ("/tokenize", {"prompt": [1]}, "prompt[0] must be a string, got an integer."),
        ("/tokenize", {"messages": []}, "at least one message"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, "the assistant's"),
        ("/detokenize", {}, "tokens is required."),
        ("/detokenize", {"tokens": [512]}, "tokens holds 512, which is not a token id in [0, 512)."),
        ("/detokenize", {"tokens": [[1], [-1]]}, "tokens holds -1"),
        ("/detokenize", {"tokens": [1, [2]]}, "a list of token ids or of lists of them, got a mixture."),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(client, path, body, sentence):
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert sentence in response.json()["message"]


def test_the_models_name_is_checked_when_names_are_strict():
    with open_client(FakeEngine(), is_model_name_strict=True) as client:
        assert client.post("/tokenize", json={"prompt": "a", "model": "fake-model"}).status_code == 200
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert client.post(path, json={**body, "model": "other"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a", "return_token_strs": True}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/detokenize", {"tokens": [1]}),
        ("/detokenize", {"tokens": [[1]]}),
    ],
)
def test_bodies_and_replies_fit_their_schemas(client, path, body):
    api = describe_api()
    operation = api["paths"][path]["post"]
    for value, place in (
        (body, operation["requestBody"]),
        (client.post(path, json=body).json(), operation["responses"]["200"]),
    ):
        schema = place["content"]["application/json"]["schema"]
        jsonschema.validate(value, {**schema, "components": api["components"]})
