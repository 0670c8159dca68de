"""The only things that cross between the HTTP side and the engine: msgspec structs of plain data.

One connection carries `ToEngine` messages one way and `FromEngine` messages the other; each is encoded
with msgpack when the two sides are processes and passed as it is when they are threads. The engine
sends one `StepOutput` a step and connection, not one a token.
"""

from __future__ import annotations

import msgspec

from jaxserve.config import ServerConfig
from jaxserve.types import EngineInfo, EngineStats, TokenDelta, TokenParams


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine process. `model_path` is where the files lie on this machine."""

    config: ServerConfig
    model_path: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    rid: str
    prompt_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""  # requests with different salts never share cached pages


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Drop a request. It frees its pages within one step; one last delta (kind "abort") answers it."""

    rid: str


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Empty the prefix cache, if nothing runs; answered by `Flushed` with the same call_id."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class Starting(msgspec.Struct, frozen=True, tag=True):
    """Where the start has got to, for /health and progress: a sentence and a fraction 0..1."""

    message: str
    fraction: float = 0.0


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    deltas: list[TokenDelta]
    stats: EngineStats


class Flushed(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    ok: bool


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; the process exits after sending it."""

    message: str


ToEngine = Configure | Submit | Abort | FlushCache | Shutdown
FromEngine = Starting | Ready | StepOutput | Flushed | Failed
