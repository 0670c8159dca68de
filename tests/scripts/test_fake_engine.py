"""The engine that computes nothing: it keeps the real one's protocol, and replies repeat their prompts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from jaxserve.engine.messages import Abort, Answer, Call, FlushCache, FromEngine, Shutdown, StepOutput, Submit
from jaxserve.engine.transport import LENGTH_BYTES, SocketLink, encode_frame
from jaxserve.types import TokenDelta, TokenParams
from scripts.fake_engine import FakeEngine


class Peer:
    """The HTTP side's end of the socket."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def send(self, message: object) -> None:
        self._connection.sendall(encode_frame(message))

    def submit(self, rid: str, prompt_ids: list[int], num_tokens: int) -> None:
        self.send(Submit(rid, prompt_ids, TokenParams(max_new_tokens=num_tokens)))

    def receive(self) -> FromEngine:
        length = int.from_bytes(self._stream.read(LENGTH_BYTES), "big")
        return self._decoder.decode(self._stream.read(length))

    def steps(self) -> Iterator[StepOutput]:
        """Steps with something new."""
        while True:
            message = self.receive()
            if isinstance(message, StepOutput) and message.deltas:
                yield message


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Two rows, two tokens a step."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    engine = FakeEngine(SocketLink(theirs, on_lost=lambda: None), 0.002, 2, 2)
    thread = threading.Thread(target=engine.run_forever)
    thread.start()
    peer = Peer(ours)
    yield peer
    peer.send(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    ours.close()


def test_a_reply_repeats_its_prompt_a_step_at_a_time(peer):
    peer.submit("a", [7, 8, 9], 5)
    deltas: list[TokenDelta] = []
    for step in peer.steps():
        [delta] = step.deltas
        deltas.append(delta)
        if delta.finish is not None:
            break
    assert [delta.token_ids for delta in deltas] == [[7, 8], [9, 7], [8]]
    assert [delta.num_output_tokens for delta in deltas] == [2, 4, 5]
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.kind == "length"
    assert step.stats.num_finished == 1


def test_what_finds_no_row_waits_until_an_abort_frees_one(peer):
    for rid in ("a", "b", "c"):
        peer.submit(rid, [1], 10_000_000)
    steps = peer.steps()
    while (step := next(steps)).stats.num_queued != 1:
        pass
    assert {delta.rid for delta in step.deltas} == {"a", "b"}
    peer.send(Abort("a"))
    seen: list[TokenDelta] = []
    while not any(delta.rid == "c" for delta in seen):
        seen += next(steps).deltas
    ends = [delta.finish.kind for delta in seen if delta.finish is not None and delta.rid == "a"]
    assert ends == ["abort"]


def test_an_operation_is_answered(peer):
    peer.send(Call(3, FlushCache()))
    while not isinstance(message := peer.receive(), Answer):
        pass
    assert (message.call_id, message.ok) == (3, False)
