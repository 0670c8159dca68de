"""FeatureCache: which rows of the device's feature array hold what the vision tower made of which image.

Used by images.py. Rows are given in blocks, so that an image fits wherever there is room. Nothing is held
across steps but one image that is half encoded: the others stay until their rows are needed, the least
recently used first, and one that went is encoded again. So a request that ends, however it does, has nothing
to give back. Only what the plan at hand reads or writes is safe from the others (`begin_plan`); plans run in
order, so what an earlier one reads was read before. Knows content ids and row numbers: nothing of images,
requests or devices.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from jaxserve.scheduler.plan import ImageEncode

BLOCK_ROWS = 64


@dataclass(slots=True)
class FeatureCache:
    """Over `num_rows` rows, of which whole blocks can be used, for images of at most `max_image_tokens`."""

    num_rows: int
    max_image_tokens: int = 1 << 30
    num_evicted: int = 0  # images that gave way to others since the start
    is_due: bool = False  # whether the next plan's turn is an image's, because the last one's was not
    begun: ImageEncode | None = None  # what the last plan did of an image that is not done; its rows stay
    _free: list[int] = field(init=False)  # first rows of free blocks; the last one is given next
    _blocks: OrderedDict[str, list[int]] = field(init=False)  # by content id, least recently used first
    _in_plan: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._blocks, self._in_plan = OrderedDict(), set()
        self._free = self._list_blocks()[::-1]

    @property
    def capacity(self) -> int:
        """Tokens of the largest image that it takes."""
        return min(len(self._list_blocks()) * BLOCK_ROWS, self.max_image_tokens)

    def begin_plan(self) -> None:
        """A plan is launched or thrown away: what it read may give way to what the next one needs."""
        self._in_plan.clear()

    def use(self, content_id: str) -> bool:
        """Whether an image is there. If so, it stays for this plan."""
        if content_id not in self._blocks or self._is_begun(content_id):
            return False
        self._blocks.move_to_end(content_id)
        self._in_plan.add(content_id)
        return True

    def allot(self, content_id: str, num_tokens: int) -> bool:
        """Rows for an image that this plan encodes; False if what else it uses leaves too few."""
        assert content_id not in self._blocks, f"image {content_id} is there already"
        num_blocks = -(-num_tokens // BLOCK_ROWS)
        idle = [other for other in self._blocks if other not in self._in_plan and not self._is_begun(other)]
        if num_blocks > len(self._free) + sum(len(self._blocks[other]) for other in idle):
            return False
        for other in idle:
            if len(self._free) >= num_blocks:
                break
            self._free += self._blocks.pop(other)
            self.num_evicted += 1
        self._blocks[content_id] = [self._free.pop() for _ in range(num_blocks)]
        self._in_plan.add(content_id)
        return True

    def rows(self, content_id: str, start: int, stop: int) -> list[int]:
        """Where the features of an image's tokens from start to stop are."""
        blocks = self._blocks[content_id]
        return [blocks[place // BLOCK_ROWS] + place % BLOCK_ROWS for place in range(start, stop)]

    def clear(self) -> None:
        """Forget everything: the tower's weights, or the array, became others."""
        for blocks in self._blocks.values():
            self._free += blocks
        self._blocks.clear()
        self._in_plan.clear()
        self.begun = None

    def check_integrity(self) -> None:
        """Every block is free or of one image. Raises AssertionError."""
        held = [block for blocks in self._blocks.values() for block in blocks]
        found, wanted = sorted(held + self._free), self._list_blocks()
        assert found == wanted, f"blocks {found} are free or held, not {wanted}"

    def _is_begun(self, content_id: str) -> bool:
        return self.begun is not None and self.begun.content_id == content_id

    def _list_blocks(self) -> list[int]:
        return list(range(0, self.num_rows - BLOCK_ROWS + 1, BLOCK_ROWS))
