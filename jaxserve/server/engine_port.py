"""What the HTTP side asks of an engine: the one seam between server/ and engine/.

Written here, in the consumer's room; `engine.client` implements it, and tests have a fake. All
methods are called from one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Protocol

from jaxserve.types import EngineInfo, EngineStats, TokenDelta, TokenParams


class DeltaStream(Protocol):
    """An async generator of one request's deltas, as far as we use it.

    The last delta has `finish` set. Closing the stream before that aborts the request, within one
    engine step; so does cancelling the task that waits for the next delta.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...
    def __anext__(self) -> Awaitable[TokenDelta]: ...
    def aclose(self) -> Awaitable[None]: ...


class EnginePort(Protocol):
    @property
    def info(self) -> EngineInfo | None:
        """None until the engine is ready."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def status(self) -> str:
        """One of "starting", "ready", "draining", "dead"."""
        ...

    @property
    def status_message(self) -> str:
        """A sentence for a person: progress while starting, the cause when dead."""
        ...

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine last said anything; it speaks at least once a second."""
        ...

    def generate(
        self, rid: str, prompt_ids: list[int], params: TokenParams, *, priority: int = 0, cache_salt: str = ""
    ) -> DeltaStream:
        """Submit a request and stream its tokens.

        Raises UnavailableError when the engine is not ready and OverloadedError when its queue is
        full, at the call or at the first delta.
        """
        ...

    def abort(self, rid: str) -> None:
        """Ask for a request to end; its stream ends with a finish of kind "abort", http_status 0."""
        ...

    def live_rids(self) -> Iterable[str]: ...

    async def flush_cache(self, timeout_s: float) -> bool:
        """Empty the prefix cache once nothing runs; False when something still runs after timeout_s."""
        ...
