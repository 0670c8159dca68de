"""EngineGroup: several engines, each with a copy of the model, as one (--dp-size).

Made by launch.py from one EngineClient an engine; implements server/engine_port.py, so the routes do not
know how many there are. A request goes to one engine (engine/routing.py) and is that engine's from then on:
its deltas come straight from there. Orders go to all; one that some engine refuses is taken back on the
others. It serves while all engines do: one that starts again is waited for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import UpdateWeights
from jaxserve.engine.routing import Router, hash_blocks
from jaxserve.errors import UnavailableError
from jaxserve.images import PlacedImage
from jaxserve.types import MEMORY_TAGS, EngineInfo, EngineStats, TokenDelta, TokenParams

# An engine that is in an earlier one of these speaks for all.
STATUSES = ("draining", "dead", "starting", "asleep", "ready")

T = TypeVar("T")

logger = logging.getLogger("jaxserve.engine")


class EngineGroup:
    """All methods belong to one event loop. `weights` are those that all engines serve at first."""

    def __init__(self, clients: Sequence[EngineClient], weights: UpdateWeights):
        self._clients = tuple(clients)
        self._weights = weights
        self._router: Router | None = None
        # When the life of each engine began that the router knows of; None: it is to forget that engine.
        self._lives: list[float | None] = [None] * len(clients)
        self._chores: set[asyncio.Task[Any]] = set()  # orders that go on when nobody waits for them

    @property
    def engines(self) -> Sequence[EngineClient]:
        return self._clients

    @property
    def info(self) -> EngineInfo | None:
        """Of the engine with the smallest pool: what any of them can do. None until all are ready."""
        infos = [client.info for client in self._clients if client.info is not None]
        if len(infos) < len(self._clients):
            return None
        return min(infos, key=lambda info: info.max_total_tokens)

    @property
    def stats(self) -> EngineStats:
        return add_stats([client.stats for client in self._clients])

    @property
    def status(self) -> str:
        return min((client.status for client in self._clients), key=STATUSES.index)

    @property
    def status_message(self) -> str:
        status = self.status
        return next(client.status_message for client in self._clients if client.status == status)

    @property
    def heartbeat_age_s(self) -> float:
        return max(client.heartbeat_age_s for client in self._clients)

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
    ) -> AsyncGenerator[TokenDelta, None]:
        """The stream of the engine that the request goes to: `dp_rank`, or the one that suits it best.

        Raises UnavailableError unless all engines are ready, and what EngineClient.generate raises.
        """
        if self.status != "ready":
            raise UnavailableError(self.status_message)
        router = self._find_router()
        blocks = hash_blocks(prompt_ids, cache_salt, images)
        if dp_rank is None:
            dp_rank = router.choose(blocks, [client.load_tokens for client in self._clients])
        router.note(dp_rank, blocks, len(prompt_ids))
        return self._clients[dp_rank].generate(
            rid, prompt_ids, params, priority=priority, cache_salt=cache_salt, images=images
        )

    def abort(self, rid: str) -> None:
        """At the engine that has it; the others ignore it."""
        for client in self._clients:
            client.abort(rid)

    def live_rids(self) -> Iterable[str]:
        return [rid for client in self._clients for rid in client.live_rids()]

    async def flush_cache(self, timeout_s: float) -> bool:
        self._forget()
        return all(await asyncio.gather(*(client.flush_cache(timeout_s) for client in self._clients)))

    async def pause(self, mode: str) -> int:
        return sum(await self._order(lambda client: client.pause(mode), lambda client: client.resume()))

    async def resume(self) -> None:
        await self._order(lambda client: client.resume(), None)

    async def update_weights(self, model_path: str, load_format: str, *, flushes_cache: bool) -> int:
        """As EngineClient's. Those that serve the new weights already load the present ones again if some
        engine cannot serve the new."""
        present = self._weights
        self._forget()
        num_paused = await self._order(
            lambda client: client.update_weights(model_path, load_format, flushes_cache=flushes_cache),
            lambda client: client.update_weights(present.model_path, present.load_format, flushes_cache=True),
        )
        self._weights = UpdateWeights(model_path, load_format, flushes_cache)
        return sum(num_paused)

    async def release_memory(
        self, tags: Collection[str], *, keeps_weights: bool, mode: str, timeout_s: float
    ) -> None:
        self._forget()
        await self._order(
            lambda client: client.release_memory(
                tags, keeps_weights=keeps_weights, mode=mode, timeout_s=timeout_s
            ),
            lambda client: client.resume_memory(tags),
        )

    async def resume_memory(self, tags: Collection[str]) -> None:
        """Those that are awake have nothing to do: one may have been started again."""
        await self._order(lambda client: _wake(client, tags), None)

    async def _order(
        self,
        give: Callable[[EngineClient], Awaitable[T]],
        take_back: Callable[[EngineClient], Awaitable[Any]] | None,
    ) -> list[T]:
        """Have all engines do it, and undo it where it was done if some cannot. It goes on to its end when
        the caller is cancelled. Raises UnavailableError with the first reason."""
        chore = asyncio.create_task(self._carry_out(give, take_back))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        return await asyncio.shield(chore)

    async def _carry_out(
        self,
        give: Callable[[EngineClient], Awaitable[T]],
        take_back: Callable[[EngineClient], Awaitable[Any]] | None,
    ) -> list[T]:
        refusals: dict[int, UnavailableError] = {}

        async def ask(rank: int, order: Callable[[EngineClient], Awaitable[Any]]) -> Any:
            try:
                return await order(self._clients[rank])
            except UnavailableError as error:
                refusals.setdefault(rank, error)
                return None

        ranks = range(len(self._clients))
        answers = await asyncio.gather(*(ask(rank, give) for rank in ranks))
        if not refusals:
            return answers
        first, error = min(refusals.items())
        if take_back is not None:
            done = [rank for rank in ranks if rank not in refusals]
            await asyncio.gather(*(ask(rank, take_back) for rank in done))
            for rank in done:
                if rank in refusals:
                    logger.error("dp_rank %d did not take it back: %s", rank, refusals[rank])
        raise UnavailableError(f"dp_rank {first}: {error.message}")

    def _find_router(self) -> Router:
        """The router, which knows nothing of an engine that is new."""
        if self._router is None:
            assert self.info is not None
            self._router = Router(len(self._clients), self.info.max_total_tokens)
        for rank, client in enumerate(self._clients):
            if client.ready_since_s != self._lives[rank]:
                self._lives[rank] = client.ready_since_s
                self._router.forget(rank)
        return self._router

    def _forget(self) -> None:
        """What was cached is about to go."""
        self._lives = [None] * len(self._clients)


def add_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Counts of several engines as one: summed; warm if all are, paused if any is."""
    total: dict[str, Any] = {}
    for setting in dataclasses.fields(EngineStats):
        values = [getattr(each, setting.name) for each in stats]
        total[setting.name] = sum(values) if isinstance(values[0], int | float) else ()
    return EngineStats(
        **{
            **total,
            "is_warm": all(each.is_warm for each in stats),
            "is_paused": any(each.is_paused for each in stats),
            "released": tuple(tag for tag in MEMORY_TAGS if any(tag in each.released for each in stats)),
            "queue_time_counts": tuple(
                map(sum, itertools.zip_longest(*(each.queue_time_counts for each in stats), fillvalue=0))
            ),
        }
    )


def _wake(client: EngineClient, tags: Collection[str]) -> Coroutine[Any, Any, None]:
    return asyncio.sleep(0) if client.status == "ready" else client.resume_memory(tags)
