"""An engine process and our end of its socket. Started first of all, since it needs seconds to import jax.

Used by cli.py, which imports little, and by supervise.py for the processes that follow the first. Knows
nothing of what is said over the socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping

# Starts an engine process; the file descriptor of its socket is added. Benchmarks have another.
ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.engine_main")


class EngineProcess:
    """A process that waits for its settings on `connection`. It ends by itself when we are gone. What is in
    `environment` it has in place of ours."""

    def __init__(
        self, command: tuple[str, ...] = ENGINE_COMMAND, environment: Mapping[str, str] | None = None
    ):
        self.environment = environment or {}
        self.connection, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C in the terminal reaches only us, and we end it in order.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, **self.environment},
            )

    async def wait(self) -> int:
        """Its exit status once it has ended; negative if by a signal."""
        return await asyncio.to_thread(self._process.wait)

    def kill(self) -> None:
        """End it at once; nothing if it has ended."""
        self._process.kill()
