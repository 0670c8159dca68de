"""A client that leaves: its engine requests are closed at once, whatever they were doing."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from tests.fakes import FAKE_INFO, FakeEngine, open_client

SOON_S = 2.0  # generous for a busy machine; the wait ends as soon as it happens


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def send(client: httpx.Client, path: str, body: dict) -> socket.socket:
    """Send a request over a bare socket, so that the test decides when it closes."""
    raw = socket.create_connection((client.base_url.host, client.base_url.port or 80))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    raw.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return raw


@pytest.mark.parametrize("hang_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "num_sequences"),
    [
        ("/generate", {"text": "a"}, 1),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"n": 2}}, 4),
        ("/v1/completions", {"prompt": "a", "n": 2}, 2),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 1),
    ],
)
def test_closing_the_socket_closes_every_engine_request(
    path, body, num_sequences, stream, hang_after, caplog
):
    engine = FakeEngine(hang_after=hang_after)
    with open_client(engine) as client, caplog.at_level(logging.INFO, "jaxserve"):
        raw = send(client, path, {**body, "stream": stream})
        wait_until(lambda: len(engine.submitted) == num_sequences)
        raw.close()
        wait_until(lambda: len(engine.left) == num_sequences)
        assert list(engine.live_rids()) == []
        wait_until(lambda: " 499 " in caplog.text)
        engine.hang_after = None
        assert client.post("/generate", json={"text": "b"}).status_code == 200
    assert sum(" 499 " in line for line in caplog.text.splitlines()) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_leaving_frees_the_place_under_the_concurrency_limit_and_the_id():
    engine = FakeEngine(hang_after=1)
    with open_client(engine, max_concurrent_requests=1) as client:
        raw = send(client, "/generate", {"text": "a", "rid": "mine"})
        wait_until(lambda: engine.submitted)
        raw.close()
        wait_until(lambda: engine.left == ["mine"])
        engine.hang_after = None
        assert client.post("/generate", json={"text": "a", "rid": "mine"}).status_code == 200


def test_leaving_while_the_socket_is_full():
    """The client reads nothing of a reply of 200 MB; the server waits for room, and the client goes."""
    engine = FakeEngine(info=replace(FAKE_INFO, context_length=10_000))
    with open_client(engine) as client:
        params = {"max_new_tokens": 8000, "ignore_eos": True}
        raw = send(client, "/generate", {"text": "a", "stream": True, "sampling_params": params})
        time.sleep(0.5)
        assert len(list(engine.live_rids())) == 1
        raw.close()
        wait_until(lambda: len(engine.left) == 1)
        assert client.get("/health").status_code == 200


def test_leaving_in_the_middle_of_the_upload(caplog):
    with open_client(FakeEngine()) as client, caplog.at_level(logging.INFO, "jaxserve"):
        raw = socket.create_connection((client.base_url.host, client.base_url.port or 80))
        raw.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        time.sleep(0.05)
        raw.close()
        wait_until(lambda: " 499 " in caplog.text)
        assert client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_many_clients_that_leave_at_once_leave_nothing():
    engine = FakeEngine(delay_s=0.005)
    with open_client(engine) as client:
        sockets = [send(client, "/generate", {"text": "a", "stream": i % 2 == 0}) for i in range(60)]
        wait_until(lambda: len(engine.submitted) > 20)
        for raw in sockets:
            raw.close()
        wait_until(lambda: not list(engine.live_rids()))
        assert client.post("/generate", json={"text": "b"}).json()["text"] == "Hello there."


def test_who_leaves_before_the_body_is_there_is_counted_as_a_request_too(caplog):
    with open_client(FakeEngine()) as client, caplog.at_level(logging.INFO, "jaxserve"):
        raw = socket.create_connection((client.base_url.host, client.base_url.port or 80))
        raw.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        time.sleep(0.05)
        raw.close()
        wait_until(lambda: " 499 " in caplog.text)
        lines = client.get("/metrics").text.splitlines()
    assert 'sglang:http_responses_total{endpoint="generate",method="POST",status_code="499"} 1.0' in lines
    assert 'sglang:http_requests_total{endpoint="generate",method="POST"} 1.0' in lines
