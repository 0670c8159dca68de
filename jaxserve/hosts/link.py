"""One TCP connection between the leader and a follower: frames, proofs, heartbeats, and its end, once.

The frames are those of engine/transport.py. Until both sides have proved that they know the token, frames
are small and must come soon. Then a thread reads and another sends a heartbeat every second: a peer that is
silent for SILENCE_S is as lost as one whose connection is closed, so nobody waits for ever. Knows nothing of
what the messages mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from jaxserve.engine.transport import LENGTH_BYTES, encode_frame
from jaxserve.hosts.messages import Beat

BEAT_S = 1.0
SILENCE_S = 20.0  # without a word, and the peer is lost; a busy Python may well be late by seconds
HANDSHAKE_S = 10.0  # for each message of a peer that has proved nothing
MAX_HANDSHAKE_BYTES = 1 << 16
NONCE_BYTES = 32


class LinkLostError(Exception):
    """The connection is closed, silent or speaks nonsense; the message says which."""


def make_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def prove(token: str | None, role: str, own_nonce: bytes, their_nonce: bytes) -> bytes:
    """What only somebody who knows the token can say to their nonce; of no use for another connection."""
    return hmac.digest((token or "").encode(), b"|".join([role.encode(), their_nonce, own_nonce]), "sha256")


def is_proof(proof: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(proof, expected)


def digest_of(*things: object) -> str:
    """A short name for values that print the same on every host exactly if they are the same."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


class PeerLink:
    """`send` may be called from any thread. Before `listen`, `receive` waits for a message; from then on they
    go to `handle`, on a thread, and `on_lost` is called with the reason, once, unless `close` came first."""

    def __init__(self, connection: socket.socket, message_types: Any):
        connection.settimeout(HANDSHAKE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(message_types)
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self.max_bytes = MAX_HANDSHAKE_BYTES

    def send(self, message: Any) -> None:
        """Raises LinkLostError."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """The same, of a message that is encoded already."""
        try:
            with self._lock:
                self._connection.sendall(frame)
        except OSError as error:
            raise LinkLostError(f"the connection broke ({error})") from error

    def receive(self, timeout_s: float = HANDSHAKE_S) -> Any:
        """The next message; heartbeats are none. Raises LinkLostError."""
        while True:
            message = self._receive(timeout_s)
            if not isinstance(message, Beat):
                return message

    def _receive(self, timeout_s: float) -> Any:
        length = int.from_bytes(self._read(LENGTH_BYTES, timeout_s), "big")
        if length > self.max_bytes:
            raise LinkLostError(f"it sent a message of {length} bytes")
        try:
            return self._decoder.decode(self._read(length, timeout_s))
        except msgspec.MsgspecError as error:
            raise LinkLostError(f"it sent what nobody can read ({error})") from error

    def _read(self, num_bytes: int, timeout_s: float) -> bytearray:
        data = bytearray(num_bytes)
        view, num_read = memoryview(data), 0
        while num_read < num_bytes:
            try:
                self._connection.settimeout(timeout_s)
                got = self._connection.recv_into(view[num_read:])
            except TimeoutError as error:
                raise LinkLostError(f"nothing came for {timeout_s:g} s") from error
            except OSError as error:
                raise LinkLostError(f"the connection broke ({error})") from error
            if not got:
                raise LinkLostError("the connection was closed")
            num_read += got
        return data

    def begin_beats(self) -> None:
        """Say every second that we live, from now on."""
        self.max_bytes = 1 << 31
        threading.Thread(target=self._beat_forever, name="jaxserve-beats", daemon=True).start()

    def listen(self, handle: Callable[[Any], None], on_lost: Callable[[str], None]) -> None:
        threading.Thread(
            target=self._listen_forever, args=(handle, on_lost), name="jaxserve-host", daemon=True
        ).start()

    def close(self) -> None:
        """End the connection; `on_lost` is not called for it."""
        self._is_closed.set()
        with contextlib.suppress(OSError):  # the other side was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat_forever(self) -> None:
        try:
            while not self._is_closed.wait(BEAT_S):
                self.send(Beat())
        except LinkLostError:
            return  # the reader notices as well

    def _listen_forever(self, handle: Callable[[Any], None], on_lost: Callable[[str], None]) -> None:
        try:
            while True:
                handle(self.receive(SILENCE_S))
        except LinkLostError as error:
            if not self._is_closed.is_set():
                on_lost(str(error))
