"""Images from a request to patches: what is taken, what is refused, and workers that hang or die."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager

import numpy as np
from PIL import Image

from jaxserve.errors import InternalError, InvalidRequestError
from jaxserve.vision.limits import FetchRules, ImageForm, ImageLimits
from jaxserve.vision.loader import WORKER_COMMAND, ImageLoader
from jaxserve.vision.patches import make_patches
from jaxserve.vision.sources import ImageSource
from tests.vision.pictures import draw, encode, list_hostile_urls, make_data_url

FORM, LIMITS = ImageForm(), ImageLimits()


def make_source(url: str, order: int = 0, max_pixels: int = 10**6) -> ImageSource:
    return ImageSource(
        url=url, place=f"messages[{order}]", param="messages", min_pixels=3136, max_pixels=max_pixels
    )


@asynccontextmanager
async def open_loader(limits: ImageLimits = LIMITS, command: tuple[str, ...] = WORKER_COMMAND):
    loader = ImageLoader(FORM, limits, FetchRules(), num_workers=1, command=command)
    try:
        yield loader
    finally:
        await loader.close()


def load(*urls: str, **settings) -> list:
    """What each URL gives, images and errors alike."""

    async def run() -> list:
        async with open_loader(**settings) as loader:
            wanted = [loader.load([make_source(url, order)]) for order, url in enumerate(urls)]
            found = await asyncio.gather(*wanted, return_exceptions=True)
            return [item[0] if isinstance(item, list) else item for item in found]

    return asyncio.run(run())


def test_base64_may_be_written_in_several_ways():
    picture = draw(56, 84)
    png = make_data_url(encode(picture))
    head, data = png.split(",")
    bare = data.rstrip("=").replace("+", "-").replace("/", "_")
    found = load(
        png,
        png.replace("image/png", "image/jpeg"),  # as xLLM's page has it: jpeg, whatever it is
        data,
        f"{head},{bare}",
        f"{head},{data[:40]}\n{data[40:]}",
    )
    assert found == [make_patches(np.asarray(picture), FORM, 3136, 10**6)] * 5


def test_four_kinds_of_files_the_first_frame_and_the_right_way_up():
    picture = draw(56, 84)
    expected = make_patches(np.asarray(picture), FORM, 3136, 10**6)
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    frames = [picture.quantize(256), draw(56, 84, 5).quantize(256)]
    files = [
        encode(picture, "WEBP", lossless=True),
        encode(picture.convert("RGBA")),
        encode(picture, "JPEG", quality=95, subsampling=0),
        encode(turned, "JPEG", quality=95, subsampling=0, exif=exif),
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    ]
    found = load(*map(make_data_url, files))
    assert found[:2] == [expected] * 2
    pixels = [np.frombuffer(image.patches, np.uint8).astype(int) for image in [expected, *found[2:]]]
    assert [np.abs(other - pixels[0]).mean() < 12 for other in pixels[1:]] == [True] * 3


def test_hostile_files_are_refused_with_a_sentence():
    found = load(*list_hostile_urls())
    assert len(found) == 200
    accepted = [order for order, error in enumerate(found) if not isinstance(error, InvalidRequestError)]
    assert accepted == []
    for order, error in enumerate(found):
        assert error.message.startswith(f"The image at messages[{order}] ")
        assert len(error.message) < 300


def test_limits_of_bytes_and_pixels():
    small = ImageLimits(max_file_bytes=2000, max_source_pixels=5000, max_pixels=3500)
    many_bytes, many_pixels = load(
        make_data_url(encode(draw(60, 60, 1))), make_data_url(encode(draw(80, 80).convert("1"))), limits=small
    )
    assert "is larger than 2000 bytes" in str(many_bytes)
    assert "has 80 x 80 pixels; this server takes 5000 at most" in str(many_pixels)
    (too_wide,) = load(make_data_url(encode(draw(2, 300).convert("1"))), limits=small)
    assert "would have" in str(too_wide)


def test_an_image_that_is_named_again_is_not_read_again():
    async def run() -> None:
        url = make_data_url(encode(draw(40, 40)))
        async with open_loader() as loader:
            first, second = await loader.load([make_source(url), make_source(url, 1)])
            assert first is second
            assert (await loader.load([make_source(url, 2)]))[0] is first
            other = (await loader.load([make_source(url, max_pixels=3136)]))[0]
            assert other is not first

    asyncio.run(run())


HANGS_ONCE = """
import os, sys, time
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], "w").close()
    time.sleep(60)
from jaxserve.vision import worker
worker.main()
"""


def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path):
    command = (sys.executable, "-c", HANGS_ONCE, str(tmp_path / "has_hung"))
    urls = [make_data_url(encode(draw(30, 30, seed))) for seed in range(2)]
    hung, read = load(*urls, limits=ImageLimits(decode_timeout_s=5.0), command=command)
    assert isinstance(hung, InvalidRequestError)
    assert "takes longer than 5 s to read" in hung.message
    assert read.num_tokens > 0


def test_a_worker_that_dies_fails_one_image():
    (error,) = load(
        make_data_url(encode(draw(30, 30))), command=(sys.executable, "-c", "import os; os._exit(1)")
    )
    assert isinstance(error, InternalError)
