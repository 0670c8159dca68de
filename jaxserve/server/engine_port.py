"""What the HTTP side asks of an engine: the one seam between server/ and engine/.

Written here, in the consumer's room; `engine.client` implements it, and tests have a fake. All
methods are called from one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Sequence
from typing import Protocol

from jaxserve.images import PlacedImage
from jaxserve.metrics import EngineView
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
    """One engine, or several with a copy of the model each that are used as one."""

    @property
    def engines(self) -> Sequence[EngineView]:
        """Each of them, in the order of dp_rank."""
        ...

    @property
    def info(self) -> EngineInfo | None:
        """What one engine is and can do, whichever serves; None until all are ready."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Of all engines together."""
        ...

    @property
    def status(self) -> str:
        """One of "starting", "ready", "asleep" (or on the way there or back), "draining", "dead"."""
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
        self,
        rid: str,
        prompt_ids: list[int],
        params: TokenParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        images: tuple[PlacedImage, ...] = (),
        dp_rank: int | None = None,
    ) -> DeltaStream:
        """Submit a request and stream its tokens. `images` stand in the prompt in this order. `dp_rank` is an
        index of `engines`; None is any of them.

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

    async def pause(self, mode: str) -> int:
        """Let generation stand still: what runs is ended ("abort"), put back in the queue ("retract"), left
        where it is ("in_place") or let come to its end first ("wait"). Requests are taken, and wait.

        Returns how many requests it found. Like all that follow it raises UnavailableError with the
        reason when the engine cannot do it.
        """
        ...

    async def resume(self) -> None:
        """Let generation go on."""
        ...

    async def release_memory(
        self, tags: Collection[str], *, keeps_weights: bool, mode: str, timeout_s: float
    ) -> None:
        """Put the model to sleep: give back the device memory of "weights" and "kv_cache" (`tags`).

        With `keeps_weights` they stay in host memory. New requests are refused from now on; those open may
        end first, within timeout_s (`mode` "wait"), are a reason to refuse ("refuse"), or are ended with
        a 503 ("abort"). A caller that is cancelled does not stop it.
        """
        ...

    async def resume_memory(self, tags: Collection[str]) -> None:
        """Wake the model up: take the memory again, and load what it held."""
        ...

    async def update_weights(self, model_path: str, load_format: str, *, flushes_cache: bool) -> int:
        """Serve another checkpoint of the same architecture, once it is whole in memory and what runs has
        ended; returns how many requests were paused. If it fails the present one is served on."""
        ...


def count_devices(engine: EnginePort) -> int:
    """Of all engines together; of those that are ready, while others start."""
    return sum(each.info.num_devices for each in engine.engines if each.info)
