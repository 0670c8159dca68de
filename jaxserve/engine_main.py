"""The engine process: what `jaxserve launch` starts beside the HTTP process.

Run as `python -m jaxserve.engine_main FD` by supervise.py, with one end of a socket pair as FD. Reads its
settings from the socket, loads the model, serves until told to stop or until the other end is gone. Every
failure is told as a sentence before the process ends.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial

from jaxserve.build import build_engine
from jaxserve.config import ServerConfig
from jaxserve.engine.messages import Configure, Failed, Ready, Starting
from jaxserve.engine.transport import SocketLink
from jaxserve.errors import JaxserveError
from jaxserve.hosts.facts import list_facts
from jaxserve.hosts.leader import FAILURES, Leader
from jaxserve.log import set_up_logging
from jaxserve.progress import Progress
from jaxserve.weights.resolve import ModelFiles, resolve_model

LOST_GRACE_S = 5.0  # to end in order after the HTTP process is gone
PATIENCE_S = 60.0

logger = logging.getLogger("jaxserve.engine")


def main() -> int:
    # Signals belong to the HTTP process, which tells us to stop when its requests are done. It insists with
    # SIGKILL; and when it is gone itself, so are we.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = SocketLink(socket.socket(fileno=int(sys.argv[1])), on_lost=_end_soon)
    messages = []
    while not messages:  # the model may have to be downloaded first
        messages = link.receive(PATIENCE_S)
    configure = messages[0]
    if not isinstance(configure, Configure):
        return 1
    rank = configure.dp_rank
    set_up_logging(configure.config.log_level, process_name="" if rank is None else f"dp_rank {rank} ")
    try:
        serve(configure, link)
    except JaxserveError as error:
        link.send(Failed(error.message))
        os._exit(2)  # at once: a compile that is under way cannot be stopped
    except (RuntimeError, ValueError, LookupError, MemoryError, OSError, AssertionError) as error:
        logger.exception("The engine failed.")
        first_line = str(error).partition("\n")[0]
        link.send(
            Failed(f"The engine failed: {type(error).__name__}{': ' if first_line else ''}{first_line}")
        )
        os._exit(1)
    return 0


def serve(configure: Configure, link: SocketLink) -> None:
    """Load, tell that we are ready, and run until shut down."""
    config = configure.config

    def tell(stage: str, done: float, total: float | None, unit: str) -> None:
        progress.update(stage, done, total, unit)
        link.send(Starting(stage, done / total if total else 0.0))

    with Progress(config.log_level) as progress:
        files = resolve_model(
            configure.model_path,
            download_dir=config.download_dir,
            load_format=config.load_format,
            on_progress=lambda stage, done, total: tell(stage, done, total, "B"),
        )
        leader = _make_leader(config, files, link)
        try:
            if leader is not None:
                link.on_shutdown = partial(_stop_hosts, leader)
                leader.gather(lambda words: link.send(Starting(words)))
            loop, runner, info = build_engine(config, files, link, tell, leader)
        except FAILURES as error:
            _end_hosts(leader, error)
            raise
    link.on_shutdown = lambda: None  # the loop sees to it, between two steps
    link.send(Ready(info))
    # What was imported and loaded stays. Looked through at every full collection it would hold a step up by
    # 60 ms, again and again.
    gc.freeze()
    try:
        loop.run_forever()
    except FAILURES as error:
        _end_hosts(leader, error)
        raise
    if leader is not None:
        _stop_hosts(leader)
    runner.close()


def _make_leader(config: ServerConfig, files: ModelFiles, link: SocketLink) -> Leader | None:
    if (config.nnodes or 1) == 1:
        return None

    def end(reason: str) -> None:
        """A host is lost, and a step may wait for it: end at once, and begin again when it is back."""
        logger.error("%s", reason)
        link.send(Failed(reason))
        leader.close(reason.rstrip("."), is_final=False)
        os._exit(1)

    leader = Leader(config, list_facts(config, files), end)
    return leader


def _stop_hosts(leader: Leader) -> None:
    """End them, and us at once: JAX would wait for hosts that are gone."""
    leader.close("Host 0 was stopped", is_final=True)
    os._exit(0)


def _end_hosts(leader: Leader | None, error: Exception) -> None:
    """Tell the others that this host begins again, unless one of them is the cause and tells it first."""
    if leader is not None:
        if not isinstance(error, JaxserveError):
            leader.find_cause()
        first_line = str(error).partition("\n")[0].rstrip(".")
        leader.close(f"Host 0 failed: {first_line}", is_final=False)


def _end_soon() -> None:
    """The HTTP process is gone. If we cannot end in order (a long load, a stuck step), end anyway."""
    timer = threading.Timer(LOST_GRACE_S, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
