"""stop_regex over HTTP: the pattern is told, and one that takes too long ends its own request only."""

from __future__ import annotations

import asyncio

import pytest

from jaxserve.metrics import ServerMetrics
from jaxserve.server.generation import Generator, Job, new_rid
from jaxserve.server.settings import ServerSettings
from jaxserve.text.stop_regex import SearchAllowance
from jaxserve.types import SamplingParams
from tests.fakes import FakeEngine, make_text_tools, open_client
from tests.server.events import read_events

HOSTILE = "(?:a|aa)+[cd]"  # exponential in the number of a's before the b
REPLY = "Step " + "a" * 80 + "b, and no more"
USER = [{"role": "user", "content": "Hi"}]


def test_every_route_stops_at_a_pattern_and_tells_which():
    with open_client(FakeEngine(reply="One. Two. 33 three")) as client:
        sampling = {"stop_regex": [r"\d+ t", "never"]}
        native = client.post("/generate", json={"text": "a", "sampling_params": sampling}).json()
        assert native["text"] == "One. Two. "
        assert native["meta_info"]["finish_reason"] == {"type": "stop", "matched": r"\d+ t"}
        for path, prompt in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 40}),
            ("/v1/chat/completions", {"messages": USER}),
        ):
            choice = client.post(path, json={**prompt, "stop_regex": r"\d+ t"}).json()["choices"][0]
            assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", r"\d+ t")
            assert choice.get("text", choice.get("message", {}).get("content")) == "One. Two. "


@pytest.mark.parametrize("pattern", ["(", "a*", "(?:a{100}){100}", "b" * 257])
def test_a_pattern_that_cannot_be_used_is_400_before_anything_runs(pattern):
    engine = FakeEngine()
    with open_client(engine) as client:
        response = client.post("/v1/completions", json={"prompt": "a", "stop_regex": pattern, "stream": True})
        assert (response.status_code, response.json()["param"]) == (400, "stop_regex")
    assert engine.submitted == []


def test_a_pattern_that_takes_too_long_ends_its_own_request_with_a_reason():
    engine = FakeEngine(reply=REPLY, delay_s=0.001)
    with open_client(engine) as client:
        body = {"prompt": "a", "max_tokens": 200, "rid": "slow", "stop_regex": HOSTILE}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert "takes too long to search for" in response.json()["message"]
        assert engine.left == ["slow"]  # its rows and pages are free

        *chunks, last = read_events(client.post("/v1/completions", json={**body, "stream": True}))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Step "
        assert (last["error"]["code"], last["error"]["param"]) == (400, "stop_regex")
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_all_choices_and_prompts_of_a_call_have_one_allowance_and_other_calls_another():
    engine = FakeEngine()
    settings = ServerSettings(served_model_name="fake-model", model_path="fake/model")
    metrics = ServerMetrics("fake-model", engine.engines)
    generator = Generator(engine, make_text_tools(), settings, metrics)
    sampling = SamplingParams(n=3, stop_regex=("x",))

    async def open_call() -> list[SearchAllowance]:
        jobs = [Job(rid=new_rid(), prompt="a", prompt_field="text", sampling=sampling) for _ in range(2)]
        async with generator.open(jobs) as run:
            return [sequence.allowance for sequence in run.sequences]

    first, second = asyncio.run(open_call()), asyncio.run(open_call())
    assert len(first) == 6
    assert all(allowance is first[0] for allowance in first)
    assert second[0] is not first[0]
