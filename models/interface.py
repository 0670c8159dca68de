"""What a model family offers to the loader and to the runner, and what it is given for one step.

A family file defines a frozen `Config` with `from_hf`, a `param_specs(cfg)` table, `divide(cfg,
num_devices)` for devices that share it, and an `nnx.Module` in two halves: `__call__(batch, kv) -> (x_TD,
kv)` is the forward pass up to the hidden states of every token, `compute_logits(x_BD) -> logits_BV` the
final norm and the head, for the rows that somebody wants: a vocabulary's worth of logits a token would be
most of a prefill's memory. `registry.py` finds the family by architecture name. Knows nothing of files,
schedulers or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from jaxserve.kernels_pallas.kv_layer import KVLayer as KVLayer  # what a forward pass is given and gives back
from jaxserve.kernels_pallas.kv_pages import KVPages

# An entry a layer, or one whose arrays have an axis of layers in front.
KVPool = list[KVLayer] | list[KVPages] | KVLayer | KVPages


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor of a checkpoint in Hugging Face naming, with the shape it must have there.

    `other_names` are what other writers call it; a checkpoint holds it under one of the names.
    """

    name: str
    shape: tuple[int, ...]
    other_names: tuple[str, ...] = ()


class Run(NamedTuple):
    """Consecutive indices of an axis, or as many zeros."""

    start: int | None  # None: zeros
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What each device holds of an axis, in order: indices of the checkpoint's axis, filled up with zeros so
    that all hold the same number. An index may be held by several."""

    runs_by_device: tuple[tuple[Run, ...], ...]

    @property
    def own_length(self) -> int:
        return sum(run.length for run in self.runs_by_device[0])

    @property
    def served_length(self) -> int:
        """Of the parts of all devices, behind each other."""
        return self.own_length * len(self.runs_by_device)

    def pick(self, devices: range | None) -> Cut:
        """What some consecutive devices hold of it; all, if None."""
        if devices is None:
            return self
        return Cut(self.runs_by_device[devices.start : devices.stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One served parameter and the checkpoint tensors that make it, concatenated along axis 0.

    `path` addresses the module attribute ("layers.3.w_qkv_FD"). `kind` is "matrix" ([output, input]) or
    "embedding" ([vocabulary, width]), both quantisable per row of axis 0, "exact" (a matrix that is never
    quantised), or "vector" (norms and biases: never quantised, kept in float32). `axes` are logical names for
    sharding, one an axis; `cuts` say how each is cut, if devices share the parameter (models/sharding.py).
    `group_size` is of a matrix that is served in 4 bits: inputs of the checkpoint that share a scale.
    `held` are those of the devices whose parts this process holds; None if all.
    `experts` are equal parts of the rows, of which a step reads those that its tokens chose.
    """

    path: str
    kind: str
    sources: tuple[TensorSource, ...]
    axes: tuple[str | None, ...]
    cuts: tuple[Cut | None, ...] = ()
    group_size: int = 0  # 0: not served in 4 bits
    held: range | None = None
    experts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """In the checkpoint."""
        first = self.sources[0].shape
        return (sum(source.shape[0] for source in self.sources), *first[1:])

    @property
    def served_shape(self) -> tuple[int, ...]:
        """Of the parts of all devices together."""
        if not self.cuts:
            return self.shape
        pairs = zip(self.shape, self.cuts, strict=True)
        return tuple(length if cut is None else cut.served_length for length, cut in pairs)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Of the parts that this process holds."""
        cuts = self.cuts or (None,) * len(self.shape)
        pairs = zip(self.shape, cuts, strict=True)
        return tuple(length if cut is None else cut.pick(self.held).served_length for length, cut in pairs)


class ImageTokens(NamedTuple):
    """What a step's tokens are given beside their ids in a family that sees images.

    The tokens of an image take rows of `feature_MD`, whose M rows are of any images and more than these:
    what `encode_images` gave, wherever the caller put it. `positions_3T` replaces `positions_T`.
    """

    positions_3T: jax.Array  # int32, time, row and column (jaxserve/vision/rope_positions.py)
    feature_row_T: jax.Array  # int32, row of feature_MD in place of the token's embedding; -1 for text
    feature_MD: jax.Array  # float32


class PatchPlaces(NamedTuple):
    """Where the U patches of one run of a vision encoder are; in the order of windows, padding behind them.

    Laid out by jaxserve/vision/windows.py, which says what the arrays mean. Such an encoder has parts that
    can be run one at a time: `embed(patch_UC)` and each of `blocks`, `block(x_UD, places)`, give the
    residual stream x_UD, and `merge(x_UD, order_M)` the features.
    """

    place_2U: jax.Array  # int32, row and column in the image
    window_U: jax.Array  # int32, -1 for padding
    image_U: jax.Array  # int32, -1 for padding
    order_M: jax.Array  # int32, where the m-th image token's square of patches is


class StepBatch(NamedTuple):
    """One step on the device: R decode rows, then C chunks packed into the remaining tokens.

    T = R + (padded chunk tokens). Padded rows and tokens have length 0 and write to page 0, the trash
    page. `table_XW` holds a block table a slot; decode rows and chunks name their slot.
    """

    token_ids_T: jax.Array  # int32
    positions_T: jax.Array  # int32, for rotary embedding only: behind images it is not the token's index
    write_index_T: jax.Array  # int32, page * S + offset: where each token's K and V go
    decode_slot_R: jax.Array  # int32
    decode_kv_len_R: jax.Array  # int32, tokens attended to, this one included; 0 for padding
    chunk_slot_C: jax.Array  # int32
    chunk_token_C: jax.Array  # int32, index in T of the chunk's first token
    chunk_len_C: jax.Array  # int32, tokens of this step; 0 for padding
    chunk_kv_len_C: jax.Array  # int32, start + chunk_len
    table_XW: jax.Array  # int32, page ids by slot (X slots)
    sample_token_B: jax.Array  # int32, index in T of the token whose logits row B samples
    images: ImageTokens | None = None  # None in programs that feed no image
    rope: tuple[jax.Array, jax.Array] | None = None  # the family's `rope_tables` of the positions
    work: Any = None  # of attention, for kernels that want it listed once for all layers (`list_work`)
    # Where a program loops over stacked layers, int32: whose turn it is, and the first of its pages in the
    # pool of all layers, which is page 0 of `table_XW` and of `write_index_T`.
    layer: jax.Array | None = None
    first_page: jax.Array | None = None


class ModelConfig(Protocol):
    """The fields that rooms outside a family read."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_context(self) -> int: ...


class Family(Protocol):
    """A family file seen as an object (the module itself satisfies it)."""

    Config: Any
    Model: Any

    def param_specs(self, cfg: Any) -> list[ParamSpec]: ...
    def divide(self, cfg: Any, num_devices: int) -> Any: ...  # a Division of models/sharding.py
