"""Thousands of bodies that nobody meant to send: each is answered without a 5xx, and the server goes on."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from tests.conformance.mutations import mutate
from tests.conformance.routes import OPERATORS_BODIES, RIGHT_BODIES, known_fields, paths_with_bodies
from tests.fakes import FakeEngine, open_client

NUM_BODIES = 2000
NUM_BODIES_BEFORE_A_REAL_ENGINE = 300
NUM_SENDERS = 12
EXPECTED_STATUSES = {200, 400, 404}
ERROR_KEYS = ["object", "message", "type", "param", "code", "status", "error"]
JARGON = ("Traceback", "NoneType", "msgspec", "<class", " object at 0x", "Expected `")


class Wire:
    """One kept connection. A server that closes it without an answer fails the test."""

    def __init__(self, host: str, port: int):
        self._connection = http.client.HTTPConnection(host, port, timeout=120)

    def post(self, path: str, raw: bytes) -> tuple[int, str, bytes]:
        """Status, content type, body."""
        self._connection.request("POST", path, raw, {"content-type": "application/json"})
        response = self._connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read()

    def close(self) -> None:
        self._connection.close()


def find_fault(status: int, content_type: str, reply: bytes) -> str:
    """What is wrong with an answer to a wrong body; "" if nothing."""
    if status not in EXPECTED_STATUSES:
        return "status"
    if status == 200 or content_type.startswith("text/plain"):
        return ""
    body = json.loads(reply)
    if content_type != "application/json" or list(body)[: len(ERROR_KEYS)] != ERROR_KEYS:
        return "shape"
    if any(body["error"][key] != body[key] for key in ("message", "type", "param")) or body["code"] != status:
        return "halves that contradict each other"
    message = body["message"]
    if not message.endswith((".", "?")) or not message.isprintable() or len(message) > 1000:
        return "message"
    return next((f"jargon: {word}" for word in JARGON if word in message), "")


def send_wrong_bodies(wire: Wire, path: str, right: dict[str, Any], seeds: Iterable[int]) -> None:
    fields = known_fields(path)
    faults = []
    for seed in seeds:
        sent = mutate(Random(f"{path} {seed}"), right, fields)
        status, content_type, reply = wire.post(path, sent)
        fault = find_fault(status, content_type, reply)
        if fault:
            faults.append(f"{fault}: {sent[:500]!r} was answered {status} {reply[:300]!r}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:10]])


def ask_rightly(wire: Wire, path: str) -> Any:
    """What a right body gets, without ids and times."""
    status, _, reply = wire.post(path, json.dumps(RIGHT_BODIES[path]).encode())
    assert status == 200, reply
    if not reply.startswith(b"{"):
        return reply
    body = json.loads(reply)
    return {name: body[name] for name in body.keys() - {"id", "created", "meta_info", "usage"}}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(tokens_per_delta=32)


@pytest.fixture(scope="module")
def wire(engine) -> Iterator[Wire]:
    with open_client(engine, max_sequences=8) as client:
        wire = Wire(client.base_url.host, client.base_url.port or 80)
        yield wire
        wire.close()


def test_every_route_with_a_body_has_a_right_one():
    assert {*RIGHT_BODIES, *OPERATORS_BODIES} == set(paths_with_bodies())


@pytest.mark.parametrize("path", RIGHT_BODIES)
def test_wrong_bodies(wire, path, caplog):
    before = ask_rightly(wire, path)
    with caplog.at_level(logging.INFO, "jaxserve"):
        send_wrong_bodies(wire, path, RIGHT_BODIES[path], range(NUM_BODIES))
    assert ask_rightly(wire, path) == before
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    # Nothing that was sent forges a line of the log, and nothing is logged as our failure.
    assert [line for line in lines if not line.isprintable()] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("path", OPERATORS_BODIES)
def test_wrong_orders(wire, engine, path, caplog):
    """Some of them are right by luck; whatever was ordered can be taken back."""
    before = ask_rightly(wire, "/generate")
    with caplog.at_level(logging.INFO, "jaxserve"):
        send_wrong_bodies(wire, path, OPERATORS_BODIES[path], range(NUM_BODIES))
    for path_back in ("/resume_memory_occupation", "/continue_generation"):
        assert wire.post(path_back, b"{}")[0] == 200
    assert ask_rightly(wire, "/generate") == before
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", RIGHT_BODIES)
def test_wrong_bodies_before_a_real_engine(tiny_server, path):
    """Several clients send them at once, and no neighbour is disturbed (but by an abort_all, which may)."""
    port = int(tiny_server.url.rpartition(":")[2])
    wires = [Wire("127.0.0.1", port) for _ in range(NUM_SENDERS + 1)]
    wire, *senders = wires
    before, neighbour = ask_rightly(wire, path), ask_at_length(wire)
    with ThreadPoolExecutor(NUM_SENDERS) as threads:
        sendings = [
            threads.submit(
                send_wrong_bodies,
                sender,
                path,
                {**RIGHT_BODIES[path], "rid": f"sender-{number}"},
                range(number, NUM_BODIES_BEFORE_A_REAL_ENGINE, NUM_SENDERS),
            )
            for number, sender in enumerate(senders)
        ]
        while not all(sending.done() for sending in sendings):
            assert path == "/abort_request" or ask_at_length(wire) == neighbour
        for sending in sendings:
            sending.result()
    assert ask_rightly(wire, path) == before
    tiny_server.wait_until("num_running_reqs", 0, timeout_s=10)
    tiny_server.wait_until("num_queue_reqs", 0, timeout_s=10)
    for wire in wires:
        wire.close()


def ask_at_length(wire: Wire) -> list[int]:
    """The tokens of a request that runs beside the wrong ones."""
    sampling = {"max_new_tokens": 150, "ignore_eos": True, "sampling_seed": 5}
    body = {"text": "A neighbour", "sampling_params": sampling}
    return json.loads(wire.post("/generate", json.dumps(body).encode())[2])["output_ids"]
