"""Pictures for tests, the same bits everywhere, and files that only claim to be pictures."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

# Height, width, min_pixels, max_pixels: kept, rounded, enlarged, reduced, long, and turned by nobody.
SHAPES = (
    (56, 84, 3136, 1_003_520),
    (61, 97, 3136, 1_003_520),
    (20, 17, 3136, 1_003_520),
    (300, 211, 3136, 31_360),
    (30, 400, 3136, 1_003_520),
    (97, 61, 12_544, 12_544),
)


def draw(height: int, width: int, seed: int = 0) -> Image.Image:
    """Slopes, stripes and a little noise in three colours."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.Generator(np.random.PCG64(seed)).integers(0, 32, (height, width), np.uint8)
    red = (x * 255 // max(width - 1, 1)) ^ noise
    green = ((x // 5 + y // 3 + seed) % 2) * 180 + noise
    blue = (y * 255 // max(height - 1, 1) + 40 * seed) % 256
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def make_data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def make_png(width: int, height: int, packed: bytes) -> bytes:
    """A PNG file that says it has so many grey pixels, whatever it holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def list_hostile_urls(number: int = 200) -> Iterator[str]:
    """URLs none of which is a picture that a server should take."""
    source = random.Random(7)
    whole = {kind: encode(draw(90, 120), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}
    others = [
        make_data_url(make_png(60_000, 60_000, zlib.compress(bytes(10_000)))),  # a bomb by its header
        make_data_url(make_png(200_000, 1, zlib.compress(bytes(100)))),
        make_data_url(make_png(64, 64, zlib.compress(bytes(50)))),  # fewer bytes than pixels
        make_data_url(make_png(64, 64, b"no zlib at all")),
        make_data_url(make_png(0, 64, zlib.compress(b""))),
        make_data_url(encode(draw(2, 900))),  # too long
        make_data_url(encode(draw(30, 40), "BMP")),
        make_data_url(encode(draw(30, 40), "TIFF")),
        make_data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        make_data_url(b"%PDF-1.7 ...", "application/pdf"),
        make_data_url(b""),
        make_data_url(whole["PNG"], "text/html"),
        "data:image/png," + "%00" * 20,
        "data:image/png;base64,*not*base64*",
        "data:image/png;base64",
        "data:;base64,AAAA",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a.png",
        "http://127.0.0.1:1/a.png",
        "https://169.254.169.254/latest/meta-data",
        "javascript:alert(1)",
        "\x00",
        " ",
        "A" * 5000,
        "\ud800",
    ]
    yield from others
    for order in range(number - len(others)):
        kind = ("PNG", "JPEG", "WEBP", "GIF")[order % 4]
        data = whole[kind]
        match order % 3:
            case 0:  # cut off
                data = data[: source.randrange(1, len(data) * 3 // 4)]
            case 1:  # noise under a good signature
                data = data[:12] + source.randbytes(source.randrange(1, 300))
            case _:  # the beginning of one in the body of another
                data = data[: source.randrange(8, 40)] + whole["JPEG" if kind == "PNG" else "PNG"][40:]
        yield make_data_url(data, f"image/{kind.lower()}")
