"""A process that turns image files into patches, one at a time, until its input ends.

Started by loader.py as `python -m jaxserve.vision.worker`; reads tasks from stdin, writes results to stdout.
It holds nothing of worth and may be killed at any moment: image decoders are the part of a server that
strangers can make slow, large or wrong.

    frame    length: 4 bytes, big endian | body: msgpack
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, BinaryIO

import msgspec

from jaxserve.images import ImagePatches
from jaxserve.vision.limits import ImageForm, ImageLimits
from jaxserve.vision.patches import make_patches
from jaxserve.vision.read import decode_image, read_data_url
from jaxserve.vision.sources import ImageFaultError

LENGTH_BYTES = 4
MAX_MEMORY_BYTES = 4 << 30  # of address space


class Settings(msgspec.Struct, frozen=True):
    """The first frame."""

    form: ImageForm
    limits: ImageLimits


class Task(msgspec.Struct, frozen=True):
    """An image to read: the file itself where it was fetched, else a data URL or bare base64."""

    url: str
    min_pixels: int
    max_pixels: int
    file_bytes: bytes | None = None


class Done(msgspec.Struct, frozen=True, tag=True):
    image: ImagePatches


class Refused(msgspec.Struct, frozen=True, tag=True):
    """What is wrong with the image, as an ImageFaultError says it."""

    fault: str


def make_frame(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def read_image(task: Task, settings: Settings) -> Done | Refused:
    """The whole way of one image, from URL or file to patches."""
    try:
        data = read_data_url(task.url, settings.limits) if task.file_bytes is None else task.file_bytes
        pixels = decode_image(data, settings.limits)
        image = make_patches(pixels, settings.form, task.min_pixels, task.max_pixels)
    except ImageFaultError as error:
        return Refused(str(error))
    num_pixels = image.num_patches * settings.form.patch_size**2
    if num_pixels > settings.limits.max_pixels:  # of a long one, and where min_pixels is rounded up
        most = settings.limits.max_pixels
        return Refused(f"would have {num_pixels} pixels after resizing; this server takes {most} at most")
    return Done(image)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business
    _bound_memory()
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not break a frame
        body = _read_frame(sys.stdin.buffer)
        if body is None:
            return
        settings = msgspec.msgpack.decode(body, type=Settings)
        while (body := _read_frame(sys.stdin.buffer)) is not None:
            answers.write(make_frame(read_image(msgspec.msgpack.decode(body, type=Task), settings)))
            answers.flush()


def _read_frame(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH_BYTES)
    length = int.from_bytes(header, "big")
    body = stream.read(length)
    return body if len(header) == LENGTH_BYTES and len(body) == length else None


def _bound_memory() -> None:
    """So that one image cannot take the machine's; where the system has no such limit, sizes must do."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


if __name__ == "__main__":
    main()
