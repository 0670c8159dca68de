"""Two hosts that share a model, as two people would start them, on one machine: CPU devices and gloo."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from jaxserve.config import ServerConfig
from jaxserve.convert import convert
from jaxserve.utils import find_free_port
from tests.goldens.read import GOLDENS_DIR, read_tiny_goldens, read_vl_facts
from tests.tiny import write_tiny_checkpoint
from tests.tiny_vl import write_tiny_vl_checkpoint
from tests.vision.pictures import make_data_url

pytestmark = pytest.mark.slow

READY_S = 300
NOTICED_S = 15  # until a lost host is told; it takes one or two seconds


def find_two_ports() -> int:
    """The first of two free ones, below those that the system gives to connections."""
    for port in range(21000 + os.getpid() % 1000 * 10, 32000, 2):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two ports are free")


class TwoHosts:
    """Host 0 and host 1, each `jaxserve launch` with the same flags but its rank."""

    def __init__(self, folder: Path, model_path: Path, *flags: str):
        port = find_free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "host0.log"
        self.model_path = str(model_path)
        self._flags = (
            *("--model-path", self.model_path, "--dtype", "float32", "--page-size", "8"),
            *("--max-total-tokens", "1024", "--max-running-requests", "2", "--chunked-prefill-size", "16"),
            *("--compilation-cache-dir", str(folder / "programs"), *flags),
            *("--nnodes", "2", "--tp-size", "4", "--dist-token", "secret", "--port", str(port)),
            *("--served-model-name", "m"),
            *("--dist-init-addr", f"127.0.0.1:{find_two_ports()}", "--dist-timeout", "120"),
        )
        self.processes = [self.start(rank) for rank in (0, 1)]

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        with open(self._log.with_name(f"host{rank}.log"), "wb") as log:
            command = [sys.executable, "-m", "jaxserve", "launch", *self._flags, "--node-rank", str(rank)]
            return subprocess.Popen(command, stderr=log, stdout=log)

    def log(self) -> str:
        """What host 0 has printed."""
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            assert [process.poll() for process in self.processes] == [None, None], self.log()
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(self.log())

    def post(self, route: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{self.url}{route}", json=body, timeout=READY_S)

    def generate(self, prompt_ids: list[int], **sampling: Any) -> list[int]:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **sampling}
        answer = self.post("/generate", {"input_ids": prompt_ids, "sampling_params": params})
        assert answer.status_code == 200, answer.text
        return answer.json()["output_ids"]


@contextlib.contextmanager
def start_hosts(hosts: TwoHosts, *, is_ready: bool = True) -> Iterator[TwoHosts]:
    try:
        if is_ready:
            hosts.wait_until_ready()
        yield hosts
    finally:
        for process in hosts.processes:
            process.terminate()
        for process in hosts.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    """They serve a converted model: each reads the chunks of its own devices."""
    folder = tmp_path_factory.mktemp("hosts")
    model_path = folder / "converted"
    original = write_tiny_checkpoint(folder / "model", "qwen2")
    convert(ServerConfig(model_path=str(original), log_level="error"), model_path)
    flags = ("--tokenizer-path", "bytes", "--num-continuous-decode-steps", "4")
    with start_hosts(TwoHosts(folder, model_path, *flags)) as hosts:
        yield hosts


GOLDENS = read_tiny_goldens("qwen2")


def test_they_give_the_tokens_of_one(hosts):
    """Prompts of one chunk and of many. A bias reaches ids of either host's part of the vocabulary."""
    for golden in GOLDENS.values():
        assert hosts.generate(golden.prompt_ids) == golden.greedy_ids[:12]
    for token_id in (5, 306):
        assert hosts.generate([1, 2, 3], logit_bias={str(token_id): 1e9}) == [token_id] * 12


def test_memory_and_weights_come_and_go_on_all(hosts, tmp_path):
    golden = GOLDENS[33]
    write_tiny_checkpoint(tmp_path, "qwen2", seed=1)
    for level in (1, 2):
        assert hosts.post("/sleep", {"model_id": "m", "master_status": level}).status_code == 200
        assert hosts.post("/wakeup", {"model_id": "m"}).status_code == 200
        assert hosts.generate(golden.prompt_ids) == golden.greedy_ids[:12]
    update = hosts.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert update.json()["success"], update.text
    assert hosts.generate(golden.prompt_ids) != golden.greedy_ids[:12]
    missing = hosts.post("/update_weights_from_disk", {"model_path": str(tmp_path / "missing")})
    assert missing.status_code == 400
    update = hosts.post("/update_weights_from_disk", {"model_path": hosts.model_path})
    assert update.json()["success"], update.text
    assert hosts.generate(golden.prompt_ids) == golden.greedy_ids[:12]


def test_a_host_that_dies_is_told_at_once_and_comes_back(hosts):
    answers: list[tuple[float, requests.Response]] = []

    def ask() -> None:
        params = {"max_new_tokens": 200, "ignore_eos": True}
        answer = hosts.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": params})
        answers.append((time.monotonic(), answer))

    asking = threading.Thread(target=ask)
    asking.start()
    while not re.search(r"num_running_reqs\{.*\} 1", requests.get(f"{hosts.url}/metrics", timeout=30).text):
        time.sleep(0.01)
    follower = hosts.processes[1].pid
    (worker,) = Path(f"/proc/{follower}/task/{follower}/children").read_text().split()
    killed_s = time.monotonic()
    os.kill(int(worker), signal.SIGKILL)
    asking.join(NOTICED_S)
    ((answered_s, answer),) = answers
    assert answered_s - killed_s < NOTICED_S
    assert answer.status_code == 503
    assert answer.json()["message"].startswith("Host 1 (127.0.0.1) was lost: ")
    hosts.wait_until_ready()
    assert hosts.generate(GOLDENS[33].prompt_ids) == GOLDENS[33].greedy_ids[:12]


def test_ctrl_c_on_a_follower_is_told_and_host_0_ends_all(hosts):
    leader, follower = hosts.processes
    follower.send_signal(signal.SIGINT)
    assert follower.wait(NOTICED_S) == 0
    deadline_s = time.monotonic() + NOTICED_S
    while "was lost: it was stopped" not in hosts.log():
        assert time.monotonic() < deadline_s, hosts.log()
        time.sleep(0.1)
    hosts.processes[1] = hosts.start(1)
    hosts.wait_until_ready()
    leader.send_signal(signal.SIGINT)
    assert [process.wait(60) for process in hosts.processes] == [0, 0]


def test_ctrl_c_on_host_0_ends_all_while_they_start(tmp_path):
    model_path = write_tiny_checkpoint(tmp_path / "model", "qwen2")
    with start_hosts(TwoHosts(tmp_path, model_path, "--tokenizer-path", "bytes"), is_ready=False) as hosts:
        while "Load weight begin" not in hosts.log():
            time.sleep(0.1)
        hosts.processes[0].send_signal(signal.SIGINT)
        assert [process.wait(60) for process in hosts.processes] == [0, 0]


def test_they_see_what_one_would_see(tmp_path):
    golden = read_vl_facts()["chat"]
    model_path = write_tiny_vl_checkpoint(tmp_path / "model")
    url = make_data_url((GOLDENS_DIR / "picture.png").read_bytes())
    sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
    body = {"text": golden["rendered"], "image_data": url, "sampling_params": sampling}
    with start_hosts(TwoHosts(tmp_path, model_path, "--max-image-pixels", "50176")) as hosts:
        answer = hosts.post("/generate", body)
    assert answer.json()["output_ids"] == golden["greedy_ids"], answer.text
