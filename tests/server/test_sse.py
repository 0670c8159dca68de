"""What a slow stream looks like on the wire."""

from __future__ import annotations

from jaxserve.types import FinishReason
from tests.fakes import FakeEngine, open_client
from tests.server.events import read_events


def test_comments_keep_a_quiet_stream_alive_without_a_token():
    engine = FakeEngine(reply="ab", delay_s=0.25)
    with open_client(engine, keep_alive_s=0.1) as client:
        text = client.post("/generate", json={"text": "x", "stream": True}).text
    before_first, _, rest = text.partition("data: ")
    assert before_first.count(": keep-alive\n\n") == 2
    assert rest.count(": keep-alive\n\n") >= 2
    assert rest.endswith("data: [DONE]\n\n")


def test_a_failure_after_a_comment_is_an_event_because_the_status_is_out():
    failure = FinishReason(kind="abort", message="Too slow.", http_status=503)
    engine = FakeEngine(delay_s=0.15, fail_after=0, failure=failure)
    with open_client(engine, keep_alive_s=0.1) as client:
        response = client.post("/generate", json={"text": "x", "stream": True})
    assert response.status_code == 200
    assert response.text.startswith(": keep-alive")
    assert [event["error"]["message"] for event in read_events(response)] == ["Too slow."]


def test_a_busy_stream_has_no_comments():
    with open_client(FakeEngine(reply="abc", delay_s=0.01), keep_alive_s=0.2) as client:
        text = client.post("/generate", json={"text": "x", "stream": True}).text
    assert "keep-alive" not in text


def test_the_connection_serves_the_next_request_after_a_stream():
    with open_client(FakeEngine()) as client:
        first = client.post("/generate", json={"text": "x", "stream": True})
        second = client.get("/health")
    assert first.headers["connection"] == second.headers["connection"] == "keep-alive"
    assert first.headers["cache-control"] == "no-cache"


def test_a_first_event_that_meets_a_comment_finds_one_head():
    """The first token comes just when the first comment is due."""
    for delay_s in (0.049, 0.05, 0.051):
        with open_client(FakeEngine(reply="ab", delay_s=delay_s), keep_alive_s=0.05) as client:
            response = client.post("/generate", json={"text": "x", "stream": True})
        assert "HTTP/1.1" not in response.text
        assert [event["text"] for event in read_events(response)][-1].startswith("ab")
