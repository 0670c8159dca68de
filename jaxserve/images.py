"""Images as plain data, between the room that reads them (vision/) and those that serve them.

Used by the HTTP side, the engine and the scheduler alike. Knows nothing of image files, arrays or devices.
"""

from __future__ import annotations

import msgspec


class ImagePatches(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An image, resized and cut into the patches of a vision tower (vision/patches.py says in which order).

    `content_id` is a hash of grid and patches: 32 hexadecimal digits, the same for images that the model
    cannot tell apart. `grid` counts patches in time, down and across; `patches` are their bytes, uint8.
    """

    content_id: str
    grid: tuple[int, int, int]
    num_tokens: int  # of a prompt, in the image's place
    patches: bytes

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class PlacedImage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An image of a prompt: its tokens begin at `offset`."""

    offset: int
    image: ImagePatches

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.offset + self.image.num_tokens
