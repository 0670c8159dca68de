"""The engine process that is started before there is a model: it gets its settings and never stays behind."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from jaxserve import launch
from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine_process import EngineProcess
from jaxserve.errors import ConfigError
from jaxserve.supervise import EngineSupervisor

# Reads its settings, and ends with a sentence that tells what they were.
TELLS_ITS_MODEL = """
import socket, sys
from jaxserve.engine.messages import Failed
from jaxserve.engine.transport import SocketLink
link = SocketLink(socket.socket(fileno=int(sys.argv[1])), on_lost=lambda: None)
(configure,) = link.receive(30)
link.send(Failed(f"was to serve {configure.model_path}"))
sys.exit(2)
"""
WAITS_FOR_US = """
import socket, sys
socket.socket(fileno=int(sys.argv[1])).recv(1)
"""


def test_an_engine_that_was_started_before_the_model_was_found_serves_it():
    async def scenario() -> EngineSupervisor:
        engine = EngineProcess((sys.executable, "-c", TELLS_ITS_MODEL))
        config = ServerConfig(model_path="some/model")
        supervisor = EngineSupervisor(config, "/found/here", EngineClient(), first_engine=engine)
        await asyncio.wait_for(supervisor.run(), 60)
        return supervisor

    supervisor = asyncio.run(scenario())
    assert supervisor.failure == "was to serve /found/here"
    assert supervisor.exit_status == 2


def test_an_engine_that_never_gets_a_model_ends_with_the_launch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = EngineProcess((sys.executable, "-c", WAITS_FOR_US))
    config = ServerConfig(model_path=str(tmp_path / "missing"), port=port)
    with pytest.raises(ConfigError):
        launch.run(config, command=[], first_engines=[engine])
    assert asyncio.run(asyncio.wait_for(engine.wait(), 10)) != 0
