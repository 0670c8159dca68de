"""Keeps an engine process running beside the HTTP process: starts it, hears its end, starts it again.

Used by launch.py on the HTTP side's event loop. An engine that dies while it serves is replaced, and its
open requests fail with the reason; one that dies before it was ever ready ends the launch, since a wrong
flag or a damaged file does not get better by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time

from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Configure, Shutdown
from jaxserve.engine.transport import FrameProtocol, encode_frame
from jaxserve.engine_process import ENGINE_COMMAND, EngineProcess

MAX_RESTARTS = 5  # without a healthy stretch in between
HEALTHY_AFTER_S = 60.0
STOP_GRACE_S = 10.0
PARTING_S = 3.0  # for an engine that is not ready to end the hosts that follow it

logger = logging.getLogger("jaxserve.launch")


class EngineSupervisor:
    """Runs as a task (`run`) until `stop`; when it gave up, `failure` is the reason and `exit_status` 2
    if that is the user's to mend (settings, files), else 1. `first_engine` is a process that was started
    before there was a model or an event loop; those that follow come from `engine_command`, in its
    environment."""

    def __init__(
        self,
        config: ServerConfig,
        model_path: str,
        client: EngineClient,
        engine_command: tuple[str, ...] = ENGINE_COMMAND,
        first_engine: EngineProcess | None = None,
    ):
        self._engine_command = engine_command
        self._environment = first_engine.environment if first_engine is not None else {}
        self._config = config
        self._model_path = model_path
        self.client = client
        self._process: EngineProcess | None = None
        self._is_begun = False  # whether the process has its settings and nobody listens to it yet
        if first_engine is not None:
            self._begin(first_engine)
        self._protocol: FrameProtocol | None = None
        self._is_stopping = False
        self.failure: str | None = None
        self.exit_status = 1

    async def run(self) -> None:
        """Start the engine, and again whenever it dies; returns when stopped or when it gave up."""
        num_restarts = 0
        while not self._is_stopping:
            was_ready, served_s, reason = await self._run_once()
            if self._is_stopping or self.client.status == "draining":
                return
            if not was_ready and num_restarts == 0:
                self.failure = reason
                return
            num_restarts = 1 if served_s > HEALTHY_AFTER_S else num_restarts + 1
            if num_restarts > MAX_RESTARTS:
                self.failure = f"{reason} It was restarted {MAX_RESTARTS} times in a row."
                return
            logger.error("%s Starting it again.", reason)
            await asyncio.sleep(min(2 ** (num_restarts - 1) / 2, 10))

    async def stop(self) -> None:
        """End the engine: ask, then insist. One that still loads has nothing to finish, but others that wait
        for it if there are several hosts."""
        self._is_stopping = True
        if self._process is None:
            return
        is_ready, leads = self.client.ready_since_s is not None, (self._config.nnodes or 1) > 1
        if self._protocol is not None and (is_ready or leads):
            self._protocol.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_GRACE_S if is_ready else PARTING_S)
                return
        self._process.kill()
        await self._process.wait()

    def kill(self) -> None:
        """End the engine at once."""
        self._is_stopping = True
        if self._process is not None:
            self._process.kill()

    def _begin(self, process: EngineProcess) -> None:
        """Give a process its settings, so that it loads; one that is dead already is noticed later."""
        self._process = process
        self._is_begun = True
        with contextlib.suppress(OSError):
            process.connection.sendall(encode_frame(self._configure()))

    def _configure(self) -> Configure:
        """The settings, and the weights that were served last."""
        update = self.client.weights
        if update is None:
            return Configure(self._config, self._model_path, self.client.dp_rank)
        config = dataclasses.replace(self._config, load_format=update.load_format)
        return Configure(config, update.model_path, self.client.dp_rank)

    async def _run_once(self) -> tuple[bool, float, str]:
        """One life of the engine: whether it was ever ready, for how long, why it ended."""
        loop = asyncio.get_running_loop()
        if not self._is_begun:
            self._begin(EngineProcess(self._engine_command, self._environment))
        process, self._is_begun = self._process, False
        assert process is not None
        lost = asyncio.Event()
        protocol = self._protocol = FrameProtocol(self.client.handle, lost.set)
        self.client.connect(protocol.send)  # before its first words, which may be waiting already
        await loop.create_connection(lambda: protocol, sock=process.connection)
        code = await process.wait()
        self.exit_status = 2 if code == 2 else 1
        await lost.wait()  # so that its last words are read
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        reason = self.client.failure or self.client.sign(f"The engine process {how}.")
        self.client.lose(reason)
        ready_since_s = self.client.ready_since_s
        if ready_since_s is None:
            return False, 0.0, reason
        return True, time.monotonic() - ready_since_s, reason
