"""Host 0's view of the others: lets them in, agrees with them on what to build, and tells them what to run.

Made by engine_main.py before JAX is used; a `Leader` is the `hosts` of its runner's programs, and what its
runner does goes through it (lead_runner.py). A follower that is lost ends the engine at once, with the
reason: a program that has begun would wait for it for ever. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxserve import __version__
from jaxserve.config import ServerConfig
from jaxserve.engine.transport import encode_frame
from jaxserve.errors import ConfigError, JaxserveError, UnavailableError
from jaxserve.hosts.cluster import join_cluster
from jaxserve.hosts.facts import find_difference, join_machines
from jaxserve.hosts.link import LinkLostError, PeerLink, is_proof, make_nonce, prove
from jaxserve.hosts.messages import (
    Challenge,
    Compiled,
    Done,
    Failed,
    Goodbye,
    Hardware,
    Hello,
    Introduction,
    Loaded,
    Refused,
    ToLeader,
    Welcome,
)
from jaxserve.hosts.seat import read_address
from jaxserve.runner.sizing import Machine

ACCEPT_S = 0.2  # between two looks at the clock while hosts are waited for
PARTING_S = 2.0  # for followers to hang up after a goodbye
CAUSE_S = 1.0  # in which a lost follower is noticed, when something went wrong here

# Of what a runner is told to do; its answer is a sentence.
FAILURES = (JaxserveError, RuntimeError, ValueError, LookupError, MemoryError, OSError)

logger = logging.getLogger("jaxserve.hosts")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an order went: here, and by rank what went wrong elsewhere."""

    result: Any
    error: Exception | None
    failures: dict[int, str]
    is_alike: bool  # whether it went well everywhere or nowhere


