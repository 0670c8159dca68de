"""The client's side of operations, against an engine of a few lines: everyone gets an answer, always."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import (
    Abort,
    Answer,
    Call,
    Failed,
    FromEngine,
    Pause,
    Ready,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    StepOutput,
    Submit,
    ToEngine,
    UpdateWeights,
)
from jaxserve.errors import UnavailableError
from jaxserve.types import MEMORY_TAGS, EngineStats, TokenDelta, TokenParams
from tests.fakes import FAKE_INFO


class ScriptedEngine:
    """Answers calls at once unless it `hangs`; requests never end by themselves. It loads no weights that it
    `refuses`."""

    def __init__(self, dp_rank: int | None = None):
        self.client = EngineClient(dp_rank)
        self.received: list[ToEngine] = []
        self.stats = EngineStats()
        self.is_hanging = False
        self.refuses: tuple[str, ...] = ()
        self.start()

    def start(self) -> None:
        """A new life of the engine, awake."""
        self.stats = EngineStats()
        self.client.connect(self._receive)
        self.client.handle(Ready(FAKE_INFO))

    def calls(self) -> list[object]:
        return [message.operation for message in self.received if isinstance(message, Call)]

    def _receive(self, message: ToEngine) -> None:
        self.received.append(message)
        if isinstance(message, Submit):
            self.stats = replace(self.stats, num_running=self.stats.num_running + 1)
        elif isinstance(message, Abort):
            self.stats = replace(self.stats, num_running=self.stats.num_running - 1)
        elif isinstance(message, Call) and not self.is_hanging:
            self._tell(StepOutput([], self.stats), lambda: self._answer(message))

    def _answer(self, call: Call) -> None:
        operation, num_running = call.operation, self.stats.num_running
        answer = Answer(call.call_id, True)
        if isinstance(operation, ReleaseMemory) and num_running:
            answer = Answer(call.call_id, False, f"{num_running} running.", num_running)
        elif isinstance(operation, ReleaseMemory):
            self.stats = replace(self.stats, released=operation.tags)
        elif isinstance(operation, ResumeMemory):
            self.stats = replace(self.stats, released=())
        elif isinstance(operation, UpdateWeights) and operation.model_path in self.refuses:
            answer = Answer(call.call_id, False, f"no such files: {operation.model_path}")
        elif isinstance(operation, (Pause, Resume)):
            self.stats = replace(self.stats, is_paused=isinstance(operation, Pause))
        self.client.handle(StepOutput([], self.stats))
        self.client.handle(answer)

    def _tell(self, message: FromEngine, then: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(self.client.handle, message)
        loop.call_soon(then)


def run(test):
    asyncio.run(asyncio.wait_for(test, 20))


async def sleep(engine: ScriptedEngine, mode: str = "wait", timeout_s: float = 5.0) -> None:
    await engine.client.release_memory(MEMORY_TAGS, keeps_weights=True, mode=mode, timeout_s=timeout_s)


async def open_request(engine: ScriptedEngine) -> asyncio.Task[list[TokenDelta]]:
    """A request that runs until somebody ends it."""

    async def listen() -> list[TokenDelta]:
        stream = engine.client.generate("r", [1, 2, 3], TokenParams(max_new_tokens=9))
        return [delta async for delta in stream]

    task = asyncio.create_task(listen())
    await asyncio.sleep(0)
    return task


def end_of(deltas: list[TokenDelta]) -> tuple[str, int, str]:
    finish = deltas[-1].finish
    assert finish is not None
    return finish.kind, finish.http_status, finish.message


def test_a_sleep_that_cannot_come_is_refused_and_all_goes_on():
    async def scenario():
        engine = ScriptedEngine()
        request = await open_request(engine)
        for mode, timeout_s in (("refuse", 5.0), ("wait", 0.2)):
            with pytest.raises(UnavailableError, match=r"The model was not put to sleep\. 1 running\."):
                await sleep(engine, mode, timeout_s)
            assert engine.client.status == "ready"
        assert not request.done()
        request.cancel()

    run(scenario())


def test_a_sleep_goes_on_though_its_caller_leaves_and_a_second_one_is_refused():
    async def scenario():
        engine = ScriptedEngine()
        request = await open_request(engine)
        sleeping = asyncio.create_task(sleep(engine))
        await asyncio.sleep(0.1)
        assert (engine.client.status, engine.client.stats.released) == ("asleep", ())
        sleeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sleeping
        with pytest.raises(UnavailableError, match="already going to sleep; ask again"):
            await sleep(engine)
        with pytest.raises(UnavailableError, match="going to sleep"):
            await engine.client.resume_memory(MEMORY_TAGS)
        request.cancel()  # its end is all that the sleep waits for
        while not engine.client.stats.released:
            await asyncio.sleep(0.01)
        await engine.client.resume_memory(MEMORY_TAGS)
        assert engine.client.status == "ready"

    run(scenario())


@pytest.mark.parametrize("operation", ["sleep", "wake", "pause", "update"])
def test_an_engine_that_dies_in_the_middle_is_the_answer(operation):
    async def scenario():
        engine = ScriptedEngine()
        client = engine.client
        if operation == "wake":
            await sleep(engine)
        engine.is_hanging = True
        work = {
            "sleep": lambda: sleep(engine),
            "wake": lambda: client.resume_memory(MEMORY_TAGS),
            "pause": lambda: client.pause("wait"),
            "update": lambda: client.update_weights("other", "auto", flushes_cache=True),
        }
        task = asyncio.create_task(work[operation]())
        await asyncio.sleep(0.05)
        client.handle(Failed("The device is gone."))
        with pytest.raises(UnavailableError, match="The device is gone"):
            await task
        assert (client.status, client.weights) == ("dead", None)
        engine.is_hanging = False
        engine.start()
        await asyncio.sleep(0.1)
        assert client.status == ("asleep" if operation == "wake" else "ready")

    run(scenario())


def test_a_new_engine_goes_on_sleeping():
    async def scenario():
        engine = ScriptedEngine()
        await sleep(engine)
        engine.client.lose("The engine process was ended by signal 9.")
        assert engine.client.status == "dead"
        engine.start()
        with pytest.raises(UnavailableError, match="going to sleep"):
            await engine.client.generate("r", [1], TokenParams(max_new_tokens=1)).__anext__()
        await asyncio.sleep(0.1)
        assert (engine.client.status, engine.client.stats.released) == ("asleep", MEMORY_TAGS)
        await engine.client.resume_memory(MEMORY_TAGS)
        engine.client.lose("Again.")
        engine.start()
        await asyncio.sleep(0.1)
        assert engine.client.status == "ready"

    run(scenario())


def test_a_shutdown_ends_what_a_pause_would_hold_for_ever():
    async def scenario():
        engine = ScriptedEngine()
        request = await open_request(engine)
        await engine.client.pause("in_place")
        engine.client.drain()
        reason = "The server is shutting down while generation is paused."
        assert end_of(await request) == ("abort", 503, reason)
        for refused in (sleep(engine), engine.client.resume(), engine.client.pause("abort")):
            with pytest.raises(UnavailableError, match="shutting down"):
                await refused

    run(scenario())


def test_so_does_a_pause_that_stands_only_after_the_shutdown_began():
    async def scenario():
        engine = ScriptedEngine()
        request = await open_request(engine)
        engine.client.drain()
        await asyncio.sleep(0.05)
        assert not request.done()
        engine.client.handle(StepOutput([], replace(engine.client.stats, is_paused=True)))
        assert end_of(await request)[:2] == ("abort", 503)

    run(scenario())


def test_a_shutdown_while_going_to_sleep_lets_the_request_end():
    async def scenario():
        engine = ScriptedEngine()
        request = await open_request(engine)
        sleeping = asyncio.create_task(sleep(engine, timeout_s=0.3))
        await asyncio.sleep(0.1)
        engine.client.drain()
        with pytest.raises(UnavailableError, match="not put to sleep"):
            await sleeping
        assert (engine.client.status, request.done()) == ("draining", False)
        request.cancel()

    run(scenario())


def test_nothing_is_asked_of_an_engine_that_still_starts():
    async def scenario():
        client = EngineClient()
        client.connect(lambda _message: None)
        asked = (
            client.release_memory(MEMORY_TAGS, keeps_weights=True, mode="wait", timeout_s=5),
            client.resume_memory(MEMORY_TAGS),
            client.pause("abort"),
            client.update_weights("other", "auto", flushes_cache=True),
        )
        for operation in asked:
            with pytest.raises(UnavailableError, match="The engine is starting"):
                await operation

    run(scenario())
