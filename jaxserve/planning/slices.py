"""From `v5e:4x4` to a slice: its chips, and how a model is cut over them. Knows no compiler."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import ConfigError
from jaxserve.models.interface import ModelConfig, ParamSpec
from jaxserve.planning.chips import CHIPS, Chip

MAX_DEVICES = 9216  # of the largest slice that is sold
HOST_AXIS = 2  # the chips of a host are a square


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Chips of one kind, linked; `dims` is their grid."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    def find_part(self, num_devices: int) -> Slice:
        """The smallest slice sold that so many devices fill evenly: what a copy of a model is launched on, as
        programs for some devices of a large one do not compile. This one if there is none."""
        sold = (Slice(chip=self.chip, dims=_read_dims(self.chip, size)) for size in self.chip.slices)
        parts = [part for part in sold if part.num_devices < self.num_devices]
        parts = [part for part in parts if part.num_devices % num_devices == 0]
        return min(parts, key=lambda part: part.num_devices, default=self)

    def find_group(self, num_devices: int) -> tuple[int, ...]:
        """The grid of the first so many devices: those of a host are a square, and hosts follow each other
        along the first axis."""
        num_chips = math.ceil(num_devices / self.chip.devices_per_chip)
        group = [1] * len(self.dims)
        for place, most in [*enumerate((HOST_AXIS, HOST_AXIS)[: len(group)]), *enumerate(self.dims)]:
            room = min(most, self.dims[place]) // group[place]
            group[place] *= max(1, min(room, num_chips // math.prod(group)))
        return tuple(group)


def list_slices(words: Sequence[str]) -> list[Slice]:
    """The slices that `--topology` names: v5e:4x4, v5e (all its sizes), h200:8, or all; commas may join them.

    Raises ConfigError for what is none.
    """
    found: list[Slice] = []
    for word in ",".join(words).split(","):
        name, colon, dims = word.strip().partition(":")
        for chip in CHIPS if name == "all" else [_find_chip(name)]:
            sizes = (dims,) if colon else chip.slices
            found += [Slice(chip=chip, dims=_read_dims(chip, size)) for size in sizes]
    return list(dict.fromkeys(found))


def _find_chip(name: str) -> Chip:
    by_name = {chip.name: chip for chip in CHIPS}
    if name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(name, by_name, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"topology {name!r} is of no chip that is known ({', '.join(by_name)}, or all).{hint}",
        param="topology",
    )


def _read_dims(chip: Chip, text: str) -> tuple[int, ...]:
    example = f"{chip.name}:{chip.slices[-1]}"
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"topology {chip.name}:{text} is no grid of chips; write {example}.", param="topology"
        )
    dims = tuple(int(part) for part in parts)
    if len(dims) != chip.num_axes or math.prod(dims) * chip.devices_per_chip > MAX_DEVICES:
        raise ConfigError(
            f"topology {chip.name}:{text} is no slice: a grid of {chip.name} has {chip.num_axes} "
            f"{'axis' if chip.num_axes == 1 else 'axes'}, as in {example}.",
            param="topology",
        )
    return dims


def count_copies(num_devices: int, tp_size: int, dp_size: int) -> int:
    """Copies of a model on a slice: as many as asked for, or as there is room for where nobody asks."""
    return dp_size if dp_size > 1 else num_devices // tp_size


def choose_tp_size(cfg: ModelConfig, specs: Sequence[ParamSpec], num_devices: int) -> int:
    """The most devices of a slice that can share each layer; the rest of it holds further copies.

    Query heads, and every tensor of a cut parameter, must divide by it. There may be more devices than KV
    heads: then some hold the same head.
    """
    sizes = [cfg.num_heads]
    for spec in specs:
        for place, axis in enumerate(spec.axes):
            # Of axes made of heads the number of heads counts. What does not divide would be filled up.
            if axis not in (None, "heads", "qkv"):
                sizes += [source.shape[place] for source in spec.sources]
    shared = math.gcd(num_devices, *sizes)
    divisors = [count for count in range(1, shared + 1) if shared % count == 0]
    kv_heads = cfg.num_kv_heads
    return max(count for count in divisors if count % kv_heads == 0 or kv_heads % count == 0)
