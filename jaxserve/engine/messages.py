"""The only things that cross between the HTTP side and the engine: msgspec structs of plain data.

One connection carries `ToEngine` messages one way and `FromEngine` messages the other; each is encoded
with msgpack when the two sides are processes and passed as it is when they are threads. The engine
sends one `StepOutput` a step and connection, not one a token.
"""

from __future__ import annotations

import msgspec

from jaxserve.config import ServerConfig
from jaxserve.images import PlacedImage
from jaxserve.types import EngineInfo, EngineStats, TokenDelta, TokenParams


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine process. `model_path` is where the files lie on this machine; `dp_rank`
    says which of several engines it is."""

    config: ServerConfig
    model_path: str
    dp_rank: int | None = None


class Submit(msgspec.Struct, frozen=True, tag=True):
    rid: str
    prompt_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""  # requests with different salts never share cached pages
    images: tuple[PlacedImage, ...] = ()


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Drop a request. It frees its pages within one step; one last delta (kind "abort") answers it."""

    rid: str


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Empty the prefix cache. Refused while anything runs."""


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Plan no more steps until `Resume`. What runs is ended ("abort", and so is what waits), put back in
    the queue with its tokens kept ("retract"), left where it is ("in_place"), or let come to its end first
    ("wait"). Requests are still taken, and wait."""

    mode: str


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Undo a `Pause`."""


class ReleaseMemory(msgspec.Struct, frozen=True, tag=True):
    """Give device memory back: of the "weights", of the "kv_cache", or both. Refused while anything runs
    or waits; the answer's `num_requests` says how much does.

    `keeps_weights`: a copy stays in host memory, so that they come back without reading files. Without it a
    copy that is there goes too. What was given back before stays so.
    """

    tags: tuple[str, ...]
    keeps_weights: bool = True


class ResumeMemory(msgspec.Struct, frozen=True, tag=True):
    """Take memory again, and load what it held (the prefix cache starts empty)."""

    tags: tuple[str, ...]


class UpdateWeights(msgspec.Struct, frozen=True, tag=True):
    """Serve another checkpoint of the same shapes. The present one serves until the new one is whole in
    memory; then what runs ends first, unless the engine is paused. `model_path` is on this machine."""

    model_path: str
    load_format: str = "auto"
    flushes_cache: bool = True


class Call(msgspec.Struct, frozen=True, tag=True):
    """An operation that is answered, by `Answer` with the same call_id."""

    call_id: int
    operation: FlushCache | Pause | Resume | ReleaseMemory | ResumeMemory | UpdateWeights


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


class Answer(msgspec.Struct, frozen=True, tag=True):
    """How a `Call` went; `message` is a sentence for a person, always given when not ok. The stats that
    were sent before it tell the state that it left."""

    call_id: int
    ok: bool
    message: str = ""
    num_requests: int = 0  # that a Pause ended or put back, an UpdateWeights found paused, or are in the way


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; the process exits after sending it."""

    message: str


ToEngine = Configure | Submit | Abort | Call | Shutdown
FromEngine = Starting | Ready | StepOutput | Answer | Failed
