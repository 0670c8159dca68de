"""SIGTERM to a real server: open requests end, new ones are told so, and the exit is in order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import requests

from tests.e2e.served import SHARED_FLAGS, Served, serve

LONG = {"text": "Hello", "sampling_params": {"max_new_tokens": 3000, "temperature": 0, "ignore_eos": True}}


def start_long_request(served: Served) -> tuple[threading.Thread, list[requests.Response]]:
    answers: list[requests.Response] = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):  # the server may go in the middle
            answers.append(requests.post(f"{served.url}/generate", json={**LONG, "stream": True}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    served.wait_until("num_running_reqs", 1)
    return thread, answers


def test_sigterm_lets_open_requests_end_and_refuses_new_ones():
    with serve(*SHARED_FLAGS) as served:
        thread, answers = start_long_request(served)
        os.kill(served.process.pid, signal.SIGTERM)
        time.sleep(0.2)
        refused = requests.post(f"{served.url}/generate", json={"text": "late"}, timeout=30)
        assert (refused.status_code, refused.json()["status"]) == (503, "UNAVAILABLE")
        assert "shutting down" in refused.json()["message"]
        assert refused.headers["retry-after"]
        assert requests.get(f"{served.url}/health", timeout=30).status_code == 503
        thread.join(60)
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert '"completion_tokens":3000' in answers[0].text
        assert served.process.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_everything_at_once():
    with serve(*SHARED_FLAGS) as served:
        thread, answers = start_long_request(served)
        os.kill(served.process.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(served.process.pid, signal.SIGTERM)
        assert served.process.wait(5) == 128 + signal.SIGTERM
        thread.join(10)
        assert answers == []
