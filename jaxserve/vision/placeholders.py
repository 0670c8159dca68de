"""Puts images into a prompt: the token that stands for one in a template becomes as many as the image takes.

Called by the HTTP side when a prompt is tokenised and its images are read. Pure functions of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.images import ImagePatches, PlacedImage


def expand_placeholders(
    prompt_ids: list[int], images: Sequence[ImagePatches], image_token_id: int, field: str
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The prompt with each image's tokens in place of its one, and where they begin.

    Raises InvalidRequestError, about `field`, unless there is one such token for every image.
    """
    num_places = prompt_ids.count(image_token_id)
    if num_places != len(images):
        raise InvalidRequestError(
            f"{field} must hold the model's image token once for each image, and nowhere else: it holds it "
            f"{num_places} times, and there are {len(images)} images.",
            param=field,
        )
    if not images:
        return prompt_ids, ()
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    start = 0
    for image in images:
        place = prompt_ids.index(image_token_id, start)
        expanded += prompt_ids[start:place]
        placed.append(PlacedImage(len(expanded), image))
        expanded += [image_token_id] * image.num_tokens
        start = place + 1
    return expanded + prompt_ids[start:], tuple(placed)
