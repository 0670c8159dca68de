"""Operators' routes: three servers' names for sleep, pause and other weights, who may call them, loads."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from jaxserve.server.access import _is_own_origin
from jaxserve.types import KV_CACHE, WEIGHTS, EngineStats
from tests.fakes import FAKE_INFO, FakeEngine, open_client

BOTH = (WEIGHTS, KV_CACHE)
NAME = "fake-model"

# Path, body and what the engine is asked to do, of a model that is awake or (last) asleep.
AWAKE = [
    ("/sleep", {"model_id": NAME, "master_status": 1}, ("release", BOTH, True, "wait", 60.0)),
    (
        "/sleep",
        {"model_id": "Fake-Model", "master_status": "LIGHT_SLEEP"},
        ("release", BOTH, True, "wait", 60.0),
    ),
    (
        "/sleep",
        {"model_id": NAME, "master_status": 2, "mode": "refuse"},
        ("release", BOTH, False, "refuse", 60.0),
    ),
    (
        "/sleep",
        {"model_id": NAME, "master_status": "DEEP_SLEEP", "mode": "abort", "timeout": 5},
        ("release", BOTH, False, "abort", 5.0),
    ),
    ("/sleep?level=2", None, ("release", BOTH, False, "wait", 60.0)),
    ("/sleep?level=1&mode=abort", {}, ("release", BOTH, True, "abort", 60.0)),
    ("/release_memory_occupation", {}, ("release", BOTH, True, "wait", 60.0)),
    ("/release_memory_occupation", {"tags": ["kv_cache"]}, ("release", (KV_CACHE,), True, "wait", 60.0)),
    ("/release_memory_occupation?tags=weights", None, ("release", (WEIGHTS,), True, "wait", 60.0)),
    ("/release_memory_occupation", {"tags": ["cuda_graph"]}, None),
    ("/resume_memory_occupation", {}, None),
    ("/wake_up", None, None),
]


@pytest.mark.parametrize(("path", "body", "operation"), AWAKE)
def test_what_each_route_asks_of_the_engine(path, body, operation):
    engine = FakeEngine()
    with open_client(engine) as client:
        response = client.post(path, json=body) if body is not None else client.post(path)
    assert response.status_code == 200
    assert response.content == (b"null" if "occupation" in path else b"")
    assert engine.operations == ([operation] if operation else [])


def test_sleep_and_wake_as_clients_see_them():
    engine = FakeEngine()
    with open_client(engine) as client:
        sleep, wake = {"model_id": NAME, "master_status": 1}, {"model_id": NAME}
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
        assert client.post("/wakeup", json=wake).json()["message"] == "Model is already awake."
        assert client.post("/sleep", json=sleep).status_code == 200
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}
        for path, body in (
            ("/generate", {"text": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
            ("/v1/sample", {"model": NAME, "prompt": "a", "selector": {"type": "literal", "value": "a"}}),
        ):
            response = client.post(path, json=body)
            assert (response.status_code, response.json()["status"]) == (503, "UNAVAILABLE")
            assert response.json()["message"] == "Model is currently in sleep state."
            assert "retry-after" in response.headers
        again = client.post("/sleep", json=sleep)
        assert (again.status_code, again.json()["message"]) == (400, "Model is already sleeping, at level 1.")
        assert client.post("/sleep", json={**sleep, "master_status": 2}).status_code == 200
        assert client.post("/sleep", json={**sleep, "master_status": 1}).status_code == 400
        assert [client.get(path).status_code for path in ("/health", "/ping", "/ready")] == [200, 200, 503]
        assert client.get("/v1/models").status_code == 200
        assert client.get("/server_info").json()["is_sleeping"] is True
        assert client.post("/wakeup", json=wake).content == b""
        assert client.post("/generate", json={"text": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/sleep", {"master_status": 1}, 400, "model_id is required."),
        ("/sleep", {"model_id": "other", "master_status": 1}, 404, "The model 'other' does not exist"),
        (
            "/sleep",
            {"model_id": NAME},
            400,
            "master_status must be 1 (LIGHT_SLEEP) or 2 (DEEP_SLEEP), got nothing.",
        ),
        ("/sleep", {"model_id": NAME, "master_status": 0}, 400, "got 0."),
        ("/sleep", {"model_id": NAME, "master_status": "WAKEUP"}, 400, "got 'WAKEUP'."),
        (
            "/sleep",
            {"model_id": NAME, "master_status": 1, "mode": "now"},
            400,
            "mode must be one of wait, refuse",
        ),
        (
            "/sleep",
            {"model_id": NAME, "master_status": 1, "timeout": 1e9},
            400,
            "timeout must be a number of",
        ),
        ("/sleep?level=3", None, 400, "level must be 1"),
        ("/wakeup", {}, 400, "model_id is required."),
        ("/wakeup", {"model_id": "other"}, 404, "does not exist"),
        ("/wakeup", {"model_id": NAME, "remote_addrs": ["x"]}, 400, "remote_addrs is not supported"),
        ("/wake_up?tags=brain", None, 400, "tags must be one of weights, kv_cache, cuda_graph, got 'brain'."),
        ("/release_memory_occupation", {"tags": ["brain"]}, 400, "tags must be one of weights"),
        ("/release_memory_occupation", {"tags": "weights"}, 400, "tags must be a list or null, got a string"),
        (
            "/pause_generation",
            {"mode": "keep"},
            400,
            "mode must be one of abort, retract, in_place, got 'keep'.",
        ),
        ("/pause", {"mode": "retract"}, 400, "mode must be one of keep, abort, wait, got 'retract'."),
        ("/update_weights_from_disk", {}, 400, "model_path is required."),
        ("/update_weights_from_disk", {"model_path": ""}, 400, "model_path cannot be empty."),
        (
            "/update_weight_version",
            {"new_version": "x" * 300},
            400,
            "new_version must have 1 to 256 characters",
        ),
    ],
)
def test_wrong_orders_are_refused_with_what_is_wrong(path, body, status, sentence):
    engine = FakeEngine()
    with open_client(engine) as client:
        response = client.post(path, json=body) if body is not None else client.post(path)
    assert response.status_code == status
    assert sentence in response.json()["message"]
    assert engine.operations == []


ORDERS = {
    "/sleep": {"model_id": NAME, "master_status": 1},
    "/release_memory_occupation": {},
    "/pause_generation": {},
    "/continue_generation": {},
    "/pause": {},
    "/resume": {},
}


@pytest.mark.parametrize("path", ORDERS)
def test_what_the_engine_cannot_do_is_503_with_the_reason(path):
    with open_client(FakeEngine(operation_failure="Requests are in the way: 1 running.")) as client:
        response = client.post(path, json=ORDERS[path])
    assert (response.status_code, response.json()["status"]) == (503, "UNAVAILABLE")
    assert response.json()["message"] == "Requests are in the way: 1 running."
    assert response.headers["retry-after"] == "1"


def test_pause_and_go_on():
    engine = FakeEngine()
    with open_client(engine) as client:
        paused = client.post("/pause_generation", json={"mode": "in_place"})
        assert paused.json() == {"message": "Generation paused successfully.", "status": "ok"}
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert (ready.status_code, "paused" in ready.json()["message"]) == (503, True)
        assert client.get("/health_generate").status_code == 503
        assert client.get("/server_info").json()["is_paused"] is True
        resumed = client.post("/continue_generation", json={"torch_empty_cache": True})
        assert resumed.json() == {"message": "Generation continued successfully.", "status": "ok"}
        assert client.post("/pause", json={"mode": "keep"}).json() == {"status": "paused"}
        assert client.post("/pause?mode=wait").json() == {"status": "paused"}
        assert client.post("/resume").json() == {"status": "running"}
        assert client.get("/ready").status_code == 200
    assert engine.operations == [
        ("pause", "in_place"),
        ("resume",),
        ("pause", "retract"),
        ("pause", "wait"),
        ("resume",),
    ]


def weight_version(client) -> str:
    reply = client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}}).json()
    assert reply["meta_info"]["weight_version"] == client.get("/model_info").json()["weight_version"]
    chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["metadata"]["weight_version"] == reply["meta_info"]["weight_version"]
    return reply["meta_info"]["weight_version"]


def test_other_weights_bump_the_version_and_a_failure_does_not():
    engine = FakeEngine()
    with open_client(engine) as client:
        assert weight_version(client) == "default"
        reply = client.post("/update_weights_from_disk", json={"model_path": "b", "weight_version": "step-1"})
        assert (reply.status_code, reply.json()) == (
            200,
            {
                "success": True,
                "message": "Succeeded to update model weights. Weight version updated to step-1.",
                "num_paused_requests": 0,
            },
        )
        assert weight_version(client) == "step-1"
        client.post(
            "/update_weights_from_disk", json={"model_path": "c", "flush_cache": False, "token_step": 3}
        )
        assert weight_version(client) == "step-1.1"
        assert client.get("/model_info").json()["model_path"] == "c"
        engine.operation_failure = "c has num_layers 2, the served model has 3: its weights do not fit."
        failed = client.post(
            "/update_weights_from_disk", json={"model_path": "d", "weight_version": "step-2"}
        )
        assert failed.status_code == 400
        assert (failed.json()["success"], failed.json()["num_paused_requests"]) == (False, 0)
        assert failed.json()["message"] == failed.json()["error"]["message"] == engine.operation_failure
        assert weight_version(client) == "step-1.1"
        renamed = client.post("/update_weight_version", json={"new_version": "v9"})
        assert renamed.json() == {
            "success": True,
            "message": "Weight version updated to v9",
            "new_version": "v9",
        }
        assert weight_version(client) == "v9"
    assert engine.operations[:2] == [("update", "b", "auto", True), ("update", "c", "auto", False)]


@pytest.mark.parametrize(("keep_pause", "is_paused"), [(None, False), (True, True)])
def test_an_update_goes_on_afterwards_unless_told_otherwise(keep_pause, is_paused):
    engine = FakeEngine()
    with open_client(engine) as client:
        client.post("/pause_generation", json={"mode": "retract"})
        body = {"model_path": "b", "keep_pause": keep_pause}
        assert client.post("/update_weights_from_disk", json=body).status_code == 200
    assert engine.stats.is_paused is is_paused


def test_an_order_is_carried_out_though_its_client_leaves():
    engine = FakeEngine(operation_s=0.3)
    with open_client(engine) as client:
        with pytest.raises(Exception, match="timed out"):
            client.post("/update_weights_from_disk", json={"model_path": "b"}, timeout=0.05)
        deadline_s = time.monotonic() + 5
        while client.get("/model_info").json()["weight_version"] != "default.1":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("keys", "given", "ordinary", "operators"),
    [
        ({}, None, 200, 200),
        ({"api_key": "a"}, None, 401, 401),
        ({"api_key": "a"}, "a", 200, 200),
        ({"admin_api_key": "b"}, None, 200, 401),
        ({"admin_api_key": "b"}, "b", 200, 200),
        ({"api_key": "a", "admin_api_key": "b"}, "a", 200, 401),
        ({"api_key": "a", "admin_api_key": "b"}, "b", 200, 200),
    ],
)
def test_operators_may_have_a_key_of_their_own(keys, given, ordinary, operators):
    headers = {"authorization": f"Bearer {given}"} if given else {}
    with open_client(FakeEngine(), **keys) as client:
        assert client.post("/generate", json={"text": "a"}, headers=headers).status_code == ordinary
        assert client.get("/is_sleeping", headers=headers).status_code == ordinary
        assert client.get("/v1/loads", headers=headers).status_code == ordinary
        by_id = client.post("/abort_request", json={"rid": "x"}, headers=headers)
        assert by_id.status_code == ordinary
        for path, body in {**ORDERS, "/flush_cache": {}, "/abort_request": {"abort_all": True}}.items():
            response = client.post(path, json=body, headers=headers)
            assert response.status_code == operators, path
            client.post("/wake_up", headers=headers)
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed", "status"),
    [
        ({}, ("*",), 200),
        ({"origin": "http://evil.example"}, ("*",), 403),
        ({"origin": "null"}, ("*",), 403),
        ({"origin": "http://HOST:1"}, ("*",), 403),
        ({"sec-fetch-site": "cross-site"}, ("*",), 403),
        ({"sec-fetch-site": "same-site"}, ("*",), 403),
        ({"sec-fetch-site": "none"}, ("*",), 200),
        ({"origin": "http://HOST", "sec-fetch-site": "same-origin"}, (), 200),
        ({"origin": "http://a.example", "sec-fetch-site": "cross-site"}, ("http://a.example",), 200),
    ],
)
def test_foreign_web_pages_give_no_orders(headers, allowed, status):
    engine = FakeEngine()
    with open_client(engine, allowed_origins=allowed) as client:
        host = client.base_url.netloc.decode()
        headers = {name: value.replace("HOST", host) for name, value in headers.items()}
        form = {"content-type": "text/plain", **headers}
        answers = [
            client.get("/release_memory_occupation", headers=headers),
            client.post("/wake_up", headers=form),
            client.post("/flush_cache", headers=form),
            client.post("/abort_request", content=b'{"abort_all": true}', headers=form),
        ]
        assert client.post("/generate", json={"text": "a"}, headers=headers).status_code == 200
        assert client.get("/is_sleeping", headers=headers).status_code == 200
    assert [answer.status_code for answer in answers] == [status] * 4
    if status == 403:
        assert engine.operations == []
        told = answers[0].json()
        assert (told["type"], told["status"]) == ("PermissionDeniedError", "PERMISSION_DENIED")
        assert "may not call /release_memory_occupation" in told["message"]
        assert "--allowed-origins" in told["message"]


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        ("https://a.example", "a.example:443", True),
        ("http://A.example:80", "a.example", True),
        ("http://a.example", "a.example:443", False),
        ("http://[::1]:30000", "[::1]:30000", True),
        ("", "", False),
    ],
)
def test_a_page_is_our_own_if_host_and_port_are(origin, host, is_own):
    assert _is_own_origin(origin, host) is is_own


def test_a_sleep_of_two_levels_at_once_is_refused():
    engine = FakeEngine()
    with open_client(engine) as client:
        response = client.post("/sleep?level=1", json={"master_status": 2})
        assert response.status_code == 400
        assert "master_status 2 contradicts ?level=1" in response.json()["message"]
        assert client.post("/sleep?level=1", json={"master_status": "LIGHT_SLEEP"}).status_code == 200
    assert len(engine.operations) == 1


STATS = EngineStats(
    num_running=3,
    num_queued=2,
    num_retracted=1,
    num_waiting_tokens=40,
    num_free_pages=200,
    num_prompt_tokens=100,
    num_cached_tokens=25,
    gen_throughput=12.5,
    is_paused=True,
    param_bytes=2**31,
    kv_bytes=2**30,
)


def test_loads_have_sglangs_keys():
    with open_client(FakeEngine(stats=STATS)) as client:
        body = client.get("/v1/loads").json()
        assert body.keys() == {"timestamp", "version", "accelerator", "num_accelerators", "loads"}
        [load] = body["loads"]
        assert isinstance(load.pop("timestamp"), float)
        used = 57 * 16
        assert load == {
            "dp_rank": 0,
            "num_running_reqs": 3,
            "num_waiting_reqs": 2,
            "num_used_tokens": used,
            "num_total_tokens": used + 40,
            "max_total_num_tokens": 4096,
            "token_usage": used / 4096,
            "gen_throughput": 12.5,
            "cache_hit_rate": 0.25,
            "utilization": 3 / 8,
            "max_running_requests": 8,
            "memory": {"weight_gb": 2.0, "kv_cache_gb": 1.0, "graph_gb": 0.0, "token_capacity": 4096},
            "queues": {"waiting": 2, "grammar": 0, "paused": 5, "retracted": 1},
        }
        [core] = client.get("/v1/loads?include=core,queues&dp_rank=0").json()["loads"]
        assert "queues" in core
        assert "memory" not in core
        assert client.get("/v1/loads?dp_rank=1").json()["loads"] == []
        text = client.get("/v1/loads?format=prometheus").text
        assert 'sglang_num_running_reqs{dp_rank="0"} 3\n' in text
        assert 'sglang_memory_weight_gb{dp_rank="0"} 2.0\n' in text
        for query in ("include=brain", "format=xml", "dp_rank=-1"):
            assert client.get(f"/v1/loads?{query}").status_code == 400
        [old] = client.get("/get_load").json()
        assert (old["num_reqs"], old["num_waiting_reqs"], old["num_tokens"]) == (5, 2, used + 40)


def test_server_info_has_the_live_counts_and_the_bytes_without_any_flag():
    with open_client(FakeEngine(stats=replace(STATS, slot_bytes=5, host_param_bytes=7))) as client:
        body = client.get("/server_info").json()
    assert (body["num_running_reqs"], body["num_queue_reqs"], body["num_free_pages"]) == (3, 2, 200)
    assert (body["page_size"], body["max_total_num_tokens"]) == (FAKE_INFO.page_size, 4096)
    assert (body["param_bytes"], body["kv_bytes"], body["host_param_bytes"]) == (2**31, 2**30, 7)
    assert body["device_bytes"] == 2**31 + 2**30 + 5
