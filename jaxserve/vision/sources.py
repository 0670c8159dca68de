"""Where the images of a request are: found in chat messages or in /generate's image_data, in their order.

Called by the routes before anything is fetched or decoded; numbers are held to the limits here. Knows the
forms in which clients name an image, and nothing of image files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.vision.limits import PIXEL_FIELDS, ImageForm, ImageLimits, choose_pixels

IMAGE_PARTS = ("image", "image_url", "input_image")


class ImageFaultError(Exception):
    """What is wrong with an image, as the rest of a sentence that begins with it ("is not valid base64")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """One image of a request: its URL (or bare base64), and what the request says of its pixels."""

    url: str
    place: str  # in the request, for sentences
    param: str
    min_pixels: int
    max_pixels: int


def find_images(
    messages: Sequence[Mapping[str, Any]],
    form: ImageForm,
    limits: ImageLimits,
    pixels: Mapping[str, Any] | None = None,
) -> tuple[ImageSource, ...]:
    """The images of a conversation. `pixels` may hold min_pixels and max_pixels for those parts that say
    nothing themselves. Raises InvalidRequestError, naming the place, for a part that names no image and for
    too many of them."""
    found: list[ImageSource] = []
    for order, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        num_before = len(found)
        for part_order, part in enumerate(content):
            if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
                place = f"messages[{order}].content[{part_order}]"
                found.append(_read_part(part, place, form, limits, pixels or {}))
        if len(found) - num_before > limits.max_per_message:
            raise InvalidRequestError(
                f"A message may hold at most {limits.max_per_message} images on this server, "
                f"messages[{order}] holds {len(found) - num_before}.",
                param="messages",
            )
    _check_count(len(found), limits, "messages")
    return tuple(found)


def read_image_data(
    items: Sequence[Any], form: ImageForm, limits: ImageLimits, pixels: Mapping[str, Any] | None = None
) -> tuple[ImageSource, ...]:
    """The images of one prompt of /generate: URLs, bare base64, or objects with a url.

    Raises InvalidRequestError.
    """
    _check_count(len(items), limits, "image_data")
    found = []
    for order, item in enumerate(items):
        place = f"image_data[{order}]"
        part = {"url": item} if isinstance(item, str) else item
        if not isinstance(part, Mapping):
            raise InvalidRequestError(
                f"{place} must be a URL, base64 or an object with a url, got {type(item).__name__}.",
                param="image_data",
            )
        source = _read_part({**part, "image_url": part.get("url")}, place, form, limits, pixels or {})
        found.append(replace(source, param="image_data"))
    return tuple(found)


def _check_count(num_images: int, limits: ImageLimits, param: str) -> None:
    if num_images > limits.max_per_request:
        raise InvalidRequestError(
            f"A request may hold at most {limits.max_per_request} images on this server, got {num_images}.",
            param=param,
        )


def _read_part(
    part: Mapping[str, Any], place: str, form: ImageForm, limits: ImageLimits, pixels: Mapping[str, Any]
) -> ImageSource:
    named = part.get("image_url", part.get("image"))
    url = named.get("url") if isinstance(named, Mapping) else named
    if not isinstance(url, str) or not url:
        raise InvalidRequestError(
            f"{place} must name an image, as in {{'type': 'image_url', 'image_url': {{'url': 'data:...'}}}}.",
            param="messages",
        )
    asked = {name: _read_pixels(name, part, named, pixels, place) for name in PIXEL_FIELDS}
    least, most = choose_pixels(form, limits, asked["min_pixels"], asked["max_pixels"], place)
    return ImageSource(url=url, place=place, param="messages", min_pixels=least, max_pixels=most)


def _read_pixels(
    name: str, part: Mapping[str, Any], named: object, pixels: Mapping[str, Any], place: str
) -> int | None:
    """Of the part, of the object with its URL, or of the whole request."""
    inner = named.get(name) if isinstance(named, Mapping) else None
    value = next((value for value in (part.get(name), inner, pixels.get(name)) if value is not None), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidRequestError(f"{name} of {place} must be an integer, got {value!r}.", param=name)
    return value
