"""Which of several engines a request goes to: the one that knows its beginning, unless it is much busier.

Used by engine/group.py for --dp-size. Plain Python over numbers: no clock, no randomness, nothing of messages
or of processes. What it remembers is where prompts went, not what an engine's cache holds now: a wrong guess
costs a prefill and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxserve.images import PlacedImage

BLOCK_TOKENS = 32  # of a prompt that are remembered together
REQUEST_TOKENS = 256  # what an open request weighs beside its prompt: about the steps that it will take
# How much busier, in tokens, an engine may be than another for each token of the prompt that it need not
# compute. More keeps prompts with one beginning together longer, less spreads them sooner.
WORTH = 4


class Router:
    """Remembers the last `capacity_tokens` of prompts that each of some engines was given."""

    def __init__(self, num_engines: int, capacity_tokens: int):
        self._max_blocks = max(capacity_tokens // BLOCK_TOKENS, 1)
        # Of each engine: hashes of the blocks it was given, the last used at the end.
        self._known: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_engines)]
        self._num_given = [0] * num_engines  # tokens so far: of equals the one with least is next

    def choose(self, blocks: Sequence[int], loads: Sequence[int]) -> int:
        """The engine for a prompt of these `hash_blocks`; `loads` are the open tokens of each (`weigh`)."""

        def cost(rank: int) -> tuple[int, int, int]:
            num_known = self.count_known(rank, blocks) * BLOCK_TOKENS
            return loads[rank] - WORTH * num_known, loads[rank], self._num_given[rank]

        return min(range(len(loads)), key=cost)

    def count_known(self, rank: int, blocks: Sequence[int]) -> int:
        """How many of the first blocks the engine was given before."""
        known = self._known[rank]
        return next((order for order, block in enumerate(blocks) if block not in known), len(blocks))

    def note(self, rank: int, blocks: Sequence[int], num_tokens: int) -> None:
        """A prompt went to this engine."""
        known = self._known[rank]
        self._num_given[rank] += num_tokens
        for block in reversed(blocks):  # a block is of no use without those before it, so they stay longer
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._max_blocks:
            known.popitem(last=False)

    def forget(self, rank: int) -> None:
        """The engine's cache is empty."""
        self._known[rank].clear()


def weigh(num_prompt_tokens: int) -> int:
    """What an open request adds to its engine's load."""
    return num_prompt_tokens + REQUEST_TOKENS


def hash_blocks(prompt_ids: Sequence[int], cache_salt: str, images: Sequence[PlacedImage] = ()) -> list[int]:
    """One number for each whole block of a prompt, of all that the prefix cache tells apart up to its end."""
    blocks: list[int] = []
    before = hash(cache_salt)
    for start in range(0, len(prompt_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        end = start + BLOCK_TOKENS
        shown = tuple(placed.image.content_id for placed in images if start <= placed.offset < end)
        before = hash((before, tuple(prompt_ids[start:end]), shown))
        blocks.append(before)
    return blocks
