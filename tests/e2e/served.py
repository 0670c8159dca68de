"""Starts `jaxserve launch` as a user does, waits until it is warm, and stops it by its own process group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import requests

from jaxserve.utils import find_free_port

READY_TIMEOUT_S = 300
CHUNK_TOKENS = 64  # of the server that tests share

# The tiny model in float32: a prompt of 4,000 tokens takes 63 steps, and 40 requests run at once.
SHARED_FLAGS = (
    *("--config", "tiny.yaml", "--context-length", "4096", "--max-total-tokens", "16k"),
    *("--chunked-prefill-size", str(CHUNK_TOKENS), "--max-running-requests", "40", "--log-level", "warning"),
)


class Served:
    """A running server: its URL, its process, and what it says of itself."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]):
        self.url = url
        self.process = process

    def info(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/server_info", timeout=30).json()

    def engine_state(self) -> dict[str, Any]:
        return self.info()["internal_states"][0]

    def wait_until(self, key: str, value: Any, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until the engine's state says so."""
        deadline_s = time.monotonic() + timeout_s
        while self.engine_state()[key] != value:
            assert time.monotonic() < deadline_s, f"{key} is {self.engine_state()[key]}, not {value}"
            time.sleep(0.1)


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Served]:
    """A server with these flags, warm: every program is compiled."""
    port = find_free_port("127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxserve", "launch", *flags, "--port", str(port)], start_new_session=True
    )
    served = Served(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_ready(served)
        served.wait_until("is_warm", True)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(served: Served) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert served.process.poll() is None, f"the server ended with status {served.process.returncode}"
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{served.url}/health", timeout=30).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the server did not become ready")
