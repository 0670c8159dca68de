"""The OpenAI Python client against our server: replies, streams, and its own exception classes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes import FakeEngine, open_client

USER: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with open_client(FakeEngine(reply="The answer.")) as client:
        yield f"{client.base_url}/v1"


@pytest.fixture
def sdk(base_url) -> Iterator[openai.OpenAI]:
    with openai.Client(base_url=base_url, api_key="None", max_retries=0) as client:
        yield client


def test_chat(sdk):
    reply = sdk.chat.completions.create(model="m", messages=USER, temperature=0, max_tokens=64)
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        "The answer.",
        "assistant",
        "stop",
    )
    assert choice.message.tool_calls is None
    assert choice.message.reasoning_content is None
    assert choice.matched_stop == 256
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (
        52,
        12,
        64,
    )
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert reply.metadata == {"weight_version": "default"}


def test_chat_stream_as_in_the_quickstart(sdk):
    """The loop has no guard for a chunk without choices, so none may come unasked."""
    text = ""
    for chunk in sdk.chat.completions.create(model="m", messages=USER, stream=True):
        if chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
    assert text == "The answer."


def test_completions_with_n_stop_and_seed(sdk):
    reply = sdk.completions.create(model="m", prompt=["a", "b"], n=2, stop=[" "], seed=3, max_tokens=9)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(i, "The") for i in range(4)]
    chunks = list(sdk.completions.create(model="m", prompt="a", stream=True, max_tokens=3))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["fake-model"]
    assert sdk.models.retrieve("fake-model").id == "fake-model"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_model_whose_name_is_no_plain_path_is_found():
    with (
        open_client(FakeEngine(), served_model_name="Org/Ein Modell für alle") as client,
        openai.Client(base_url=f"{client.base_url}/v1", api_key="None", max_retries=0) as sdk,
    ):
        (listed,) = sdk.models.list()
        assert sdk.models.retrieve(listed.id) == listed
        with pytest.raises(openai.NotFoundError, match="'Org/andere 100%'"):
            sdk.models.retrieve("Org/andere 100%")


def test_async_client_and_stream(base_url):
    async def ask() -> list[str]:
        async with openai.AsyncClient(base_url=base_url, api_key="None", max_retries=0) as sdk:
            whole = [sdk.chat.completions.create(model="m", messages=USER) for _ in range(8)]
            texts = [reply.choices[0].message.content or "" for reply in await asyncio.gather(*whole)]
            stream = await sdk.chat.completions.create(model="m", messages=USER, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [*texts, "".join(pieces)]

    assert asyncio.run(ask()) == ["The answer."] * 9


def test_bad_requests_are_its_bad_request_error(sdk):
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="m", messages=USER, temperature=-1)
    assert caught.value.param == "temperature"
    assert "temperature must be a finite number >= 0, got -1.0." in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
        sdk.completions.create(model="m", prompt="x" * 300)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        list(
            sdk.chat.completions.create(
                model="m", messages=USER, stream=True, response_format={"type": "json_object"}
            )
        )


@pytest.mark.parametrize(
    ("engine", "settings", "error"),
    [
        (FakeEngine(), {"api_key": "k"}, openai.AuthenticationError),
        (FakeEngine(), {"is_model_name_strict": True}, openai.NotFoundError),
        (FakeEngine(max_live=0), {}, openai.RateLimitError),
        (FakeEngine(status="dead"), {}, openai.InternalServerError),
        (FakeEngine(), {"max_body_bytes": 10}, openai.APIStatusError),
    ],
)
def test_other_failures_are_its_own_classes(engine, settings, error):
    with (
        open_client(engine, **settings) as client,
        openai.Client(base_url=f"{client.base_url}/v1", api_key="None", max_retries=0) as sdk,
    ):
        for stream in (False, True):
            with pytest.raises(error):
                sdk.chat.completions.create(model="m", messages=USER, stream=stream)


def test_it_comes_back_after_the_time_that_retry_after_says():
    engine = FakeEngine(max_live=0, retry_after_s=1)
    with (
        open_client(engine) as client,
        openai.Client(base_url=f"{client.base_url}/v1", api_key="None", max_retries=1) as sdk,
    ):
        room = threading.Timer(0.3, setattr, (engine, "max_live", None))
        room.start()
        reply = sdk.chat.completions.create(model="m", messages=USER)
        room.join()
    assert reply.choices[0].message.content == "Hello there."
