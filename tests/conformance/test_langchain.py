"""langchain-openai against the server: invoke, stream and batch, on chat and on plain completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.fakes import FakeEngine, open_client

ANSWER = "The answer is 42."


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with open_client(FakeEngine(reply=ANSWER)) as client:
        yield f"{client.base_url}/v1"


@pytest.fixture
def chat(base_url) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=base_url, api_key=SecretStr("None"), model="m", max_retries=0, stream_usage=True
    )


def test_invoke(chat):
    reply = chat.invoke([SystemMessage("Be short."), HumanMessage("Why?")])
    assert isinstance(reply, AIMessage)
    assert reply.content == ANSWER
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.response_metadata["model_name"] == "m"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] == len(ANSWER) + 1
    assert reply.usage_metadata.get("input_token_details", {}).get("cache_read", -1) >= 0
    assert reply.tool_calls == []


def test_stream_counts_its_tokens_in_a_last_chunk(chat):
    chunks = list(chat.stream("Why?"))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    assert len([chunk for chunk in chunks if chunk.content]) == len(ANSWER)
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [len(ANSWER) + 1]
    finishes = [chunk.response_metadata.get("finish_reason") for chunk in chunks]
    assert [finish for finish in finishes if finish] == ["stop"]


def test_batch_and_the_asynchronous_half(chat):
    questions = [f"Question {i}?" for i in range(12)]
    assert [reply.content for reply in chat.batch(questions)] == [ANSWER] * 12

    async def ask() -> list[str]:
        replies = await chat.abatch(questions)
        streamed = [str(chunk.content) async for chunk in chat.astream("Why?")]
        return [*(str(reply.content) for reply in replies), "".join(streamed)]

    assert asyncio.run(ask()) == [ANSWER] * 13


def test_a_chain_with_stop_seed_and_limits(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Be {manner}."), ("human", "{question}")])
    chain = prompt | chat.bind(stop=["is"], seed=7, temperature=0.3, top_p=0.9) | StrOutputParser()
    assert chain.invoke({"manner": "brief", "question": "What?"}) == "The answer "
    short = chat.bind(max_tokens=3).invoke("What?")
    assert (short.content, short.response_metadata["finish_reason"]) == ("The", "length")


def test_several_choices_and_plain_completions(base_url, chat):
    generations = chat.generate([[HumanMessage("a")]], n=3).generations[0]
    assert [generation.text for generation in generations] == [ANSWER] * 3
    plain = OpenAI(base_url=base_url, api_key=SecretStr("None"), model="m", max_tokens=10, max_retries=0)
    assert plain.invoke("Why?") == ANSWER[:10]
    assert plain.batch(["a", "b"]) == [ANSWER[:10]] * 2
    assert "".join(plain.stream("Why?")) == ANSWER[:10]


def test_errors_are_those_of_the_openai_client(chat):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat.bind(temperature=-1).invoke("Why?")
    with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
        chat.invoke("x" * 300)
