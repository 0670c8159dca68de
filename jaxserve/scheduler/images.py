"""What images mean for a plan: which one is encoded in it, and how far prefills get without the others.

Called by admit.py while it gathers offers, in their order. At most one image is encoded in a step. Where
sequences are decoding, such a step has no prefill beside it, so that they wait for one of the two and not for
both; it is taken when the first in order can get no further without it, and at the latest in the step after
one in which anybody could not. So neither text nor images starve. And of a large image such a step has only
the encoder's stages that take no longer than a chunk of a prompt; the next steps have the others, whether
or not its request is still there. Where nothing decodes, the image's tokens may follow in the same plan: it
is encoded before the step's programs run. Knows nothing of pixels or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxserve.errors import InvalidRequestError
from jaxserve.images import PlacedImage
from jaxserve.scheduler.features import FeatureCache
from jaxserve.scheduler.plan import NO_ROW, ImageEncode, StepLimits

ID_DIGITS = 16  # of a content id: enough that two images never meet


@dataclass(slots=True)
class ImagePass:
    """The images of one plan in the making. `has_rows`: whether the step has decode rows; `is_due`: whether
    it is an image's turn."""

    cache: FeatureCache
    limits: StepLimits
    has_rows: bool
    is_due: bool = False
    encode: ImageEncode | None = None
    num_offers: int = 0  # that take part in the step so far

    def limit(self, images: Sequence[PlacedImage], start: int, num_tokens: int) -> int:
        """How many of the tokens from `start` on this step can compute; asked in the order of offers."""
        if self.encode is not None and self.has_rows:
            return 0
        stop = start + num_tokens
        for placed in images:
            if placed.offset >= stop:
                break
            if placed.end > start and not self.cache.use(placed.image.content_id):
                is_needed_now = placed.offset <= start
                if not self._plan_encode(placed, is_needed_now) or self.has_rows:
                    stop = max(placed.offset, start)
                    break
        if self.has_rows and (self.is_due or self.encode is not None):
            return 0
        self.num_offers += stop > start
        return stop - start

    def _plan_encode(self, placed: PlacedImage, is_needed_now: bool) -> bool:
        """Whether an image is encoded in this step."""
        image = placed.image
        if self.encode is not None or image.num_patches > self.limits.max_image_patches:
            return False
        if self.has_rows and (self.num_offers or not is_needed_now):
            self.cache.is_due |= is_needed_now
            return False
        if not self.cache.allot(image.content_id, image.num_tokens):
            return False
        rows = self.cache.rows(image.content_id, 0, image.num_tokens)
        self._run_stages(ImageEncode(image.content_id, image.grid, image.patches, rows), image.num_patches)
        return True

    def go_on(self, begun: ImageEncode) -> None:
        """Plan the next stages of an image."""
        frames, height, width = begun.grid
        rest = replace(begun, patches=b"", first_stage=begun.end_stage)
        self._run_stages(rest, frames * height * width)

    def _run_stages(self, encode: ImageEncode, num_patches: int) -> None:
        """Plan stages from `encode.first_stage` on: all that are left, or a chunk's worth if others wait."""
        num_stages = self.limits.num_image_stages
        end = num_stages
        if self.has_rows:
            end = min(end, encode.first_stage + self.limits.count_image_stages(num_patches))
        self.encode = replace(encode, end_stage=end, is_last=end == num_stages)
        self.cache.begun = None if self.encode.is_last else self.encode


def begin_images(cache: FeatureCache | None, limits: StepLimits, *, has_rows: bool) -> ImagePass | None:
    """None for a model that reads text only."""
    if cache is None:
        return None
    is_due, cache.is_due = cache.is_due and has_rows, False
    cache.begin_plan()
    images = ImagePass(cache, limits, has_rows, is_due)
    if cache.begun is not None:
        images.go_on(cache.begun)
    return images


def check_images(cache: FeatureCache | None, images: Sequence[PlacedImage]) -> None:
    """Raise InvalidRequestError if the model reads no images, or one can never be encoded."""
    if images and cache is None:
        raise InvalidRequestError("This model does not accept images.", param="messages")
    for placed in images:
        num_tokens = placed.image.num_tokens
        if cache is not None and num_tokens > cache.capacity:
            raise InvalidRequestError(
                f"An image has {num_tokens} tokens, and this server takes {cache.capacity} at most. Send a "
                "smaller one, or lower its max_pixels.",
                param="messages",
            )


def find_rows(cache: FeatureCache | None, images: Sequence[PlacedImage], start: int, stop: int) -> list[int]:
    """For each token from start to stop the row of its features, NO_ROW for text; [] if all is text."""
    here = [placed for placed in images if placed.offset < stop and placed.end > start]
    if not here or cache is None:
        return []
    rows = [NO_ROW] * (stop - start)
    for placed in here:
        first, last = max(placed.offset, start), min(placed.end, stop)
        found = cache.rows(placed.image.content_id, first - placed.offset, last - placed.offset)
        rows[first - start : last - start] = found
    return rows


def find_cache_ids(prompt_ids: list[int], images: Sequence[PlacedImage]) -> list[int]:
    """What the prefix cache knows a prompt by: its token ids, and in place of an image's, which are all the
    same, negative numbers made of the image's content and the place in it."""
    cache_ids = list(prompt_ids)
    for placed in images:
        first = -1 - (int(placed.image.content_id[:ID_DIGITS], 16) << 16)
        cache_ids[placed.offset : placed.end] = range(first, first - placed.image.num_tokens, -1)
    return cache_ids
