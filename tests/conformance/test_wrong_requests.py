"""HTTP that no library sends: each request is answered, and none is logged as a failure of ours."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.fakes import FakeEngine, open_client

BODY = json.dumps({"text": "a"}).encode()
CHUNKED = b"transfer-encoding: chunked\r\n"


def make_request(head: bytes = b"", line: bytes = b"POST /generate HTTP/1.1", body: bytes = BODY) -> bytes:
    length = b"" if b"transfer-encoding" in head else b"content-length: %d\r\n" % len(body)
    return line + b"\r\nhost: x\r\ncontent-type: application/json\r\n" + length + head + b"\r\n" + body


def make_last(head: bytes = b"", line: bytes = b"POST /generate HTTP/1.1", body: bytes = BODY) -> bytes:
    """After its answer the server closes the connection."""
    return make_request(b"connection: close\r\n" + head, line, body)


WRONG: dict[str, tuple[bytes, int]] = {
    "a head of 20 kB": (make_last(b"x: " + b"a" * 20_000 + b"\r\n"), 413),
    "two lengths": (make_last(b"content-length: 3\r\n"), 400),
    "a negative length": (b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
    "a length in words": (b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: ten\r\n\r\n", 400),
    "a length beyond all bounds": (
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % 10**30,
        413,
    ),
    "a length and chunks": (make_last(b"content-length: 9\r\n" + CHUNKED, body=b"0\r\n\r\n"), 400),
    "chunks of no size": (make_last(CHUNKED, body=b"zz\r\nabc\r\n"), 400),
    "no body": (make_last(body=b""), 400),
    "a line that is no header": (make_last(b"no header\r\n"), 400),
    "another expectation": (make_last(b"expect: 200-ok\r\n"), 417),
    "HTTP/2 without asking": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "an unknown method": (make_last(line=b"BREW /generate HTTP/1.1"), 405),
    "a proxy's method": (make_last(line=b"CONNECT example.com:443 HTTP/1.1"), 400),
    "a URL without a slash": (make_last(line=b"GET example.com:443 HTTP/1.1"), 400),
    "a URL in UTF-8": (make_last(line="GET /ö HTTP/1.1".encode()), 400),
    "a URL with a line break": (make_last(line=b"GET /a%0d%0aERROR%20forged HTTP/1.1"), 404),
    "a path that climbs": (make_last(line=b"GET /v1/models/../../etc HTTP/1.1"), 404),
    "a form": (make_last(b"content-type: multipart/form-data\r\n", body=b"----"), 400),
    "a query in no encoding": (make_last(line=b"GET /flush_cache?timeout=%ff HTTP/1.1"), 400),
}
RIGHT: dict[str, bytes] = {
    "chunks": make_last(CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a wait for 100": make_last(b"expect: 100-continue\r\n"),
    "HTTP/1.0": make_last(line=b"POST /generate HTTP/1.0"),
    "an absolute URL": make_last(line=b"POST http://x/generate HTTP/1.1"),
    "an id of odd bytes": make_last(b"x-request-id: \xff\x01\r\n"),
    "a long id": make_last(b"x-request-id: " + b"a" * 300 + b"\r\n"),
    "an OPTIONS with a body": make_last(line=b"OPTIONS /generate HTTP/1.1"),
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with open_client(FakeEngine()) as client:
        yield client


def read_answer(client: httpx.Client, request: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as raw:
        raw.sendall(request)
        received = b""
        while chunk := raw.recv(65536):
            received += chunk
    return received


def split_answer(answer: bytes) -> tuple[int, bytes]:
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer
    assert b"x-request-id: " in head.lower()
    return int(head[9:12]), body


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_get_a_sentence(client, name, caplog):
    request, want = WRONG[name]
    with caplog.at_level(logging.INFO):
        status, content = split_answer(read_answer(client, request))
    assert status == want, content
    body = json.loads(content)
    assert body["code"] == status
    assert body["message"].endswith(".")
    assert not body["message"].endswith("..")
    check_log(caplog)
    assert client.post("/generate", json={"text": "a"}).json()["text"] == "Hello there."


def test_a_head_that_cannot_be_read_is_not_told_that_it_lacks_the_key():
    key = b"authorization: Bearer key\r\n"
    with open_client(FakeEngine(), api_key="key") as guarded:
        for name in (
            "a head of 20 kB",
            "a negative length",
            "a line that is no header",
            "HTTP/2 without asking",
        ):
            request, want = WRONG[name]
            status, _ = split_answer(read_answer(guarded, request.replace(b"\r\n", b"\r\n" + key, 1)))
            assert status == want, name
        for path in (b"/generate", b"/nowhere"):
            status, _ = split_answer(read_answer(guarded, make_last(line=b"POST %s HTTP/1.1" % path)))
            assert status == 401, path


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_requests_are_served(client, name, caplog):
    with caplog.at_level(logging.INFO):
        status, content = split_answer(read_answer(client, RIGHT[name]))
    if name.startswith("an OPTIONS"):
        assert status == 204
    else:
        assert (status, json.loads(content)["text"]) == (200, "Hello there.")
    check_log(caplog)


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_requests_in_one_packet_are_answered_in_their_order(client):
    texts = ("a", "b", "c")
    bodies = [json.dumps({"text": text, "rid": text}).encode() for text in texts]
    requests = [make_request(body=bodies[0]), make_request(body=bodies[1]), make_last(body=bodies[2])]
    answer = read_answer(client, b"".join(requests))
    places = [answer.index(f'"id":"{text}"'.encode()) for text in texts]
    assert places == sorted(places)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
