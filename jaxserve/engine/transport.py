"""The connection between the HTTP side and the engine, in its two forms.

Threads of one process (the library, notebooks, tests): messages are passed as they are. Two processes
(`jaxserve launch`): a local stream socket that carries frames of a length and a msgpack body. The engine's
end is a plain blocking object, the client's end lives on an asyncio loop. Knows the messages' types and
nothing of what they mean.

    frame    length: 4 bytes, big endian | body: msgpack
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec

from jaxserve.engine.messages import FromEngine, Shutdown, ToEngine

LENGTH_BYTES = 4
SEND_BUFFER_BYTES = 4 << 20  # so that a pause of the HTTP side does not stop the step loop


def encode_frame(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Inbox:
    """Messages for the engine, put by any thread and taken by its loop."""

    def __init__(self):
        self._queue: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def put(self, message: ToEngine) -> None:
        self._queue.put(message)

    def take(self, timeout_s: float) -> list[ToEngine]:
        """All that has come; waits at most timeout_s for the first."""
        messages: list[ToEngine] = []
        try:
            messages.append(self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait())
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages


class ThreadLink:
    """The engine's end within one process: what it sends is handled on the client's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[FromEngine], None]):
        self._inbox = Inbox()
        self._loop = loop
        self._handle = handle

    def put(self, message: ToEngine) -> None:
        """The client's way to send; callable from any thread."""
        self._inbox.put(message)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        return self._inbox.take(timeout_s)

    def send(self, message: FromEngine) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._handle, message)


class SocketLink:
    """The engine's end between processes. A closed connection reads as Shutdown, after `on_lost`:
    without a client process there is nobody to serve. `on_shutdown` hears of one that is sent at once, on a
    thread, whatever the engine is busy with."""

    def __init__(self, connection: socket.socket, on_lost: Callable[[], None]):
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._connection = connection
        self._on_lost = on_lost
        self.on_shutdown: Callable[[], None] = lambda: None
        self._inbox = Inbox()
        self._lock = threading.Lock()  # an engine of several hosts may end from another thread
        self._reader = threading.Thread(target=self._read_forever, name="jaxserve-inbox", daemon=True)
        self._reader.start()

    def receive(self, timeout_s: float) -> list[ToEngine]:
        return self._inbox.take(timeout_s)

    def send(self, message: FromEngine) -> None:
        try:
            with self._lock:
                self._connection.sendall(encode_frame(message))
        except OSError:
            self._inbox.put(Shutdown())

    def _read_forever(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        with self._connection.makefile("rb") as stream:
            while True:
                try:
                    header = stream.read(LENGTH_BYTES)
                    length = int.from_bytes(header, "big")
                    body = stream.read(length)
                except OSError:
                    break
                if len(header) < LENGTH_BYTES or len(body) < length:
                    break
                message = decoder.decode(body)
                if isinstance(message, Shutdown):
                    self.on_shutdown()
                self._inbox.put(message)
        self._on_lost()
        self._inbox.put(Shutdown())


class FrameProtocol(asyncio.Protocol):
    """The client's end between processes: cuts the stream into messages for `handle`."""

    def __init__(self, handle: Callable[[FromEngine], None], on_lost: Callable[[], None]):
        self._handle = handle
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one in all but its class

    def send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
            end = start + LENGTH_BYTES + length
            if len(buffer) < end:
                break
            message = self._decoder.decode(memoryview(buffer)[start + LENGTH_BYTES : end])
            start = end
            self._handle(message)
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
