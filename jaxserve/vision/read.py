"""From an image's URL or file to RGB pixels: data URLs, base64, and the four kinds of files that are taken.

Runs in the worker processes, since Pillow's decoders are C code that reads what strangers send. Everything
that is wrong with an image is an ImageFaultError. Knows nothing of models or of networks.
"""

from __future__ import annotations

import base64
import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxserve.vision.limits import ImageLimits
from jaxserve.vision.sources import ImageFaultError

FILE_KINDS = ("JPEG", "PNG", "WEBP", "GIF")
MEDIA_TYPES = ("image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif")
_DATA_URL = re.compile(r"data:(?P<media_type>[^;,]{0,100})(?P<options>[^,]{0,200}),", re.IGNORECASE)
_BASE64_WORD = re.compile(r"[A-Za-z0-9+/=_\s-]{16,}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}):")


def read_data_url(url: str, limits: ImageLimits) -> bytes:
    """The file in a data URL, or in bare base64. Raises ImageFaultError."""
    match = _DATA_URL.match(url)
    if match is None:
        if _SCHEME.match(url) is None and _BASE64_WORD.match(url) is not None:
            return _decode_base64(url, limits)
        scheme = _SCHEME.match(url)
        kind = f"a {scheme[1].lower()}: URL" if scheme else "neither a URL nor base64"
        raise ImageFaultError(f"is {kind}; send the image itself as a data URL")
    media_type = match["media_type"].strip().lower()
    if media_type not in MEDIA_TYPES:
        raise ImageFaultError(f"must be of a type among {', '.join(MEDIA_TYPES)}, got {media_type[:40]!r}")
    if "base64" not in match["options"].lower().replace(" ", "").split(";"):
        raise ImageFaultError("must hold its data in base64")
    return _decode_base64(url[match.end() :], limits)


def decode_image(data: bytes, limits: ImageLimits) -> np.ndarray:
    """RGB pixels, uint8 [height, width, 3], of the first frame, turned upright as its EXIF data says.

    The size is checked before anything is unpacked. Raises ImageFaultError.
    """
    _check_file_bytes(len(data), limits)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=FILE_KINDS) as image,
        ):
            width, height = image.size
            if width * height > limits.max_source_pixels:
                most = limits.max_source_pixels
                raise ImageFaultError(f"has {width} x {height} pixels; this server takes {most} at most")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except ImageFaultError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever comes to pass in a damaged file
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FILE_KINDS)}"
        raise ImageFaultError(f"cannot be read: {reason}") from error


def _decode_base64(text: str, limits: ImageLimits) -> bytes:
    _check_file_bytes(len(text) * 3 // 4 - 3, limits)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    # Line breaks, the URL alphabet, and padding that was left out are common, and mean no other bytes.
    words = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(words + "=" * (-len(words) % 4), validate=True)
    except ValueError:
        raise ImageFaultError("is not valid base64") from None


def _check_file_bytes(num_bytes: int, limits: ImageLimits) -> None:
    if num_bytes > limits.max_file_bytes:
        raise ImageFaultError(
            f"is larger than {limits.max_file_bytes} bytes, the most that this server takes"
        )
