"""What an image may be and how it is cut up: the server's limits, the rules for URLs, and the model's form.

Made by the composition roots from flags and from the model's preprocessor_config.json; read by everything
that touches an image. Plain data: knows nothing of image files, of HTTP or of arrays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.errors import InvalidRequestError, WeightError

PROCESSOR_FILE = "preprocessor_config.json"
PIXEL_FIELDS = ("min_pixels", "max_pixels")  # what a request may say of its images
MIB = 1 << 20


class ImageForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a model wants its images: patches of `patch_size` pixels a side, `merge_size` by `merge_size` of
    which make a token, `min_pixels` to `max_pixels` in all, normalised by mean and deviation a channel."""

    patch_size: int = 14
    temporal_patch_size: int = 2  # a still image is its own next frame
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    deviation: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def tile_size(self) -> int:
        """Pixels a side of what makes one token: sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def patch_bytes(self) -> int:
        return 3 * self.patch_size**2


class ImageLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What this server takes. `max_pixels` is of an image after resizing, `max_source_pixels` of its file."""

    max_per_message: int = 8
    max_per_request: int = 32
    max_file_bytes: int = 20 * MIB
    max_source_pixels: int = 64 * MIB
    min_pixels: int = 28 * 28
    max_pixels: int = 4096 * 28 * 28
    decode_timeout_s: float = 20.0


class FetchRules(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and whence http(s) URLs are fetched. An empty `allowed_hosts` is any public host; an entry that
    begins with a dot stands for every host that ends with it."""

    is_allowed: bool = False
    allowed_hosts: tuple[str, ...] = ()
    timeout_s: float = 10.0
    max_redirects: int = 3


def read_image_form(folder: Path, vision_config: Mapping[str, Any]) -> ImageForm:
    """The form in a model's folder; what is said nowhere has the family's defaults. Raises WeightError."""
    path = folder / PROCESSOR_FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        sizes = said.get("size") or {}
        defaults = ImageForm()
        return ImageForm(
            patch_size=vision_config.get("patch_size", defaults.patch_size),
            temporal_patch_size=vision_config.get("temporal_patch_size", defaults.temporal_patch_size),
            merge_size=vision_config.get("spatial_merge_size", defaults.merge_size),
            min_pixels=said.get("min_pixels") or sizes.get("shortest_edge") or defaults.min_pixels,
            max_pixels=said.get("max_pixels") or sizes.get("longest_edge") or defaults.max_pixels,
            mean=_read_channels(said.get("image_mean"), defaults.mean),
            deviation=_read_channels(said.get("image_std"), defaults.deviation),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WeightError(f"{path} cannot be read: {error}.") from error


def _read_channels(said: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = map(float, said or default)
    return red, green, blue


def choose_pixels(
    form: ImageForm, limits: ImageLimits, asked_min: int | None, asked_max: int | None, place: str
) -> tuple[int, int]:
    """The fewest and most pixels of an image after resizing: what is asked, else the model's own, as far as
    the server allows. Raises InvalidRequestError for what is asked beyond that."""
    for name, asked in (("min_pixels", asked_min), ("max_pixels", asked_max)):
        if asked is not None and not limits.min_pixels <= asked <= limits.max_pixels:
            raise InvalidRequestError(
                f"{name} of {place} must be between {limits.min_pixels} and {limits.max_pixels} on this "
                f"server, got {asked}.",
                param=name,
            )
    most = min(form.max_pixels, limits.max_pixels) if asked_max is None else asked_max
    least = min(max(form.min_pixels, limits.min_pixels), most) if asked_min is None else asked_min
    if least > most:
        raise InvalidRequestError(
            f"min_pixels of {place} must be at most max_pixels ({most}), got {least}.", param="min_pixels"
        )
    return least, most
