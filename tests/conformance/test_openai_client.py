"""The OpenAI Python client's finer points: its stream helpers, its time-outs, its failures half way.

tests/server/test_openai_client.py has the plain calls; here is what a program leans on that was written
against OpenAI's own server.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from jaxserve.types import FinishReason
from tests.fakes import FakeEngine, open_client

USER: Any = [{"role": "user", "content": "Hi"}]
ANSWER = "The answer."
SOON_S = 5.0


@contextmanager
def open_sdk(engine: FakeEngine, timeout: float = 20, **settings: Any) -> Iterator[openai.OpenAI]:
    with (
        open_client(engine, **settings) as client,
        openai.OpenAI(
            base_url=f"{client.base_url}/v1", api_key="None", max_retries=0, timeout=timeout
        ) as sdk,
    ):
        yield sdk


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    with open_sdk(FakeEngine(reply=ANSWER)) as sdk:
        yield sdk


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def test_the_stream_helper_puts_the_whole_reply_together(sdk):
    """It is strict: deltas must add up, and each choice must finish once."""
    with sdk.chat.completions.stream(
        model="m", messages=USER, n=2, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [choice.message.content for choice in whole.choices] == [ANSWER, ANSWER]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
    assert whole.usage.completion_tokens == 2 * (len(ANSWER) + 1)


def test_usage_comes_last_and_only_when_asked(sdk):
    options: Any = {"include_usage": True}
    asked = list(sdk.chat.completions.create(model="m", messages=USER, stream=True, stream_options=options))
    assert [chunk.usage is not None for chunk in asked] == [False] * (len(asked) - 1) + [True]
    assert asked[-1].choices == []
    unasked = sdk.chat.completions.create(model="m", messages=USER, stream=True)
    assert [chunk.usage for chunk in unasked if chunk.usage] == []
    always = list(
        sdk.completions.create(
            model="m", prompt="a", stream=True, max_tokens=3,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )  # fmt: skip
    assert [chunk.usage.completion_tokens for chunk in always] == [1, 2, 3, 3]


def test_chat_logprobs(sdk):
    arguments = {"model": "m", "messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    content = sdk.chat.completions.create(**arguments).choices[0].logprobs.content
    check_logprobs(content)
    chunks = list(sdk.chat.completions.create(**arguments, stream=True))
    streamed = [
        item
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for item in chunk.choices[0].logprobs.content or []
    ]
    check_logprobs(streamed)
    assert [item.logprob for item in streamed] == [item.logprob for item in content]


def check_logprobs(content: list[Any]) -> None:
    assert [item.token for item in content] == list("The ")
    for item in content:
        assert bytes(item.bytes).decode() == item.token
        assert item.logprob <= 0
        best = [top.logprob for top in item.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 2


def test_completion_logprobs_and_echo(sdk):
    reply = sdk.completions.create(model="m", prompt="Hi", logprobs=2, max_tokens=3, echo=True)
    choice = reply.choices[0]
    assert choice.text == "HiThe"
    assert choice.logprobs.tokens == list("HiThe")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs[1:])
    assert all(math.isfinite(value) for top in choice.logprobs.top_logprobs[1:] for value in top.values())


def test_headers_that_the_client_shows(sdk):
    raw = sdk.chat.completions.with_raw_response.create(
        model="m", messages=USER, extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.parse()._request_id == "mine-7"
    with sdk.chat.completions.with_streaming_response.create(model="m", messages=USER) as response:
        assert response.status_code == 200
        assert response.headers["x-request-id"]


def test_a_time_out_is_its_own_error_and_ends_the_request():
    engine = FakeEngine(hang_after=2)
    with open_sdk(engine, timeout=0.3) as sdk:
        with pytest.raises(openai.APITimeoutError):
            sdk.chat.completions.create(model="m", messages=USER)
        wait_until(lambda: len(engine.left) == 1)
        stream = sdk.chat.completions.create(model="m", messages=USER, stream=True)
        with pytest.raises((httpx.ReadTimeout, openai.APITimeoutError)):
            list(stream)
        wait_until(lambda: len(engine.left) == 2)
        engine.hang_after = None
        assert sdk.chat.completions.create(model="m", messages=USER).choices[0].message.content


def test_closing_a_stream_ends_the_request():
    engine = FakeEngine(hang_after=2)
    with open_sdk(engine) as sdk:
        with sdk.chat.completions.create(model="m", messages=USER, stream=True) as stream:
            assert next(iter(stream)).choices[0].delta.role == "assistant"
        wait_until(lambda: len(engine.left) == 1)
        assert list(engine.live_rids()) == []


def test_cancelling_a_task_ends_the_request():
    engine = FakeEngine(hang_after=2)

    async def scenario(base_url: Any) -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="None", max_retries=0) as sdk:
            task = asyncio.create_task(sdk.chat.completions.create(model="m", messages=USER))
            while not engine.submitted:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with open_sdk(engine) as sdk:
        asyncio.run(scenario(sdk.base_url))
        wait_until(lambda: len(engine.left) == 1)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_failure_half_way_is_an_api_error_with_the_reason(kind):
    failure = FinishReason(kind="abort", message="The logits of a step were not numbers.", http_status=500)
    with open_sdk(FakeEngine(fail_after=3, failure=failure)) as sdk:
        if kind == "chat":
            stream: Any = sdk.chat.completions.create(model="m", messages=USER, stream=True)
        else:
            stream = sdk.completions.create(model="m", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="The logits of a step were not numbers") as caught:
            list(stream)
        body: Any = caught.value.body
        assert body["code"] == 500
        with pytest.raises(openai.InternalServerError, match="The logits of a step were not numbers"):
            sdk.chat.completions.create(model="m", messages=USER)


STATUSES: list[tuple[dict[str, Any], dict[str, Any], type[openai.APIStatusError], int, str]] = [
    ({}, {"api_key": "k"}, openai.AuthenticationError, 401, "API key"),
    ({}, {"is_model_name_strict": True}, openai.NotFoundError, 404, "m"),
    ({"max_live": 0}, {}, openai.RateLimitError, 429, "queue is full"),
    ({}, {"max_concurrent_requests": 0}, openai.RateLimitError, 429, "requests"),
    ({"status": "dead", "status_message": "It died."}, {}, openai.InternalServerError, 503, "It died."),
    (
        {"status": "draining", "status_message": "It drains."},
        {},
        openai.InternalServerError,
        503,
        "It drains.",
    ),
    (
        {"status": "starting", "status_message": "It starts."},
        {},
        openai.InternalServerError,
        503,
        "It starts.",
    ),
    # Sanic bounds heads by the same number, and that for a whole process: no less than a head's 16 KiB.
    ({}, {"max_body_bytes": 20_000}, openai.APIStatusError, 413, "20000 bytes"),
]


@pytest.mark.parametrize(("engine", "settings", "error", "status", "words"), STATUSES)
def test_every_status_is_its_class_with_a_message_for_a_person(engine, settings, error, status, words):
    messages: Any = [{"role": "user", "content": "Hi" * (15_000 if status == 413 else 1)}]
    with open_sdk(FakeEngine(**engine), **settings) as sdk:
        for stream in (False, True):
            with pytest.raises(error, match=words) as caught:
                sdk.chat.completions.create(model="m", messages=messages, stream=stream)
            assert caught.value.status_code == status
            assert caught.value.request_id
            assert ("retry-after" in caught.value.response.headers) == (status in (429, 503))


def test_routes_that_are_not_there_say_so(sdk):
    for call in (
        lambda: sdk.embeddings.create(model="m", input="a"),
        lambda: sdk.responses.create(model="m", input="a"),
        lambda: sdk.images.generate(model="m", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="There is no route /v1/"):
            call()


def test_what_is_not_supported_is_refused_and_what_is_harmless_is_not(sdk):
    arguments: dict[str, Any] = {"model": "m", "messages": USER}
    harmless: dict[str, Any] = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert sdk.chat.completions.create(**arguments, **harmless).choices[0].message.content == ANSWER
    with pytest.raises(openai.BadRequestError, match="audio"):
        sdk.chat.completions.create(**arguments, audio={"voice": "a", "format": "wav"})
    part: Any = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    with pytest.raises(openai.BadRequestError, match="image"):
        sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": [part]}])
