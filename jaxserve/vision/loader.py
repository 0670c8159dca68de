"""ImageLoader: from the images of a request to patches, in a few worker processes of this HTTP process.

Called by server/generation.py on its event loop, and so by the library. A worker reads one image at a time;
one that takes too long is killed, one that dies fails the image that it was reading, and either is replaced
when there is work for it. What was read last is kept, since a conversation brings its images again with every
turn. Knows nothing of how images are decoded (worker.py) or of prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from jaxserve.errors import InternalError, InvalidRequestError, OverloadedError
from jaxserve.images import ImagePatches
from jaxserve.vision.fetch import fetch_image, is_remote
from jaxserve.vision.limits import MIB, FetchRules, ImageForm, ImageLimits
from jaxserve.vision.sources import ImageFaultError, ImageSource
from jaxserve.vision.worker import LENGTH_BYTES, Done, Refused, Settings, Task, make_frame

WORKER_COMMAND = (sys.executable, "-m", "jaxserve.vision.worker")
MAX_WAITING = 256  # images that are being read or wait for it
MAX_FETCHES = 8
KEPT_BYTES = 64 * MIB  # of patches that were read before

Process = asyncio.subprocess.Process


class ImageLoader:
    """All methods belong to one event loop. A worker starts when an image first needs it."""

    def __init__(
        self,
        form: ImageForm,
        limits: ImageLimits,
        rules: FetchRules,
        *,
        num_workers: int = 2,
        command: tuple[str, ...] = WORKER_COMMAND,
    ):
        self.form = form
        self.limits = limits
        self._rules = rules
        self._command = command
        self._idle: list[Process] = []
        self._places = asyncio.Semaphore(num_workers)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._reading: dict[bytes, asyncio.Task[ImagePatches]] = {}
        self._kept: OrderedDict[bytes, ImagePatches] = OrderedDict()  # the least recently used first
        self._num_kept_bytes = 0

    async def load(self, sources: Sequence[ImageSource]) -> list[ImagePatches]:
        """The patches of each image, in order; one that is named twice is read once.

        Raises InvalidRequestError for what is wrong with an image, OverloadedError when too many wait, and
        InternalError when a worker died of one.
        """
        return list(await asyncio.gather(*map(self._find, sources)))

    async def close(self) -> None:
        """End the workers; nothing may be loaded any more."""
        await asyncio.gather(*self._reading.values(), return_exceptions=True)
        while self._idle:
            await _end(self._idle.pop())

    async def _find(self, source: ImageSource) -> ImagePatches:
        try:
            return await self._find_patches(source)
        except ImageFaultError as error:
            raise InvalidRequestError(f"The image at {source.place} {error}.", param=source.param) from error

    async def _find_patches(self, source: ImageSource) -> ImagePatches:
        key = await _make_key(source)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        reading = self._reading.get(key)
        if reading is None:
            if len(self._reading) >= MAX_WAITING:
                raise OverloadedError(f"{MAX_WAITING} images are being read; try again shortly.")
            reading = self._reading[key] = asyncio.create_task(self._read(source, key))
            reading.add_done_callback(lambda done: self._forget(key, done))
        # Whoever leaves does not stop a worker, which would have to be killed and started anew.
        return await asyncio.shield(reading)

    def _forget(self, key: bytes, done: asyncio.Task[ImagePatches]) -> None:
        del self._reading[key]
        if not done.cancelled():
            done.exception()  # whoever asked may have left

    async def _read(self, source: ImageSource, key: bytes) -> ImagePatches:
        task = Task(source.url, source.min_pixels, source.max_pixels)
        if is_remote(source.url):
            async with self._fetches:
                most = self.limits.max_file_bytes
                data = await asyncio.to_thread(fetch_image, source.url, self._rules, most)
            return await self._decode(msgspec.structs.replace(task, url="", file_bytes=data))
        image = await self._decode(task)
        self._keep(key, image)
        return image

    def _keep(self, key: bytes, image: ImagePatches) -> None:
        self._kept[key] = image
        self._num_kept_bytes += len(image.patches)
        while self._num_kept_bytes > KEPT_BYTES:
            self._num_kept_bytes -= len(self._kept.popitem(last=False)[1].patches)

    async def _decode(self, task: Task) -> ImagePatches:
        async with self._places:
            process = self._idle.pop() if self._idle else await self._start()
            is_idle = False
            try:
                async with asyncio.timeout(self.limits.decode_timeout_s):
                    answer = await _ask(process, task)
                is_idle = True
            except TimeoutError as error:
                timeout_s = self.limits.decode_timeout_s
                raise ImageFaultError(f"takes longer than {timeout_s:g} s to read") from error
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise InternalError("The process that read an image of this request died of it.") from error
            finally:
                if is_idle:
                    self._idle.append(process)
                else:
                    await _end(process)
        if isinstance(answer, Refused):
            raise ImageFaultError(answer.fault)
        return answer.image

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MIB
        )
        assert process.stdin is not None
        process.stdin.write(make_frame(Settings(self.form, self.limits)))
        return process


async def _ask(process: Process, task: Task) -> Done | Refused:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(make_frame(task))
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Done | Refused)


async def _end(process: Process) -> None:
    """At once; a worker has nothing to put in order."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _make_key(source: ImageSource) -> bytes:
    """What the patches of an image depend on; a megabyte of URL takes a millisecond to hash."""
    try:
        url = source.url.encode()
    except UnicodeEncodeError:
        raise ImageFaultError("is neither a URL nor base64") from None
    hashed = hashlib.sha256(f"{source.min_pixels} {source.max_pixels} ".encode())
    if len(url) <= MIB:
        hashed.update(url)
    else:
        await asyncio.to_thread(hashed.update, url)
    return hashed.digest()
