"""`jaxserve launch` on a host that follows: keeps a process that takes part in host 0's steps.

Called by cli.py in place of launch.py where node_rank is not 0. There is no HTTP here. A process that ends
since host 0, or another host, was lost is started again, and waits for host 0 to come back; one that is
refused ends the launch. Imports no jax.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time

from jaxserve.config import ServerConfig
from jaxserve.engine.messages import Configure, Shutdown
from jaxserve.engine.transport import encode_frame
from jaxserve.engine_process import EngineProcess
from jaxserve.launch import find_model, local_model_path
from jaxserve.progress import Progress
from jaxserve.supervise import HEALTHY_AFTER_S, MAX_RESTARTS

FOLLOWER_COMMAND = (sys.executable, "-m", "jaxserve.follower_main")
STOP_GRACE_S = 5.0
ENDED, REFUSED = 0, 2  # exit statuses after which there is nothing to come back for

logger = logging.getLogger("jaxserve.hosts")


def follow(config: ServerConfig, first: EngineProcess) -> int:
    """Take part until the service ends, or SIGTERM or Ctrl-C; the exit status. `first` was started from
    FOLLOWER_COMMAND already. Raises ConfigError or WeightError if there is no such model."""
    try:
        with Progress(config.log_level) as progress:
            files = find_model(config, progress)
        return asyncio.run(_keep_running(Configure(config, local_model_path(files)), first))
    finally:
        first.kill()


async def _keep_running(configure: Configure, process: EngineProcess) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    stop = asyncio.create_task(stopping.wait())
    num_restarts = 0
    while True:
        start_s = time.monotonic()
        with contextlib.suppress(OSError):
            process.connection.sendall(encode_frame(configure))
        ending = asyncio.create_task(process.wait())
        await asyncio.wait((ending, stop), return_when=asyncio.FIRST_COMPLETED)
        if stopping.is_set():
            await _stop(process, ending)
            return 0
        status = ending.result()
        if status in (ENDED, REFUSED):
            return status
        num_restarts = 1 if time.monotonic() - start_s > HEALTHY_AFTER_S else num_restarts + 1
        if num_restarts > MAX_RESTARTS:
            logger.error("The follower ended %d times in a row.", num_restarts)
            return 1
        process = EngineProcess(FOLLOWER_COMMAND)


async def _stop(process: EngineProcess, ending: asyncio.Task[int]) -> None:
    """Let it tell host 0, then insist."""
    with contextlib.suppress(OSError):
        process.connection.sendall(encode_frame(Shutdown()))
    try:
        await asyncio.wait_for(asyncio.shield(ending), STOP_GRACE_S)
    except TimeoutError:
        process.kill()
        await ending
