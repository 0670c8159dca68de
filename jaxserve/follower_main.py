"""The process of a host that follows: what `jaxserve launch` starts where node_rank is not 0.

Run as `python -m jaxserve.follower_main FD` by follow.py, with one end of a socket pair as FD. Its exit
status tells what it came to: 0, the service has ended; 2, a mistake of the user's, which is told; anything
else, a host was lost, and it is worth to begin again.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading

from jaxserve.build import build_runner
from jaxserve.config import ServerConfig
from jaxserve.engine.messages import Configure
from jaxserve.engine.transport import SocketLink
from jaxserve.errors import JaxserveError
from jaxserve.hosts.facts import list_facts
from jaxserve.hosts.follower import FAILURES, Follower
from jaxserve.log import set_up_logging
from jaxserve.progress import Progress
from jaxserve.weights.resolve import resolve_model

ENDED, LOST, REFUSED = 0, 1, 2
PATIENCE_S = 60.0

logger = logging.getLogger("jaxserve.hosts")


def main() -> int:
    # Signals belong to the parent, which tells us to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = SocketLink(socket.socket(fileno=int(sys.argv[1])), on_lost=lambda: None)
    messages = []
    while not messages:
        messages = parent.receive(PATIENCE_S)
    configure = messages[0]
    if not isinstance(configure, Configure):
        return LOST
    set_up_logging(configure.config.log_level)
    try:
        follow(configure, parent)
    except JaxserveError as error:
        logger.error("%s", error.message)
        os._exit(REFUSED)
    return LOST


def follow(configure: Configure, parent: SocketLink) -> None:
    """Take part until host 0 or our parent ends us."""
    config = configure.config
    files = resolve_model(
        configure.model_path,
        download_dir=config.download_dir,
        load_format=config.load_format,
        on_progress=lambda *_: None,
    )
    follower = Follower(config, list_facts(config, files), _end)
    threading.Thread(target=_await_parent, args=(parent, follower, config), daemon=True).start()
    follower.join()
    try:
        with Progress(config.log_level) as progress:
            _, runner = build_runner(config, files, progress.update, follower)
        gc.freeze()
        follower.run(runner)
    except FAILURES as error:
        logger.exception("This host cannot go on.")
        first_line = str(error).partition("\n")[0]
        follower.fail(f"{type(error).__name__}: {first_line}" if first_line else repr(error))
        os._exit(REFUSED if isinstance(error, JaxserveError) else LOST)


def _end(reason: str, is_final: bool) -> None:
    """Host 0 is gone, and perhaps comes back."""
    if is_final:
        logger.info("%s. This host ends too.", reason)
    else:
        logger.error("%s. This host begins again.", reason)
    os._exit(ENDED if is_final else LOST)


def _await_parent(parent: SocketLink, follower: Follower, config: ServerConfig) -> None:
    """The parent says nothing more until it stops us, or is gone."""
    while not parent.receive(PATIENCE_S):
        pass
    follower.leave(f"it was stopped (host {config.node_rank})")
    os._exit(LOST)


if __name__ == "__main__":
    sys.exit(main())
