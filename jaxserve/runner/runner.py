"""ModelRunner: runs StepPlans on the device. One upload, one launch, one small download a step.

Called by engine/loop.py. Holds the parameters, the device state and the compiled programs; a step's
tokens come back as a `PendingStep` that is read later, so that the next step can be launched first.
Knows pages, slots and token ids; knows nothing of requests, text or the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.runner.batch import pack_step, slot_params
from jaxserve.runner.buckets import Ladder, Shape, split_step
from jaxserve.runner.checkpoint import Checkpoint, OnProgress, log_progress
from jaxserve.runner.device_state import PoolSize, edit_rows, watched_row
from jaxserve.runner.forks import pack_forks
from jaxserve.runner.images import ImageSizes, SlotPositions
from jaxserve.runner.memory import (
    MemoryUse,
    Weights,
    allocated_bytes,
    delete_arrays,
    live_bytes,
    trim_host_memory,
)
from jaxserve.runner.pending import PendingStep, note_launch
from jaxserve.runner.programs import ONE_HOST, ProgramHosts, Programs, StepArrays
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk, SlotInit, StepLimits, StepPlan
from jaxserve.types import KV_CACHE, WEIGHTS, ScoreParams, TokenParams
from jaxserve.weights.placement import ALONE

REHEARSED_TOKENS = 512  # of context, in a program's first run

logger = logging.getLogger("jaxserve.runner")


class Update(NamedTuple):
    """Weights to serve instead of the present ones: their values on the host."""

    checkpoint: Checkpoint
    values: list[np.ndarray]


class StepPrograms(NamedTuple):
    """Which programs a plan runs as. Hosts that share a model must run the same."""

    shapes: tuple[Shape, ...]  # decode before prefill, if they are two
    num_patches: int = 0  # of the program that encodes the plan's image


class ModelRunner:
    """`checkpoint` is what `model` is of; without it dropped weights cannot come back. A model without
    parameters (Checkpoint.describe_model) is enough to compile for; then `load` must follow. Where devices
    share the model, `model` and `cfg` are one device's part. `images` are there if the model takes them;
    `hosts` if others run the same steps."""

    def __init__(
        self,
        model: nnx.Module,
        cfg: Any,
        pool: PoolSize,
        kv_dtype: jnp.dtype,
        ladder: Ladder,
        checkpoint: Checkpoint | None = None,
        images: ImageSizes | None = None,
        hosts: ProgramHosts = ONE_HOST,
    ):
        placement = ALONE if checkpoint is None else checkpoint.placement
        self.programs = Programs(model, cfg, pool, kv_dtype, ladder, placement, images, hosts)
        self._encoder = self.programs.encoder
        self._positions = None if images is None else SlotPositions(pool.num_slots + 1, images)
        self.compiles = self.programs.compiles
        self._weights = Weights(nnx.split(model)[1])
        self._checkpoint = checkpoint
        self._state = self.programs.allocate()
        self._vocab_size = cfg.vocab_size
        self._pool = pool
        greedy_F = slot_params(TokenParams(max_new_tokens=0), 0)  # padding asks for nothing, not even top-p
        self._params_XF = np.tile(greedy_F, (pool.num_slots + 1, 1))
        self._scores_X: list[ScoreParams | None] = [None] * (pool.num_slots + 1)
        self._has_run: set[Shape] = set()
        self._write_slot = self.programs.compile_slot_writer()
        self._write_watched = self.programs.compile_watched_writer()

    @property
    def param_bytes(self) -> int:
        return live_bytes(self._weights.tree)

    @property
    def kv_bytes(self) -> int:
        return live_bytes(self._state.kv)

    @property
    def _features(self) -> tuple[jax.Array, ...]:
        """What is kept of images; nothing for a model that reads text only."""
        return () if self._encoder is None else (self._encoder.feature_MD,)

    def load(self, on_progress: OnProgress) -> None:
        """Read the weights, at the start or where they were dropped. Raises WeightError."""
        assert self._checkpoint is not None, "there is no checkpoint to read the weights from"
        self._weights.put_new(self._checkpoint.read_tree(on_progress))

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile what serving needs first: the ladder's first two programs."""
        self.programs.compile_first(on_progress)

    def close(self) -> None:
        """Stop compiling and reading in the background; the runner must not be used afterwards."""
        self.stop_reading()
        self.programs.stop()
        self.compiles.close()

    def compile_counts(self) -> tuple[int, int, bool]:
        """Compiles so far, those after warm-up, and whether every program of the ladder is ready."""
        return self.compiles.num_compiles, self.compiles.num_late_compiles, self.programs.is_warm

    def limits(self) -> StepLimits:
        """What a step may hold, given the programs that are ready now."""
        is_final = self.programs.is_over  # read before what it is about
        ready = self.programs.ready
        token_buckets = sorted(
            {shape.num_tokens for shape in ready if shape.num_tokens and not shape.num_rows}
        )
        row_buckets = sorted(shape.num_rows for shape in ready if not shape.num_tokens and shape.window == 1)
        window_rows = sorted(shape.num_rows for shape in ready if shape.window > 1)
        max_mixed_tokens = min(token_buckets[-1], self.programs.ladder.max_mixed_tokens)
        encoder = self._encoder
        return StepLimits(
            page_size=self._pool.page_size,
            max_rows=min(row_buckets[-1], self._pool.num_slots),
            max_chunks=min(shape.num_chunks for shape in ready if shape.num_tokens),
            max_chunk_tokens=token_buckets[-1],
            token_buckets=tuple(token_buckets),
            max_mixed_tokens=max_mixed_tokens,
            is_final=is_final,
            can_fork=self.programs.write_forks is not None,
            row_buckets=tuple(row_buckets),
            window=self.programs.ladder.window,
            window_rows=tuple(window_rows),
            max_image_patches=0 if encoder is None else encoder.max_patches,
            num_image_stages=1 if encoder is None else encoder.sizes.num_stages,
            stages_a_step=() if encoder is None else encoder.count_stages(max_mixed_tokens),
        )

    def choose(self, plan: StepPlan) -> StepPrograms:
        """The programs for a plan that fits `limits()`."""
        ready = list(self.programs.ready)
        shapes = split_step(len(plan.decode), plan.num_chunk_tokens, ready, plan.window)
        assert shapes is not None, f"no program is ready for {plan}"
        if plan.encode is None:
            return StepPrograms(tuple(shapes))
        assert self._encoder is not None, "a model that reads text only has an image to encode"
        return StepPrograms(tuple(shapes), self._encoder.choose(plan.encode))

    def step(self, plan: StepPlan) -> PendingStep:
        """Launch a plan and return at once. The plan must fit `limits()`."""
        return self.step_as(plan, self.choose(plan))

    def step_as(self, plan: StepPlan, chosen: StepPrograms) -> PendingStep:
        """The same, as the programs that `choose` gave, here or on the host that leads."""
        self.programs.background.note_step(is_pressed=plan.num_waiting > 0)
        for init in plan.inits:
            self._init_slot(init)
        self._fork(plan)
        if plan.encode is not None and self._encoder is not None:
            self._encoder.encode(self._weights.tree, plan.encode, chosen.num_patches)
        launches = []
        for shape in chosen.shapes:
            decode = plan.decode if shape.num_rows else ()
            chunks = plan.chunks if shape.num_tokens else ()
            arrays = self._launch(shape, self._pack(shape, decode, chunks))
            launches.append(note_launch(arrays, shape, decode, chunks, self._scores_X))
        return PendingStep(tuple(launches), self._vocab_size)

    def _pack(self, shape: Shape, decode: Sequence[DecodeRow], chunks: Sequence[PrefillChunk]) -> np.ndarray:
        page_size, table_width = self._pool.page_size, self._pool.table_width
        return pack_step(shape, decode, chunks, self._params_XF, page_size, table_width, self._positions)

    def _launch(self, shape: Shape, packed: np.ndarray) -> StepArrays:
        run = self.programs.ready[shape]
        self._state, arrays = run(self._weights.tree, self._state, packed, *self._features)
        self._has_run.add(shape)
        return arrays

    def rehearse(self) -> bool:
        """Run one ready program that never ran, so that no request waits for what its first run prepares (on
        the CPU every product: half a second). Returns whether there was one."""
        program = self.find_unrehearsed()
        if program is not None:
            self.rehearse_program(program)
        return program is not None

    def find_unrehearsed(self) -> StepPrograms | None:
        """A ready program that never ran."""
        for shape in self.programs.ready:
            if shape not in self._has_run:
                return StepPrograms((shape,))
        bucket = None if self._encoder is None else self._encoder.find_unrehearsed()
        return None if bucket is None else StepPrograms((), bucket)

    def rehearse_program(self, program: StepPrograms) -> None:
        """Run what `find_unrehearsed` gave, on nothing.

        All slots must be free and the memory here: a token of nobody runs in slot 0 and is kept in page 0,
        which no sequence has. Its position is such that every loop of attention has a turn.
        """
        if not program.shapes:
            assert self._encoder is not None, "a model that reads text only rehearses an image"
            self._encoder.rehearse(self._weights.tree, program.num_patches)
            return
        (shape,) = program.shapes
        position = min(REHEARSED_TOKENS, self._pool.table_width * self._pool.page_size) - shape.window
        pages = [0] * self._pool.table_width
        row = DecodeRow(0, 0, 0, position, 0, token_id=0, num_steps=shape.window)
        decode = [row] if shape.num_rows else []
        chunks = [PrefillChunk(0, 0, 0, position, [0], pages, samples=False)] if shape.num_tokens else []
        jax.block_until_ready(self._launch(shape, self._pack(shape, decode, chunks)))

    def _fork(self, plan: StepPlan) -> None:
        for packed in pack_forks(plan.tables, plan.copies, self._pool.num_slots, self._pool.table_width):
            assert self.programs.write_forks is not None, f"forks are not ready for {plan}"
            self._state = self.programs.write_forks(self._state, packed)

    def _init_slot(self, init: SlotInit) -> None:
        self._params_XF[init.slot] = slot_params(init.params, len(init.prompt_ids))
        if init.params.has_extras:
            edits_V, bias_V = edit_rows(
                self._state.edits_XV.shape[1], init.params, init.prompt_ids, init.output_ids
            )
            self._state = self._write_slot(self._state, np.int32(init.slot), edits_V, bias_V)
        if self._positions is not None:
            self._positions.begin(init)
        scores = init.params.scores
        self._scores_X[init.slot] = scores
        if scores is not None and scores.watched_ids:
            watched_M = watched_row(scores.watched_ids)
            watched_XM = self._write_watched(self._state.watched_XM, np.int32(init.slot), watched_M)
            self._state = self._state._replace(watched_XM=watched_XM)

    def memory_use(self) -> MemoryUse:
        """What is held now."""
        is_away = {WEIGHTS: self._weights.is_away, KV_CACHE: live_bytes(self._state) == 0}
        return MemoryUse(
            param_bytes=self.param_bytes,
            kv_bytes=self.kv_bytes,
            slot_bytes=live_bytes(self._state) - self.kv_bytes + live_bytes(self._features),
            device_bytes=allocated_bytes(),
            host_param_bytes=self._weights.kept_bytes,
            released=tuple(tag for tag, is_released in is_away.items() if is_released),
        )

    def release_memory(self, tags: Collection[str], *, keeps_weights: bool) -> None:
        """Free device memory; what is away already stays away. No step may run until it is back.

        Weights that are kept go to the host; without `keeps_weights` a copy there goes too.
        """
        if WEIGHTS in tags and not keeps_weights:
            self._weights.drop()
        elif WEIGHTS in tags and not self._weights.is_away:
            self._weights.move_to_host()  # may fail, and then nothing was given back
        if KV_CACHE in tags:
            delete_arrays((self._state, self._features))
        trim_host_memory()

    def resume_memory(self, tags: Collection[str]) -> None:
        """Take it again: an empty pool, the same weights. Raises what reading or the device raises, and then
        what is missing is still away."""
        if WEIGHTS in tags and self._weights.is_away:
            if self._weights.is_kept:
                self._weights.put_back()
            else:
                self.load(log_progress)
                trim_host_memory()
        if KV_CACHE in tags and live_bytes(self._state) == 0:
            self._state = jax.block_until_ready(self.programs.allocate())
            if self._encoder is not None:
                self._encoder.allocate()

    def read_update(self, model_path: str, load_format: str) -> Update:
        """Other weights, on the host; steps may run meanwhile. Raises ConfigError or WeightError."""
        assert self._checkpoint is not None, "there is no checkpoint to compare with"
        other = self._checkpoint.find_other(model_path, load_format)
        return Update(other, other.read_values(log_progress))

    def install_update(self, update: Update) -> None:
        """Put weights that `read_update` gave in place of the present ones, or fail and keep those."""
        self._weights.exchange(update.values)
        self._checkpoint = update.checkpoint
        trim_host_memory()

    def stop_reading(self) -> None:
        """Weights that are being read now, or later, are not read to the end."""
        if self._checkpoint is not None:
            self._checkpoint.stopping.set()
