"""Health that is honest, information that benchmark clients read, metrics, CORS, request ids, the log."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from jaxserve.types import EngineStats
from tests.fakes import FAKE_INFO, FakeEngine, open_client

PROBES = ("/health", "/ready", "/ping")


@pytest.mark.parametrize("path", PROBES)
def test_probes_answer_from_the_status_and_never_queue(path):
    engine = FakeEngine()
    with open_client(engine) as client:
        assert client.get(path).json() == {"status": "healthy", "engine": "ready", "heartbeat_age_s": 0.01}
        assert client.head(path).status_code == 200
        for status in ("starting", "draining", "dead"):
            engine.status, engine.status_message = status, "Because."
            response = client.get(path)
            assert response.status_code == 503
            assert response.json()["message"] == f"The engine is {status}. Because."
        engine.status_message = "It is dead, Jim."
        assert client.get(path).json()["message"] == "It is dead, Jim."
    assert engine.submitted == []


def test_silence_of_the_engine_is_unhealthy():
    engine = FakeEngine(heartbeat_age_s=31.0)
    with open_client(engine, heartbeat_limit_s=30.0) as client:
        response = client.get("/health")
    assert response.status_code == 503
    assert response.json()["message"] == "The engine has been silent for 31.0 s; the limit is 30 s."


def test_health_generate_makes_one_token():
    engine = FakeEngine()
    with open_client(engine) as client:
        assert client.get("/health_generate").status_code == 200
    assert engine.submitted[0].params.max_new_tokens == 1


def test_health_generate_gives_up_and_leaves_nothing_behind():
    engine = FakeEngine(hang_after=0)
    with open_client(engine, health_generate_timeout_s=0.05) as client:
        response = client.get("/health_generate")
    assert response.status_code == 503
    assert "no token within 0.05 s" in response.json()["message"]
    assert len(engine.left) == 1


def test_health_generate_is_one_token_for_all_who_ask():
    engine = FakeEngine(delay_s=0.3)
    with open_client(engine) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(client.get, ["/health_generate"] * 4))
        assert len(engine.submitted) == 1
        assert client.get("/health_generate").status_code == 200
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(engine.submitted) == 2


def test_models():
    with open_client(FakeEngine(), served_model_name="org/Name") as client:
        listed = client.get("/v1/models").json()
        assert client.get("/v1/models/").json() == listed
        card = client.get("/v1/models/org/name").json()
        missing = client.get("/v1/models/org/other")
    created = card.pop("created")
    assert abs(created - time.time()) < 60
    assert card == {
        "id": "org/Name",
        "object": "model",
        "owned_by": "jaxserve",
        "root": "org/Name",
        "parent": None,
        "max_model_len": 256,
    }
    assert listed == {"object": "list", "data": [{**card, "created": created}]}
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/models", "/model_info", "/server_info"])
def test_information_waits_for_the_engine_and_outlives_it(path):
    engine = FakeEngine(info=None, status="starting")
    with open_client(engine) as client:
        assert client.get(path).status_code == 503
        engine.info, engine.status = FAKE_INFO, "draining"
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(path):
    with open_client(FakeEngine(), model_path="here/model", load_format="dummy") as client:
        body = client.get(path).json()
    assert body == {
        "model_path": "here/model",
        "served_model_name": "fake-model",
        "tokenizer_path": "here/model",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "dummy",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "fake",
        "architectures": ["FakeForCausalLM"],
    }


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_has_what_benchmark_clients_read_and_no_keys(path):
    stats = EngineStats(num_running=3, num_queued=2, num_free_pages=100, gen_throughput=12.5)
    args = {"port": 30000, "api_key": "secret", "chat_template": None}
    with open_client(FakeEngine(stats=stats), server_args=args, launch_command="jaxserve launch") as client:
        response = client.get(path)
    body = response.json()
    assert "secret" not in response.text
    assert (body["port"], body["launch_command"], body["page_size"]) == (30000, "jaxserve launch", 16)
    assert isinstance(body["version"], str)
    assert (body["tokenizer_path"], body["max_total_num_tokens"]) == ("fake/model", 4096)
    state = body["internal_states"][0]
    assert state["last_gen_throughput"] == 12.5
    assert state["effective_max_running_requests_per_dp"] == 8
    assert state["memory_usage"]["token_capacity"] == 4096
    assert (state["dp_size"], state["avg_spec_accept_length"]) == (1, None)
    assert (state["num_running_reqs"], state["num_queue_reqs"], state["num_free_pages"]) == (3, 2, 100)


def test_flush_cache_by_get_and_post():
    engine = FakeEngine()
    with open_client(engine) as client:
        assert client.get("/flush_cache").status_code == 200
        flushed = client.post("/flush_cache?timeout=2.5")
        engine.can_flush = False
        busy = client.post("/flush_cache")
        wrong = client.post("/flush_cache?timeout=soon")
    assert engine.flush_timeouts == [0.0, 2.5, 0.0]
    assert (flushed.status_code, flushed.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert busy.status_code == 400
    assert "timeout must be a number of seconds" in wrong.json()["message"]


def test_abort_request_goes_by_prefix_and_an_empty_id_does_nothing():
    engine = FakeEngine(hang_after=1)
    ids = ["a-1", "a-2", "b-1"]
    with open_client(engine) as client:
        streams = [
            client.stream("POST", "/generate", json={"text": "x", "rid": rid, "stream": True}) for rid in ids
        ]
        lines = [stream.__enter__().iter_lines() for stream in streams]
        for line in lines:
            next(line)
        for body, expected in (({"rid": ""}, 3), ({}, 3), ({"rid": "a-"}, 1), ({"abort_all": True}, 0)):
            response = client.post("/abort_request", json=body)
            assert (response.status_code, response.content) == (200, b"")
            deadline = time.monotonic() + 5
            while len(list(engine.live_rids())) != expected:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_guessed_digit_ends_nobodys_requests():
    engine = FakeEngine(hang_after=1)
    lines = []  # kept, as a stream ends with its iterator
    with open_client(engine) as client, ExitStack() as open_streams:
        for rid in (None, "words-of-mine"):
            body = {"text": "x", "rid": rid, "stream": True}
            stream = open_streams.enter_context(client.stream("POST", "/generate", json=body))
            lines.append(stream.iter_lines())
            next(lines[-1])
        own = next(rid for rid in engine.live_rids() if rid != "words-of-mine")
        for rid in (*"0123456789abcdef", own[:7], "word"):
            client.post("/abort_request", json={"rid": rid})
        time.sleep(0.05)
        assert len(list(engine.live_rids())) == 2
        for rid in (own[:8], "words"):
            client.post("/abort_request", json={"rid": rid})
        deadline = time.monotonic() + 5
        while list(engine.live_rids()):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_metrics_have_sglangs_names():
    stats = EngineStats(
        num_running=2,
        num_queued=1,
        num_free_pages=200,
        num_prompt_tokens=100,
        num_cached_tokens=25,
        num_computed_tokens=75,
        num_evicted_tokens=32,
        num_generated_tokens=50,
        num_late_compiles=1,
        step_gap_s=0.25,
    )
    with open_client(FakeEngine(reply="abc", stats=stats)) as client:
        client.post("/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 3}})
        client.get("/nowhere/private")
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    model = '{model_name="fake-model"}'
    expected = {
        "sglang:prompt_tokens_total": 100,
        "sglang:generation_tokens_total": 50,
        "sglang:cached_tokens_total": 25,
        "sglang:evicted_tokens_total": 32,
        "sglang:num_requests_total": 1,
        "sglang:num_running_reqs": 2,
        "sglang:num_queue_reqs": 1,
        "sglang:cache_hit_rate": 0.25,
        "sglang:num_used_tokens": 57 * 16,
        "sglang:token_usage": 57 * 16 / 4096,
        "sglang:max_total_num_tokens": 4096,
        "sglang:time_to_first_token_seconds_count": 1,
        "sglang:inter_token_latency_seconds_count": 2,
        "sglang:e2e_request_latency_seconds_count": 1,
        "sglang:prompt_tokens_histogram_sum": 1,
        "sglang:generation_tokens_histogram_sum": 3,
        "jaxserve:late_compiles_total": 1,
        "jaxserve:step_gap_seconds_total": 0.25,
    }
    assert {name: float(values[name + model]) for name in expected} == expected
    by_mode = {"prefill_compute": 75, "prefill_cache": 25, "decode": 50}
    for mode, count in by_mode.items():
        series = f'sglang:realtime_tokens_total{{mode="{mode}",model_name="fake-model"}}'
        assert float(values[series]) == count
    assert values['sglang:http_responses_total{endpoint="generate",method="POST",status_code="200"}'] == "1.0"
    assert values['sglang:http_responses_total{endpoint="unmatched",method="GET",status_code="404"}'] == "1.0"


def test_histograms_fit_a_tpu_and_a_laptop():
    stats = EngineStats(queue_time_s=2.5, queue_time_counts=(3, *[0] * 12, 1, 1))
    with open_client(FakeEngine(stats=stats)) as client:
        text = client.get("/metrics").text

    def bounds(name: str) -> list[float]:
        found = re.findall(rf'^sglang:{name}_seconds_bucket{{le="([^"]+)"', text, re.M)
        return [float(bound) for bound in found]

    for name, shortest_s, longest_s in (
        ("time_to_first_token", 0.001, 300),
        ("inter_token_latency", 0.0001, 10),
        ("request_time_per_output_token", 0.0001, 10),
        ("e2e_request_latency", 0.005, 1800),
        ("queue_time", 0.001, 300),
    ):
        assert bounds(name) == [*sorted(bounds(name)[:-1]), float("inf")]
        assert (bounds(name)[0], bounds(name)[-2]) == (shortest_s, longest_s)
    queued = dict(re.findall(r'^sglang:queue_time_seconds_bucket{le="([^"]+)".*} (.*)$', text, re.M))
    assert (queued["0.001"], queued["60.0"], queued["300.0"], queued["+Inf"]) == ("3.0", "3.0", "4.0", "5.0")
    assert 'sglang:queue_time_seconds_sum{model_name="fake-model"} 2.5' in text


def test_metrics_before_the_engine_is_ready():
    with open_client(FakeEngine(info=None, status="starting")) as client:
        assert 'jaxserve:is_ready{model_name="fake-model"} 0.0' in client.get("/metrics").text


def test_browsers_of_any_origin_may_call(client):
    headers = {"origin": "http://x", "access-control-request-headers": "authorization, x-custom"}
    preflight = client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert preflight.headers["access-control-allow-headers"] == "authorization, x-custom"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for response in (client.get("/health"), client.get("/nothing")):
        assert response.headers["access-control-allow-origin"] == "*"


def test_request_id_is_echoed_or_made_up(client):
    assert client.get("/health", headers={"x-request-id": "007"}).headers["x-request-id"] == "007"
    made_up = client.get("/health", headers={"x-request-id": "x" * 300}).headers["x-request-id"]
    assert 0 < len(made_up) <= 256
    assert client.get("/nothing", headers={"x-request-id": "lost"}).headers["x-request-id"] == "lost"


def test_log_has_counts_and_ids_but_no_prompts(caplog):
    with open_client(FakeEngine(reply="answer")) as client, caplog.at_level(logging.INFO, "jaxserve"):
        for stream in (False, True):
            body = {"text": "private words", "rid": "r1", "stream": stream}
            assert client.post("/generate", json=body).status_code == 200
        client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "jaxserve.access"]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("POST /generate 200 rid=r1 prompt_tokens=13 completion_tokens=7 ")
    assert "private" not in caplog.text
    assert "answer" not in caplog.text


def test_log_can_be_switched_off(caplog):
    with (
        open_client(FakeEngine(), is_access_logged=False) as client,
        caplog.at_level(logging.INFO, "jaxserve"),
    ):
        client.post("/generate", json={"text": "a"})
    assert [record for record in caplog.records if record.name == "jaxserve.access"] == []


def test_random_seed_makes_the_seeds_of_a_server_repeatable():
    def draw(random_seed):
        engine = FakeEngine()
        with open_client(engine, random_seed=random_seed) as client:
            for _ in range(2):
                client.post("/generate", json={"text": "a"})
        return [item.params.seed for item in engine.submitted]

    first, again, other = draw(7), draw(7), draw(8)
    assert first == again != other
    assert first[0] != first[1]
    assert draw(None) != draw(None)


def test_info_of_a_longer_context_reaches_clients():
    engine = FakeEngine(info=replace(FAKE_INFO, context_length=1000))
    with open_client(engine) as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 1000
        assert client.get("/server_info").json()["max_req_input_len"] == 999
