"""The short ladder of program shapes, and which of them a step runs in.

A program is named by its shape (R decode rows, T prefill tokens); `Shape(8, 0)` is a decode program,
`Shape(0, 256)` a prefill program, `Shape(8, 256)` a mixed one, `Shape(8, 0, 4)` a window of four decode
steps. Plain Python: no arrays, no devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_CHUNKS_PER_STEP = 8  # prefill programs compute this many rows of logits


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    num_rows: int
    num_tokens: int  # of prefill
    window: int = 1  # steps of one launch

    @property
    def num_chunks(self) -> int:
        return min(MAX_CHUNKS_PER_STEP, self.num_tokens)

    @property
    def num_sampled(self) -> int:
        return self.num_rows + self.num_chunks

    def __str__(self) -> str:
        parts = [f"{self.num_rows} row{'s' if self.num_rows > 1 else ''}"] if self.num_rows else []
        parts += [f"{self.num_tokens} tokens"] if self.num_tokens else []
        return " + ".join(parts) + (f", {self.window} steps" if self.window > 1 else "")


@dataclass(frozen=True, slots=True)
class Ladder:
    """Every shape that a server may run, in the order they are worth compiling."""

    shapes: tuple[Shape, ...]
    max_mixed_tokens: int  # of prefill in a step that has decode rows too, which wait for it

    @property
    def token_buckets(self) -> tuple[int, ...]:
        return tuple(sorted({shape.num_tokens for shape in self.shapes if shape.num_tokens}))

    @property
    def window(self) -> int:
        """The most decode steps of one launch."""
        return max(shape.window for shape in self.shapes)


def make_ladder(
    *,
    max_rows: int,
    max_tokens: int,
    min_rows: int,
    mixes: bool,
    max_mixed_tokens: int | None = None,
    window: int = 1,
) -> Ladder:
    """Rows: powers of two from min_rows. Tokens: powers of four from 16, and the largest, half and a quarter
    of it.

    The first two shapes are the ones to compile before serving: a decode program of the fewest rows
    and a prefill program. Those that let more be done at once follow: eight times the rows, the longest
    chunk, again eight times the rows and so on, and the most rows. The others, which save time only, come
    last, smallest first, and mixed ones after them, which save least. With a `window` above 1 each decode
    program has one that runs so many steps, compiled right behind it.
    """
    rows = _powers(min_rows, max(min_rows, max_rows), 2)
    tokens = sorted(
        {*_powers(min(16, max_tokens), max_tokens, 4), *(max(max_tokens // n, 1) for n in (2, 4))}
    )
    first_tokens = next(count for count in tokens if count >= min(64, max_tokens))
    first = [Shape(rows[0], 0), Shape(0, first_tokens)]
    steps = [Shape(count, 0) for count in [*rows[3::3], rows[-1]]]
    steps.insert(1, Shape(0, tokens[-1]))
    fills = [Shape(count, 0) for count in rows] + [Shape(0, count) for count in tokens]
    fills.sort(key=lambda shape: shape.num_rows * 8 + shape.num_tokens)
    max_mixed_tokens = max_tokens if max_mixed_tokens is None else max_mixed_tokens
    mixed = [Shape(max_rows, count) for count in tokens if count <= max_mixed_tokens] if mixes else []
    single = list(dict.fromkeys(first + steps + fills + mixed))
    if window == 1:
        return Ladder(tuple(single), max_mixed_tokens)
    rest = [
        each
        for shape in single[len(first) :]
        for each in (shape, *([] if shape.num_tokens else [replace(shape, window=window)]))
    ]
    return Ladder((*first, replace(first[0], window=window), *rest), max_mixed_tokens)


def split_step(num_rows: int, num_tokens: int, ready: Iterable[Shape], window: int = 1) -> list[Shape] | None:
    """The programs that run a step, or a window of decode steps: one when a mixed program is ready, else
    decode and then prefill.

    Each is the smallest ready one that holds its part. None when some part fits no ready program.
    """
    ready = sorted(ready, key=lambda shape: (shape.num_tokens, shape.num_rows))
    if num_rows and num_tokens:
        for shape in ready:
            if shape.num_rows >= num_rows and shape.num_tokens >= num_tokens:
                return [shape]
    launches = []
    if num_rows:
        fits = [s for s in ready if not s.num_tokens and s.num_rows >= num_rows and s.window == window]
        launches.append(fits[0] if fits else None)
    if num_tokens:
        fits = [s for s in ready if not s.num_rows and s.num_tokens >= num_tokens]
        launches.append(fits[0] if fits else None)
    return None if None in launches else launches


def _powers(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below last, and last."""
    values = []
    value = first
    while value < last:
        values.append(value)
        value *= factor
    return [*values, last]
