"""The images of a request on the HTTP side: found by the routes, read in processes of their own, and put into
the prompt that goes to the engine.

Shared by the chat route, /generate and the library. Knows nothing of image files or of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jaxserve.errors import InvalidRequestError, OverloadedError
from jaxserve.images import PlacedImage
from jaxserve.vision.limits import PIXEL_FIELDS
from jaxserve.vision.loader import ImageLoader
from jaxserve.vision.placeholders import expand_placeholders
from jaxserve.vision.sources import ImageSource, find_images, read_image_data

MAX_OPEN_BYTES = 2 << 30  # of the images of open requests, here and in the engine each
NO_IMAGES = "This model does not accept images."


class ImageReader:
    """The loader of a model that takes images, and the token that stands for one in a prompt."""

    def __init__(self, loader: ImageLoader, token_id: int):
        self.loader = loader
        self.token_id = token_id
        self._num_open_bytes = 0

    def find(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None
    ) -> tuple[ImageSource, ...]:
        """The images of a conversation. `settings` is the request's mm_processor_kwargs."""
        pixels = _read_settings(settings)
        return find_images(messages, self.loader.form, self.loader.limits, pixels)

    def find_data(self, items: Sequence[Any], settings: Mapping[str, Any] | None) -> tuple[ImageSource, ...]:
        """The images of one prompt of /generate."""
        pixels = _read_settings(settings)
        return read_image_data(items, self.loader.form, self.loader.limits, pixels)

    @contextmanager
    def hold(self, images: Sequence[tuple[PlacedImage, ...]]) -> Iterator[None]:
        """While a request is open; OverloadedError if the images of all open ones are too large."""
        num_bytes = sum(len(placed.image.patches) for prompt in images for placed in prompt)
        if num_bytes and self._num_open_bytes + num_bytes > MAX_OPEN_BYTES:
            raise OverloadedError("The images of open requests fill the memory for them; try again shortly.")
        self._num_open_bytes += num_bytes
        try:
            yield
        finally:
            self._num_open_bytes -= num_bytes


async def place_images(
    reader: ImageReader | None,
    prompts: list[list[int]],
    sources: Sequence[tuple[ImageSource, ...]],
    fields: Sequence[str],
) -> tuple[list[list[int]], list[tuple[PlacedImage, ...]]]:
    """Prompts with their images in place, `sources` of each; `fields` are what the client calls the prompts.

    Raises InvalidRequestError for what is wrong with one of them, and where the model takes none.
    """
    if reader is None:
        if any(sources):
            raise InvalidRequestError(NO_IMAGES, param="messages")
        return prompts, [()] * len(prompts)
    loaded = iter(await reader.loader.load([source for images in sources for source in images]))
    pairs = [
        expand_placeholders(prompt_ids, [next(loaded) for _ in images], reader.token_id, field)
        for prompt_ids, images, field in zip(prompts, sources, fields, strict=True)
    ]
    return [prompt_ids for prompt_ids, _ in pairs], [placed for _, placed in pairs]


def hold_images(
    reader: ImageReader | None, images: Sequence[tuple[PlacedImage, ...]]
) -> AbstractContextManager[None]:
    """Count them while a request is open. Raises OverloadedError, on entry."""
    return nullcontext() if reader is None else reader.hold(images)


def spread_image_data(data: Any, num_prompts: int, is_list: bool) -> list[list[Any]]:
    """image_data of /generate for each prompt: one image or several for one prompt; for a list of prompts a
    list with an entry for each, which is an image, a list of images or null."""
    if data is None or data == []:
        return [[]] * num_prompts
    items = data if isinstance(data, list) else [data]
    if is_list and len(items) != num_prompts:
        raise InvalidRequestError(
            f"image_data must have one entry for each of the {num_prompts} prompts, got {len(items)}.",
            param="image_data",
        )
    if not is_list:
        nested = len(items) == 1 and isinstance(items[0], list)
        items = items if nested else [items]
    return [item if isinstance(item, list) else [item] * (item is not None) for item in items]


def _read_settings(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    unknown = (settings or {}).keys() - set(PIXEL_FIELDS)
    if unknown:
        raise InvalidRequestError(
            f"mm_processor_kwargs may hold {' and '.join(PIXEL_FIELDS)}, got {', '.join(sorted(unknown))}.",
            param="mm_processor_kwargs",
        )
    return settings or {}
