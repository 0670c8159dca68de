"""A real engine in this process: its loop on a thread, its client on the test's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jaxserve.build import build_engine
from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.messages import Ready, Shutdown
from jaxserve.engine.transport import ThreadLink
from jaxserve.images import PlacedImage
from jaxserve.runner.runner import ModelRunner
from jaxserve.types import FinishReason, TokenDelta, TokenParams
from jaxserve.weights.resolve import resolve_model
from tests.tiny import write_tiny_checkpoint


class RunningEngine:
    """What a test may touch: the client, and the engine's insides for a look."""

    def __init__(self, client: EngineClient, loop: EngineLoop, runner: ModelRunner):
        self.client = client
        self.loop = loop
        self.runner = runner

    async def generate(
        self, rid: str, prompt_ids: list[int], images: tuple[PlacedImage, ...] = (), /, **params: Any
    ) -> list[TokenDelta]:
        """All deltas of one request; greedy unless said otherwise."""
        token_params = TokenParams(**{"max_new_tokens": 8, **params})
        deltas = self.client.generate(rid, prompt_ids, token_params, images=images)
        return [delta async for delta in deltas]

    async def wait_until_warm(self) -> None:
        while not self.client.stats.is_warm:
            await asyncio.sleep(0.05)

    async def wait_until_idle(self) -> None:
        while self.client.stats.num_running or self.client.stats.num_queued or self.client.live_rids():
            await asyncio.sleep(0.01)


def finish_of(deltas: list[TokenDelta]) -> FinishReason:
    finish = deltas[-1].finish
    assert finish is not None
    return finish


def token_ids(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


@asynccontextmanager
async def start_tiny_engine(folder: Path, name: str = "qwen2", **flags: Any) -> AsyncIterator[RunningEngine]:
    """Serve tiny model `name` from a checkpoint that is written to `folder`, in a small pool."""
    if not (folder / "config.json").exists():
        write_tiny_checkpoint(folder, name)
    settings = {
        "page_size": 8,
        "max_running_requests": 8,
        "max_total_tokens": 1024,
        "chunked_prefill_size": 64,
        "compilation_cache_dir": str(folder.parent / "programs"),  # shared by the tests of a run
    }
    async with start_engine(str(folder), **{**settings, **flags}) as engine:
        yield engine


@asynccontextmanager
async def start_engine(model_path: str, **flags: Any) -> AsyncIterator[RunningEngine]:
    """Serve a model in float32 unless the flags say otherwise."""
    config = ServerConfig(model_path=model_path, **{"dtype": "float32", "quantization": "none", **flags})
    client = EngineClient()
    link = ThreadLink(asyncio.get_running_loop(), client.handle)
    files = resolve_model(model_path, load_format=config.load_format, on_progress=lambda *_: None)
    loop, runner, info = build_engine(config, files, link, lambda *_: None)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    client.connect(link.put)
    client.handle(Ready(info))
    try:
        yield RunningEngine(client, loop, runner)
    finally:
        link.put(Shutdown())
        await asyncio.to_thread(thread.join, 60)
        runner.close()
