"""A host that follows: finds host 0, builds the same runner, and does with it what host 0 says, in order.

Made by follower_main.py before JAX is used; a `Follower` is the `hosts` of its runner's programs. It plans
nothing and reads no results: its devices take part in each step. Whatever ends the connection ends the
process, since a program that has begun may wait for the others for ever. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxserve import __version__
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError, JaxserveError, UnavailableError
from jaxserve.hosts.cluster import join_cluster
from jaxserve.hosts.link import SILENCE_S, LinkLostError, PeerLink, is_proof, make_nonce, prove
from jaxserve.hosts.messages import (
    Challenge,
    Compiled,
    Done,
    Failed,
    Goodbye,
    Hardware,
    Hello,
    InstallUpdate,
    Introduction,
    Loaded,
    ReadUpdate,
    Refused,
    Rehearse,
    Release,
    Step,
    Take,
    ToFollower,
    Welcome,
)
from jaxserve.hosts.seat import read_address
from jaxserve.runner.runner import ModelRunner, Update
from jaxserve.runner.sizing import Machine

RETRY_S = 0.5  # between two attempts to reach host 0
CONNECT_S = 5.0
CAUSE_S = 1.0  # in which another host's end is noticed, when something went wrong here

# Of what the runner is told to do.
FAILURES = (JaxserveError, RuntimeError, ValueError, LookupError, MemoryError, OSError)

logger = logging.getLogger("jaxserve.hosts")


class Follower:
    """`on_end` is called on a thread, with a sentence and whether the service has ended for good; it ends the
    process."""

    def __init__(self, config: ServerConfig, facts: dict[str, str], on_end: Callable[[str, bool], None]):
        assert config.dist_init_addr is not None, "several hosts without an address"
        self._address = config.dist_init_addr
        self._rank = config.node_rank or 0
        self._num_hosts = config.nnodes or 1
        self._timeout_s = config.dist_timeout
        self._token = config.dist_token
        self._facts = facts
        self._on_end = on_end
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-memory")
        self._update: Update | None = None

    def join(self) -> None:
        """Find host 0, prove who we are, and join jax.distributed with all others.

        Raises UnavailableError if nobody is there in time, ConfigError if we are refused.
        """
        self._link = self._connect()
        welcome = self._introduce()
        # Before JAX, which waits for the others: who is lost then must be noticed.
        self._link.listen(self._handle, lambda reason: self._on_end(f"Host 0 was lost: {reason}", False))
        join_cluster(
            welcome.coordinator, num_hosts=self._num_hosts, rank=self._rank, timeout_s=self._timeout_s
        )
        logger.info("Host %d of %d follows host 0.", self._rank, self._num_hosts)

    def agree_hardware(self, machine: Machine) -> Machine:
        """What all hosts have, the least memory of any."""
        self._link.send(Hardware(machine))
        answer = self._orders.get()
        assert isinstance(answer, Hardware), f"host 0 answers {answer}"
        return answer.machine

    def tell_loaded(self, digest: str) -> None:
        self._link.send(Loaded(digest))

    def admit(self, name: str, use: Callable[[], None]) -> None:
        """Use a program: host 0 names it to us when all can."""
        use()
        self._link.send(Compiled(name, True))

    def miss(self, name: str) -> None:
        self._link.send(Compiled(name, False))

    def run(self, runner: ModelRunner) -> None:
        """Do what host 0 says until the process ends. What goes wrong in a step is raised."""
        while True:
            order = self._orders.get()
            if isinstance(order, Step):
                runner.step_as(order.plan, order.programs)
            elif isinstance(order, Rehearse):
                runner.rehearse_program(order.programs)
            elif isinstance(order, ReadUpdate):
                self._thread.submit(self._answer, lambda order=order: self._read_update(runner, order))
            else:
                self._answer(lambda order=order: self._change(runner, order))

    def leave(self, reason: str) -> None:
        """Tell host 0 that we end, for it to tell why it must."""
        with contextlib.suppress(LinkLostError, AttributeError):
            self._link.send(Goodbye(reason, is_final=False))

    def fail(self, reason: str) -> None:
        """The same for something that went wrong here. If it is because another host has ended, that is told
        first, and ends us."""
        time.sleep(CAUSE_S)
        with contextlib.suppress(LinkLostError):
            self._link.send(Failed(reason))

    def _change(self, runner: ModelRunner, order: Any) -> None:
        if isinstance(order, Release):
            runner.release_memory(order.tags, keeps_weights=order.keeps_weights)
        elif isinstance(order, Take):
            runner.resume_memory(order.tags)
        elif isinstance(order, InstallUpdate):
            assert self._update is not None, "there are no weights to install"
            runner.install_update(self._update)
            self._update = None

    def _read_update(self, runner: ModelRunner, order: ReadUpdate) -> None:
        self._update = None  # one that was read and never installed
        self._update = runner.read_update(order.model_path, order.load_format)

    def _answer(self, work: Callable[[], None]) -> None:
        """Do it, and tell how it went."""
        error = None
        try:
            work()
        except JaxserveError as failure:
            error = failure.message
        except FAILURES as failure:
            logger.exception("An order of host 0 failed.")
            error = str(failure).partition("\n")[0] or repr(failure)
        self._link.send(Done(error))

    def _connect(self) -> PeerLink:
        host, port = read_address(self._address)
        deadline_s = time.monotonic() + self._timeout_s
        reason = ""
        while time.monotonic() < deadline_s:
            try:
                return PeerLink(socket.create_connection((host, port), CONNECT_S), ToFollower)
            except OSError as error:
                if not reason:
                    logger.info("Waiting for host 0 at %s.", self._address)
                reason = error.strerror or str(error)
            threading.Event().wait(RETRY_S)
        raise UnavailableError(
            f"Host 0 did not answer at {self._address} within {self._timeout_s:g} s: {reason}."
        )

    def _introduce(self) -> Welcome:
        """Say who we are, until all hosts are here."""
        link, nonce = self._link, make_nonce()
        try:
            link.send(Hello(self._rank, __version__, nonce))
            challenge = link.receive()
            if isinstance(challenge, Refused):
                raise ConfigError(challenge.reason)
            if not isinstance(challenge, Challenge):
                raise LinkLostError("it did not challenge us")
            if not is_proof(challenge.proof, prove(self._token, "leader", challenge.nonce, nonce)):
                raise ConfigError(f"What answers at {self._address} does not have our dist_token.")
            link.send(Introduction(prove(self._token, "follower", nonce, challenge.nonce), self._facts))
            link.begin_beats()
            welcome = link.receive(SILENCE_S)
        except LinkLostError as error:
            raise UnavailableError(f"Host 0 at {self._address} was lost: {error}.") from error
        if isinstance(welcome, Refused):
            raise ConfigError(welcome.reason)
        if not isinstance(welcome, Welcome):
            raise UnavailableError(f"Host 0 at {self._address} has ended before all hosts were there.")
        return welcome

    def _handle(self, message: Any) -> None:
        if isinstance(message, Goodbye):
            self._on_end(message.reason, message.is_final)
            self._link.close()
        else:
            self._orders.put(message)
