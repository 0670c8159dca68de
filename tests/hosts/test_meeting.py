"""How hosts meet, agree and part: both sides in this process, over loopback, without JAX's own."""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve import __version__
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError, UnavailableError, WeightError
from jaxserve.hosts import follower as follower_module
from jaxserve.hosts import leader as leader_module
from jaxserve.hosts import link as link_module
from jaxserve.hosts.follower import Follower
from jaxserve.hosts.lead_runner import LeadRunner
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.link import PeerLink
from jaxserve.hosts.messages import Challenge, Hello, Introduction, Refused, Step, ToFollower
from jaxserve.runner.buckets import Shape
from jaxserve.runner.memory import LostWeightsError
from jaxserve.runner.runner import StepPrograms
from jaxserve.runner.sizing import Machine
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit, StepPlan
from jaxserve.types import TokenParams
from jaxserve.utils import find_free_port

MACHINE = Machine(platform="tpu", num_devices=8, memory_bytes=1600, free_bytes=1500, device_kind="TPU v5e")
FACTS = {"tp_size": "8", "jax": "1.0"}
TIMEOUT_S = 20.0


class Meeting:
    """A leader that waits, on a thread, for `num_hosts` - 1 followers."""

    def __init__(self, num_hosts: int = 2, dist_timeout: float = TIMEOUT_S):
        self.address = ("127.0.0.1", find_free_port("127.0.0.1"))
        self.config = ServerConfig(
            model_path="m",
            nnodes=num_hosts,
            node_rank=0,
            tp_size=num_hosts,
            dist_init_addr=f"127.0.0.1:{self.address[1]}",
            dist_timeout=dist_timeout,
            dist_token="secret",
        )
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self.told: list[str] = []
        self.leader = Leader(self.config, FACTS, self.failures.put)
        self.gathering = Call(lambda: self.leader.gather(self.told.append))

    def follow(self, rank: int = 1, facts: dict[str, str] = FACTS, **changes: Any) -> Follower:
        """A follower that has joined. Raises what it raises."""
        config = dataclasses.replace(self.config, node_rank=rank, **changes)
        follower = Follower(config, facts, lambda reason, is_final: self.ends.put((reason, is_final)))
        follower.join()
        return follower

    def connect(self) -> socket.socket:
        """A stranger."""
        while True:
            try:
                return socket.create_connection(self.address)
            except ConnectionRefusedError:
                time.sleep(0.01)


class Call:
    """A function that runs on a thread."""

    def __init__(self, work: Callable[[], Any]):
        self._outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                self._outcome.put((work(), None))
            except (UnavailableError, ConfigError, WeightError, LostWeightsError) as error:
                self._outcome.put((None, error))

        threading.Thread(target=run, daemon=True).start()

    def result(self) -> Any:
        value, error = self._outcome.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        return value


@pytest.fixture(autouse=True)
def joined(monkeypatch) -> list[int]:
    """The ranks that came as far as jax.distributed."""
    ranks: list[int] = []
    for module in (leader_module, follower_module):
        monkeypatch.setattr(module, "join_cluster", lambda _address, *, rank, **_: ranks.append(rank))
    return ranks


def test_hosts_that_are_alike_join_and_plan_for_the_least_memory(joined):
    meeting = Meeting(num_hosts=3)
    calls = [Call(lambda rank=rank: meeting.follow(rank)) for rank in (1, 2)]
    followers = [call.result() for call in calls]
    meeting.gathering.result()
    assert sorted(joined) == [0, 1, 2]
    assert meeting.told[0] == "Waiting for hosts 1, 2 of 3"
    small = dataclasses.replace(MACHINE, free_bytes=900)
    answers = [
        Call(lambda follower=follower, machine=machine: follower.agree_hardware(machine))
        for follower, machine in zip(followers, (MACHINE, small), strict=True)
    ]
    assert meeting.leader.agree_hardware(MACHINE) == small
    assert [answer.result() for answer in answers] == [small, small]
    meeting.leader.close("over", is_final=True)
    assert [meeting.ends.get(timeout=TIMEOUT_S) for _ in followers] == [("over", True)] * 2
    assert meeting.failures.empty()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"facts": {**FACTS, "tp_size": "4"}}, "Host 1 .*: tp_size is 4 there and 8 on host 0"),
        ({"dist_token": "guess"}, "does not have our dist_token"),
        ({"rank": 5}, "There is no place for a host 5"),
    ],
)
def test_who_does_not_belong_is_told_why_and_the_others_go_on(changes, sentence):
    meeting = Meeting()
    with pytest.raises(ConfigError, match=sentence):
        meeting.follow(**changes)
    meeting.follow()
    meeting.gathering.result()


def test_a_follower_of_another_version_is_refused(monkeypatch):
    meeting = Meeting(dist_timeout=1.0)
    monkeypatch.setattr(follower_module, "__version__", "0.0.9")
    with pytest.raises(ConfigError, match=r"Host 1 runs jaxserve 0.0.9, host 0 runs"):
        meeting.follow()
    with pytest.raises(
        UnavailableError, match=r"Host 1 of 2 did not come .* within 1 s. Host 1 runs jaxserve"
    ):
        meeting.gathering.result()


