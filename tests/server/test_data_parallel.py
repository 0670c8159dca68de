"""Several engines behind one server: what is told of each, and a request that chooses one."""

from __future__ import annotations

from jaxserve.types import EngineStats
from tests.fakes import FakeEngine, open_client

FIRST = EngineStats(num_running=3, num_queued=2)


def test_several_engines_are_told_apart_by_dp_rank():
    second = FakeEngine(stats=EngineStats(num_running=7))
    with open_client(FakeEngine(stats=FIRST, others=(second,))) as client:
        body = client.get("/v1/loads").json()
        assert [(load["dp_rank"], load["num_running_reqs"]) for load in body["loads"]] == [(0, 3), (1, 7)]
        assert body["num_accelerators"] == 2
        assert [load["dp_rank"] for load in client.get("/v1/loads?dp_rank=1").json()["loads"]] == [1]
        assert [load["num_reqs"] for load in client.get("/get_load").json()] == [5, 7]
        text = client.get("/v1/loads?format=prometheus").text
        assert text.count("# TYPE sglang_num_running_reqs gauge") == 1
        assert 'sglang_num_running_reqs{dp_rank="1"} 7\n' in text
        states = client.get("/server_info").json()["internal_states"]
        assert [(state["dp_size"], state["num_running_reqs"]) for state in states] == [(2, 3), (2, 7)]
        metrics = client.get("/metrics").text
        for series in ('num_running_reqs{dp_rank="0",', 'prompt_tokens_total{dp_rank="1",'):
            assert f"\nsglang:{series}" in metrics
        assert metrics.count("# TYPE sglang:num_running_reqs gauge") == 1


def test_a_request_may_choose_its_engine():
    engine = FakeEngine(others=(FakeEngine(),))
    ask = {"prompt": "x", "max_tokens": 1}
    with open_client(engine) as client:
        native = {"text": "x", "data_parallel_rank": 0, "sampling_params": {"max_new_tokens": 1}}
        assert client.post("/generate", json=native).status_code == 200
        assert client.post("/v1/completions", json={**ask, "routed_dp_rank": 1}).status_code == 200
        assert client.post("/v1/completions", json=ask).status_code == 200
        assert [submitted.dp_rank for submitted in engine.submitted] == [0, 1, None]
        for rank in (2, -1):
            refused = client.post("/v1/completions", json={**ask, "routed_dp_rank": rank})
            assert (refused.status_code, refused.json()["param"]) == (400, "routed_dp_rank")
            assert f"between 0 and 1 on this server, got {rank}" in refused.json()["message"]
