"""Where tokens stand in a prompt with images: three positions a token, and what later tokens are moved by.

Text counts one, two, three on all three axes. The tokens of an image share its place in time, and count rows
and columns of their own; the text behind it goes on after the largest of all (M-RoPE, Wang et al. 2024,
Qwen2-VL). So a position is no longer a token's index, and the tokens of a reply are moved by a constant:

    token      a  b  <  #  #  #  #  #  #  >  c        # image of 2 x 3 tokens, between < and >
    index      0  1  2  3  4  5  6  7  8  9 10
    time       0  1  2  3  3  3  3  3  3  6  7
    row        0  1  2  3  3  3  4  4  4  6  7
    column     0  1  2  3  4  5  3  4  5  6  7        delta = 7 - 10 = -3

Called by the HTTP side when it has read a request's images, and by whoever packs a step. NumPy only; knows
nothing of pixels, tokenizers or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Frames, rows and columns of patches; frames is 1 for a picture. The processor's image_grid_thw.
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class RopePositions:
    """Positions of a prompt's tokens, int32 [3, tokens], and `delta` for the tokens behind them."""

    prompt: np.ndarray
    delta: int

    def at(self, start: int, stop: int) -> np.ndarray:
        """int32 [3, stop - start] for the tokens with these indices, which may lie behind the prompt."""
        num_prompt = self.prompt.shape[1]
        behind = np.arange(max(start, num_prompt), max(stop, num_prompt), dtype=np.int32) + self.delta
        within = self.prompt[:, start : min(stop, num_prompt)]
        return np.concatenate([within, np.broadcast_to(behind, (3, len(behind)))], axis=1, dtype=np.int32)


def count_image_tokens(grid: Grid, merge_size: int) -> int:
    """Tokens that an image takes in the prompt: one for merge_size x merge_size patches."""
    frames, rows, columns = grid
    return frames * (rows // merge_size) * (columns // merge_size)


def find_image_spans(
    token_ids: Sequence[int], grids: Sequence[Grid], *, image_token_id: int, merge_size: int
) -> list[tuple[int, int]]:
    """Start and end of each image's tokens, images in the order of the prompt.

    Raises ValueError if the image tokens of the prompt are not those of the images: another number, or an
    image's tokens with something between them.
    """
    places = np.flatnonzero(np.asarray(token_ids, np.int64) == image_token_id)
    counts = [count_image_tokens(grid, merge_size) for grid in grids]
    if len(places) != sum(counts):
        raise ValueError(
            f"the prompt has {len(places)} image tokens, its {len(grids)} images take {sum(counts)}"
        )
    spans = []
    first = 0
    for number, count in enumerate(counts):
        start, stop = int(places[first]), int(places[first + count - 1]) + 1
        if stop - start != count:
            raise ValueError(f"the {count} tokens of image {number + 1} are not next to each other")
        spans.append((start, stop))
        first += count
    return spans


def find_rope_positions(
    token_ids: Sequence[int], grids: Sequence[Grid], *, image_token_id: int, merge_size: int
) -> RopePositions:
    """The positions of a prompt; `token_ids` holds every image token. Raises ValueError as
    `find_image_spans` does."""
    spans = find_image_spans(token_ids, grids, image_token_id=image_token_id, merge_size=merge_size)
    pieces: list[np.ndarray] = []
    num_done = position = 0
    for grid, (start, stop) in zip(grids, spans, strict=True):
        pieces += [_count_text(start - num_done, position), _count_image(grid, merge_size)]
        position += start - num_done
        pieces[-1] += position
        position += max(grid[1:]) // merge_size
        num_done = stop
    pieces.append(_count_text(len(token_ids) - num_done, position))
    position += len(token_ids) - num_done
    return RopePositions(np.concatenate(pieces, axis=1), position - len(token_ids))


def _count_text(num_tokens: int, position: int) -> np.ndarray:
    return np.tile(np.arange(position, position + num_tokens, dtype=np.int32), (3, 1))


def _count_image(grid: Grid, merge_size: int) -> np.ndarray:
    """Frame, row and column of each of an image's tokens, int32 [3, tokens], row after row."""
    frames, rows, columns = grid
    return np.indices((frames, rows // merge_size, columns // merge_size), np.int32).reshape(3, -1)
