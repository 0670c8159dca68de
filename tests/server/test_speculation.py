"""What clients and dashboards are told of speculation."""

from __future__ import annotations

from msgspec import structs

from jaxserve.types import EngineStats
from tests.fakes import FakeEngine, open_client


def test_meta_info_tells_what_was_guessed_and_what_came_true(monkeypatch):
    plain = FakeEngine._run

    async def guess(self, first, prompt_ids, params):
        """Of 9 tokens the prefill gave one, and 4 steps the others: 4 of 8 guesses came true."""
        async for delta in plain(self, first, prompt_ids, params):
            yield structs.replace(delta, num_drafted=8, num_accepted=4)

    body = {"text": "a", "sampling_params": {"max_new_tokens": 9, "temperature": 0}}
    with open_client(FakeEngine(reply="Hello there.")) as client:
        assert not [
            name for name in client.post("/generate", json=body).json()["meta_info"] if "spec" in name
        ]
        monkeypatch.setattr(FakeEngine, "_run", guess)
        meta = client.post("/generate", json=body).json()["meta_info"]
    assert {name: value for name, value in meta.items() if "spec" in name} == {
        "spec_verify_ct": 4,
        "spec_accept_length": 9 / 4,
        "spec_accept_rate": 0.5,
        "spec_accept_token_num": 4,
        "spec_draft_token_num": 8,
    }


def test_dashboards_and_benchmarks_find_the_averages():
    stats = EngineStats(num_generated_tokens=300, num_drafted_tokens=250, num_accepted_tokens=200)
    with open_client(FakeEngine(stats=stats)) as client:
        metrics = client.get("/metrics").text
        info = client.get("/server_info").json()
    assert 'sglang:spec_accept_length{model_name="fake-model"} 3.0' in metrics
    assert 'sglang:spec_accept_rate{model_name="fake-model"} 0.8' in metrics
    assert info["internal_states"][0]["avg_spec_accept_length"] == 3.0


def test_without_speculation_the_averages_are_nothing():
    with open_client(FakeEngine(stats=EngineStats(num_generated_tokens=300))) as client:
        assert 'sglang:spec_accept_length{model_name="fake-model"} 0.0' in client.get("/metrics").text
        assert client.get("/server_info").json()["internal_states"][0]["avg_spec_accept_length"] is None