def test_strangers_get_nothing_and_keep_nobody_waiting():
    """One says nothing, one speaks HTTP, one claims 2 GB, one does not know the token."""
    meeting = Meeting()
    strangers = [meeting.connect() for _ in range(4)]
    strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[2].sendall(b"\x7f\xff\xff\xff")
    link = PeerLink(strangers[3], ToFollower)
    link.send(Hello(1, __version__, b"nonce"))
    assert isinstance(link.receive(), Challenge)
    link.send(Introduction(b"guess", FACTS))
    assert link.receive() == Refused("Host 1 has another dist_token than host 0.")
    meeting.follow()
    meeting.gathering.result()
    for stranger in strangers[1:3]:
        stranger.settimeout(TIMEOUT_S)
        assert stranger.recv(100) == b""
    with pytest.raises(ConnectionRefusedError):  # all are here: the door is shut
        socket.create_connection(meeting.address)


def test_nobody_waits_for_a_leader_that_is_not_there():
    config = ServerConfig(
        model_path="m", nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:1", dist_timeout=1.0
    )
    with pytest.raises(UnavailableError, match=r"Host 0 did not answer at 127.0.0.1:1 within 1 s: .*refused"):
        Follower(config, FACTS, lambda *_: None).join()


def test_a_follower_that_goes_is_told_with_its_reason():
    meeting = Meeting()
    follower = meeting.follow()
    meeting.gathering.result()
    follower.leave("it was stopped")
    assert meeting.failures.get(timeout=TIMEOUT_S) == "Host 1 (127.0.0.1) was lost: it was stopped."


def test_a_host_that_falls_silent_is_lost(monkeypatch):
    """Its connection stays open, as where the power fails."""
    monkeypatch.setattr(link_module, "BEAT_S", 60.0)
    monkeypatch.setattr(link_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(follower_module, "SILENCE_S", 0.5)
    meeting = Meeting()
    meeting.follow()
    meeting.gathering.result()
    assert meeting.failures.get(timeout=TIMEOUT_S).endswith("was lost: nothing came for 0.5 s.")


def test_a_program_is_used_once_every_host_has_it():
    meeting = Meeting()
    follower = meeting.follow()
    meeting.gathering.result()
    used: list[str] = []
    waiting = Call(lambda: meeting.leader.admit("a", lambda: used.append("a")))
    follower.miss("b")
    meeting.leader.admit("b", lambda: used.append("b"))
    assert used == []
    follower.admit("a", lambda: used.append("a here"))
    waiting.result()
    assert used == ["a here", "a"]


class FakeRunner:
    """Writes down what it is told to do; what it is told to fail at, it fails at."""

    def __init__(self, fails: Exception | None = None):
        self.done: list[Any] = []
        self._fails = fails

    def choose(self, plan: StepPlan) -> StepPrograms:
        return StepPrograms((Shape(1, 0), Shape(0, 16)))

    def step_as(self, plan: StepPlan, chosen: StepPrograms) -> str:
        self.done.append((plan, chosen))
        return "pending"

    def release_memory(self, tags: Any, *, keeps_weights: bool) -> None:
        self._do(("release", tuple(tags), keeps_weights))

    def read_update(self, model_path: str, load_format: str) -> str:
        self._do(("read", model_path, load_format))
        return model_path

    def install_update(self, update: Any) -> None:
        self._do(("install", update))

    def _do(self, what: Any) -> None:
        self.done.append(what)
        if self._fails is not None:
            raise self._fails


def start_followers(runner: Any) -> Meeting:
    meeting = Meeting()
    follower = meeting.follow()
    meeting.gathering.result()
    threading.Thread(target=follower.run, args=(runner,), daemon=True).start()
    return meeting


PLAN = StepPlan(
    7,
    (SlotInit(1, TokenParams(max_new_tokens=3, logit_bias=((5, 1.5),)), [1, 2], [3]),),
    (DecodeRow(0, 1, 2, 33, 4),),
    (PrefillChunk(1, 2, 0, 0, [1, 2], [9], samples=True),),
)


def test_a_follower_does_what_the_leader_does_in_the_same_order_and_programs():
    own, theirs = FakeRunner(), FakeRunner()
    meeting = start_followers(theirs)
    lead: Any = LeadRunner(own, meeting.leader)  # type: ignore[arg-type]
    lead.step(PLAN)
    lead.release_memory(["weights"], keeps_weights=False)
    lead.install_update(lead.read_update("/other", "auto"))
    assert theirs.done == own.done
    assert own.done[0] == (PLAN, StepPrograms((Shape(1, 0), Shape(0, 16))))


def test_weights_that_one_host_cannot_read_are_not_served():
    meeting = start_followers(FakeRunner(fails=WeightError("no such file")))
    lead: Any = LeadRunner(FakeRunner(), meeting.leader)  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="Host 1: no such file"):
        lead.read_update("/other", "auto")


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (None, "no room", LostWeightsError),
        ("no room", None, LostWeightsError),
        ("no room", "no room", UnavailableError),
    ],
)
def test_what_some_hosts_did_and_others_could_not_ends_in_a_new_beginning(own, theirs, expected):
    """Where all failed they still hold the same, and serve on."""
    fakes = [FakeRunner(UnavailableError(reason) if reason else None) for reason in (own, theirs)]
    meeting = start_followers(fakes[1])
    lead: Any = LeadRunner(fakes[0], meeting.leader)  # type: ignore[arg-type]
    with pytest.raises(expected, match="no room"):
        lead.release_memory(["weights"], keeps_weights=True)


def test_a_step_message_is_small():
    """It is sent every step."""
    assert len(link_module.encode_frame(Step(PLAN, StepPrograms((Shape(1, 0),))))) < 1000
