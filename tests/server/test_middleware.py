"""What happens around every request: bodies in time, ids on every answer, origins, keys, limits."""

from __future__ import annotations

import socket
import time

import pytest

from jaxserve.types import FinishReason
from tests.fakes import FakeEngine, open_client


def send_slowly(client, head: str, *, begin: bytes = b"", path: str = "/generate") -> tuple[str, float]:
    """Send a head and then a byte at a time; the whole answer, and after how long the connection closed."""
    start_s, answer = time.monotonic(), b""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.settimeout(0.05)
        raw.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\n{head}\r\n\r\n".encode() + begin
        )
        while time.monotonic() < start_s + 10:
            try:
                raw.sendall(b"x")
                received = raw.recv(65536)
                if not received:
                    break
                answer += received
            except TimeoutError:
                pass
            except OSError:  # it is closed
                break
    return answer.decode(), time.monotonic() - start_s


@pytest.mark.parametrize(
    ("head", "begin"), [("content-length: 9999", b"{"), ("transfer-encoding: chunked", b"fff\r\n{")]
)
def test_a_body_that_trickles_in_is_given_up_and_its_connection_closed(head, begin):
    with open_client(FakeEngine(), upload_timeout_s=0.3) as client:
        answer, elapsed_s = send_slowly(client, head, begin=begin)
        assert answer.startswith("HTTP/1.1 408 ")
        assert "The request's body did not arrive within 0.3 s." in answer
        assert "x-request-id: slow" in answer.lower()
        assert elapsed_s < 3
        assert client.post("/generate", json={"text": "a"}).status_code == 200


def test_nobody_waits_for_the_body_of_a_request_that_is_refused_anyway(monkeypatch):
    monkeypatch.setattr("jaxserve.server.middleware._MAX_DRAIN_S", 0.2)
    for key, path, status in ((None, "/nothing", 404), ("secret", "/generate", 401)):
        with open_client(FakeEngine(), api_key=key) as client:
            answer, elapsed_s = send_slowly(client, "content-length: 9999", path=path)
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert elapsed_s < 3


def test_every_answer_has_a_request_id():
    failure = FinishReason(kind="abort", message="No.", http_status=503)
    engine = FakeEngine()
    with open_client(engine) as client:
        for headers, expected in (
            ({"x-request-id": "a"}, "a"),
            ({"x-ms-client-request-id": "b"}, "b"),
            ({"trace_id": "c"}, "c"),
            ({"trace_id": "c", "x-request-id": "a"}, "a"),
            ({"x-request-id": "x" * 257, "trace_id": "c"}, "c"),
            ({"x-request-id": "a\tb"}, None),
        ):
            given = client.get("/health", headers=headers).headers["x-request-id"]
            assert given == expected or (expected is None and len(given) == 32)
        headers = {"x-request-id": "mine"}
        stream = {"text": "a", "stream": True}
        answers = [
            client.post("/generate", json=stream, headers=headers),
            client.post("/generate", content=b"{", headers=headers),
            client.post("/nothing", headers=headers),
            client.get("/generate", headers=headers),
            client.options("/generate", headers=headers),
        ]
        engine.fail_after, engine.failure = 1, failure
        answers.append(client.post("/generate", json=stream, headers=headers))
        engine.fail_after = 0
        answers.append(client.post("/generate", json=stream, headers=headers))
        assert [answer.status_code for answer in answers] == [200, 400, 404, 405, 204, 200, 503]
        assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            raw.sendall(b"NONSENSE\r\n\r\n")
            assert b"x-request-id: " in raw.recv(65536).lower()


@pytest.mark.parametrize(
    ("allowed", "origin", "answer"),
    [
        (("*",), "https://a.example", "*"),
        (("https://a.example",), "https://a.example", "https://a.example"),
        (("https://a.example",), "https://b.example", None),
        ((), "https://a.example", None),
    ],
)
def test_web_pages_of_allowed_origins_may_call(allowed, origin, answer):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    with open_client(FakeEngine(), allowed_origins=allowed) as client:
        for response in (
            client.options("/generate", headers=headers),
            client.post("/generate", json={"text": "a"}, headers=headers),
            client.post("/generate", json={"text": "a", "stream": True}, headers=headers),
        ):
            assert response.headers.get("access-control-allow-origin") == answer
            assert (response.headers.get("vary") == "origin") == (allowed != ("*",))


@pytest.mark.parametrize(
    ("limits", "body", "sentence"),
    [
        ({"max_n": 2}, {"sampling_params": {"n": 3}}, "n must be at most 2 on this server, got 3."),
        ({"max_prompt_tokens": 3}, {}, "text must have at most 3 tokens on this server, got 4."),
        ({"max_sequences": 2}, {"sampling_params": {"n": 3}}, "at most 2 sequences (prompts x n), got 3."),
        ({}, {"sampling_params": {"stop": ["x"] * 33}}, "stop must be at most 32 strings"),
    ],
)
def test_limits_are_told(limits, body, sentence):
    with open_client(FakeEngine(), **limits) as client:
        assert client.post("/generate", json={"text": "a"}).status_code == 200
        response = client.post("/generate", json={"text": "abcd", **body})
    assert response.status_code == 400
    assert sentence in response.json()["message"]