class Leader:
    """`on_failure` is called with a sentence, on a thread, when a follower is lost after all had come. It
    ends the process: what waits for that follower here waits on."""

    def __init__(self, config: ServerConfig, facts: dict[str, str], on_failure: Callable[[str], None]):
        assert config.dist_init_addr is not None, "several hosts without an address"
        self._host, self._port = read_address(config.dist_init_addr)
        self._num_hosts = config.nnodes or 1
        self._timeout_s = config.dist_timeout
        self._token = config.dist_token
        self._facts = facts
        self._on_failure = on_failure
        self._links: dict[int, PeerLink] = {}  # by rank
        self._addresses: dict[int, str] = {}
        self._changed = threading.Condition()
        self._is_complete = False  # whether all have come, so that a loss is one
        self._is_closing = False
        self._last_refusal = ""
        self._machines: dict[int, Machine] = {}
        self._digests: dict[int, str] = {}
        self._compiled: dict[str, dict[int, bool]] = {}  # by program and rank
        self._answers: dict[int, Done] = {}

    def gather(self, tell: Callable[[str], None]) -> None:
        """Wait for all hosts, then join jax.distributed with them; `tell` who is waited for.

        Raises UnavailableError if some do not come in time, ConfigError for an address that is not ours.
        """
        listener = self._listen()
        deadline_s = time.monotonic() + self._timeout_s
        with listener:
            while missing := self._find_missing():
                words = f"{'hosts' if len(missing) > 1 else 'host'} {', '.join(map(str, missing))}"
                tell(f"Waiting for {words} of {self._num_hosts}")
                if time.monotonic() > deadline_s:
                    raise UnavailableError(
                        f"{words.capitalize()} of {self._num_hosts} did not come to {self._host}:"
                        f"{self._port} within {self._timeout_s:g} s.{self._last_refusal}"
                    )
                self._accept(listener)
        coordinator = f"{f'[{self._host}]' if ':' in self._host else self._host}:{self._port + 1}"
        self.broadcast(Welcome(coordinator))
        join_cluster(coordinator, num_hosts=self._num_hosts, rank=0, timeout_s=self._timeout_s)
        logger.info("All %d hosts are here.", self._num_hosts)

    def agree_hardware(self, machine: Machine) -> Machine:
        """What all hosts have, the least memory of any. Raises ConfigError if they are not alike."""
        self._wait_for(lambda: len(self._machines) == self._num_hosts - 1)
        joined = join_machines({0: machine, **self._machines})
        self.broadcast(Hardware(joined))
        return joined

    def tell_loaded(self, digest: str) -> None:
        """Wait until the others have their weights too, in the same sizes."""
        self._wait_for(lambda: len(self._digests) == self._num_hosts - 1)
        for rank, theirs in self._digests.items():
            if theirs != digest:
                raise ConfigError(f"Host {rank} decided on other sizes than host 0, from the same settings.")

    def admit(self, name: str, use: Callable[[], None]) -> None:
        """Use a program once every host has it."""
        self._wait_for(lambda: len(self._compiled.get(name, {})) == self._num_hosts - 1)
        lacking = [rank for rank, is_ready in self._compiled.get(name, {}).items() if not is_ready]
        if lacking:
            logger.warning("Host %d could not compile the program of %s.", lacking[0], name)
        elif not self._is_closing:
            use()

    def miss(self, name: str) -> None:
        """The others never run what is not named to them."""

    def broadcast(self, message: Any) -> None:
        """Send to every follower, in order. A lost one is told by the thread that reads from it."""
        frame = encode_frame(message)
        for rank, link in list(self._links.items()):
            try:
                link.send_frame(frame)
            except LinkLostError as error:
                self._lose(rank, str(error))

    def order(self, message: Any, work: Callable[[], Any]) -> Outcome:
        """Have all hosts do the same, and wait until all have."""
        self._answers = {}
        self.broadcast(message)
        result, error = None, None
        try:
            result = work()
        except FAILURES as failure:
            error = failure
        self._wait_for(lambda: len(self._answers) == self._num_hosts - 1)
        failures = {rank: answer.error for rank, answer in self._answers.items() if answer.error is not None}
        return Outcome(result, error, failures, is_alike=len(failures) == (self._num_hosts - 1) * bool(error))

    def find_cause(self) -> None:
        """Something went wrong here. If it is because a follower is lost, that is told first, and ends us."""
        time.sleep(CAUSE_S)

    def stop_waiting(self) -> None:
        """Whatever waits for followers here waits no more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def close(self, reason: str, *, is_final: bool) -> None:
        """Tell the followers that this is the end, and let them go first."""
        self.stop_waiting()
        self.broadcast(Goodbye(reason, is_final))
        deadline_s = time.monotonic() + PARTING_S
        with self._changed:
            self._changed.wait_for(lambda: not self._links, deadline_s - time.monotonic())
        for link in list(self._links.values()):
            link.close()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        """Until it is so, or we are closing; a follower that cannot make it so is lost, which ends us."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or is_so())

    def _listen(self) -> socket.socket:
        try:
            family, _, _, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"Host 0 cannot listen on {self._host} port {self._port}: {error.strerror or error}. "
                "--dist-init-addr must be an address of host 0, with two free ports.",
                param="dist_init_addr",
            ) from error
        listener.listen(self._num_hosts)
        listener.settimeout(ACCEPT_S)
        return listener

    def _find_missing(self) -> list[int]:
        """The ranks that are not here; once there is none, a loss is a failure."""
        with self._changed:
            missing = [rank for rank in range(1, self._num_hosts) if rank not in self._links]
            self._is_complete = not missing
            return missing

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except TimeoutError:
            return
        # A thread each: one that says nothing must not keep the others waiting.
        threading.Thread(target=self._greet, args=(connection, address[0]), daemon=True).start()

    def _greet(self, connection: socket.socket, address: str) -> None:
        link = PeerLink(connection, ToLeader)
        try:
            rank = self._check(link)
        except (LinkLostError, ConfigError) as error:
            logger.warning("A host at %s was not let in: %s", address, error)
            link.close()
            return
        link.begin_beats()
        with self._changed:
            self._links[rank], self._addresses[rank] = link, address
        logger.info("Host %d is here, from %s.", rank, address)
        link.listen(lambda message: self._handle(rank, message), lambda reason: self._lose(rank, reason))

    def _check(self, link: PeerLink) -> int:
        """The rank of who has connected. Raises LinkLostError, or ConfigError when it was told why not."""
        hello = link.receive()
        if not isinstance(hello, Hello):
            raise LinkLostError("it did not say who it is")
        if hello.version != __version__:
            raise self._refuse(
                link, f"Host {hello.rank} runs jaxserve {hello.version}, host 0 runs {__version__}."
            )
        nonce = make_nonce()
        link.send(Challenge(nonce, prove(self._token, "leader", nonce, hello.nonce)))
        introduction = link.receive()
        if not isinstance(introduction, Introduction):
            raise LinkLostError("it did not answer the challenge")
        if not is_proof(introduction.proof, prove(self._token, "follower", hello.nonce, nonce)):
            raise self._refuse(link, f"Host {hello.rank} has another dist_token than host 0.")
        difference = find_difference(self._facts, introduction.facts, hello.rank)
        if difference is not None:
            raise self._refuse(link, difference)
        if not 0 < hello.rank < self._num_hosts:
            raise self._refuse(link, f"There is no place for a host {hello.rank} among {self._num_hosts}.")
        if hello.rank in self._links:
            raise self._refuse(link, f"There is a host {hello.rank} already: each needs its own node_rank.")
        return hello.rank

    def _refuse(self, link: PeerLink, reason: str) -> ConfigError:
        self._last_refusal = f" {reason}"
        link.send(Refused(reason))
        return ConfigError(reason)

    def _handle(self, rank: int, message: Any) -> None:
        if isinstance(message, Failed | Goodbye):
            self._lose(rank, message.reason)
        with self._changed:
            if isinstance(message, Compiled):
                self._compiled.setdefault(message.name, {})[rank] = message.is_ready
            elif isinstance(message, Hardware):
                self._machines[rank] = message.machine
            elif isinstance(message, Loaded):
                self._digests[rank] = message.digest
            elif isinstance(message, Done):
                self._answers[rank] = message
            self._changed.notify_all()

    def _lose(self, rank: int, reason: str) -> None:
        with self._changed:
            link = self._links.pop(rank, None)
            self._changed.notify_all()
            is_failure = self._is_complete and not self._is_closing and link is not None
        if link is not None:
            link.close()
        if is_failure:
            self._on_failure(f"Host {rank} ({self._addresses[rank]}) was lost: {reason}.")
        elif link is not None and not self._is_closing:
            logger.warning("Host %d has left again: %s.", rank, reason)
