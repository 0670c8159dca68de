"""The HTTP application: `create_app(engine, text, settings)` puts routes, middleware and state together.

Called by the composition root (one app a process) and by tests (one a test). The engine may still be
starting: its routes then answer 503. Knows no flags, no processes and no arrays.
"""

from __future__ import annotations

import secrets
import time
from typing import cast

from sanic import Sanic
from sanic.config import Config
from sanic.request import Request

from jaxserve.metrics import ServerMetrics
from jaxserve.server import (
    admin,
    info,
    loads,
    native,
    openai_chat,
    openai_completions,
    openapi,
    operations,
    sample,
    tokens,
)
from jaxserve.server.engine_port import EnginePort
from jaxserve.server.generation import Generator
from jaxserve.server.middleware import add_middleware, read_request
from jaxserve.server.settings import ServerSettings, TextTools
from jaxserve.server.state import AppState, ServedWeights

# Sanic would answer 503 after this long without a byte either way; a completion may take any time.
_RESPONSE_TIMEOUT_S = 7 * 24 * 3600
_REQUEST_TIMEOUT_S = 60  # for the head of a request to arrive
_KEEP_ALIVE_TIMEOUT_S = 120  # an idle connection
_MAX_HEADER_BYTES = 16384  # Sanic's ceiling


def create_app(
    engine: EnginePort, text: TextTools, settings: ServerSettings, name: str | None = None
) -> Sanic:
    """A Sanic app that serves `engine`. `name` must be unique in the process; None makes one up."""
    app = Sanic(
        name or f"jaxserve_{secrets.token_hex(4)}",
        config=_make_config(settings),
        configure_logging=False,
        request_class=cast(type[Request], read_request),
    )
    metrics = ServerMetrics(settings.served_model_name, engine.engines)
    app.ctx.state = AppState(
        engine=engine,
        text=text,
        settings=settings,
        generator=Generator(engine, text, settings, metrics),
        metrics=metrics,
        weights=ServedWeights(settings.weight_version, settings.model_path),
        started_at_s=time.time(),
    )
    openai_rooms = (openai_chat, openai_completions)
    for room in (admin, info, loads, native, *openai_rooms, openapi, operations, sample, tokens):
        app.blueprint(room.make_blueprint())
    add_middleware(app)
    return app


def _make_config(settings: ServerSettings) -> Config:
    config = Config()
    config.update(
        AUTO_EXTEND=False,  # sanic-ext would add routes and headers of its own
        ACCESS_LOG=False,  # ours says more, and no prompts
        MOTD=False,
        RESPONSE_TIMEOUT=_RESPONSE_TIMEOUT_S,
        REQUEST_TIMEOUT=_REQUEST_TIMEOUT_S,
        KEEP_ALIVE_TIMEOUT=_KEEP_ALIVE_TIMEOUT_S,
        REQUEST_MAX_SIZE=settings.max_body_bytes,
        REQUEST_MAX_HEADER_SIZE=_MAX_HEADER_BYTES,
        FALLBACK_ERROR_FORMAT="json",
    )
    return config
