"""The only place where step programs are jitted, compiled and counted.

A program is compiled ahead of time for its Shape and called as an executable, so a shape that was never
compiled is an error here and never a silent pause. Two are compiled before serving starts, the rest
on a thread while it serves. Compiles are counted from jax.monitoring, so that an unexpected one
anywhere in the process shows.

The first two programs may be compiled while the weights are read (`begin`): shapes are enough. How the
others make way for the steps is told in background.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.runner.background import Background
from jaxserve.runner.batch import Unpacked, packed_size, unpack_step
from jaxserve.runner.buckets import Ladder, Shape
from jaxserve.runner.device_state import (
    DeviceState,
    PoolSize,
    compile_allocation,
    state_specs,
    write_slot,
    write_watched,
)
from jaxserve.runner.forks import forks_shape, write_forks
from jaxserve.runner.images import ImageEncoder, ImageSizes
from jaxserve.runner.sampler import edit_logits, hide_padding, sample
from jaxserve.runner.scores import score_prompts, score_sampled
from jaxserve.runner.xla_flags import Options, chosen_options
from jaxserve.weights.placement import ALONE, Placement, make_spec

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
EVERYWHERE = make_spec(())  # what every device holds whole
NUM_FIRST = 2  # programs that serving starts with: the ladder's first two, decode and prefill

logger = logging.getLogger("jaxserve.runner")


class ProgramHosts(Protocol):
    """What hosts that run the same programs tell each other of them (hosts/). Each of these may wait."""

    def admit(
        self, name: str, use: Callable[[], None]
    ) -> None: ...  # it is compiled here: use it, if all may
    def miss(self, name: str) -> None: ...  # it could not be compiled here


class OneHost:
    """Nobody else runs the programs."""

    def admit(self, name: str, use: Callable[[], None]) -> None:
        use()

    def miss(self, name: str) -> None:
        pass


ONE_HOST = OneHost()


class StepArrays(NamedTuple):
    """What a step gives: tokens (NO_TOKEN where the logits are not numbers) and scores (runner/scores.py).
    Of a window of steps the first two have an axis of them in front."""

    token_B: jax.Array
    score_BZ: jax.Array  # zeros if no row wants scores
    score_QZ: jax.Array | None  # of prompt rows; None in a program without prefill


def run_step(
    graphdef: nnx.GraphDef,
    shape: Shape,
    page_size: int,
    params: Any,
    state: DeviceState,
    packed: jax.Array,
    feature_MD: jax.Array | None = None,
) -> tuple[DeviceState, StepArrays]:
    """The whole step, as one program: unpack, model, sample, score, remember. A window of them is a loop.

    Donates `state`. `graphdef`, `shape` and `page_size` are constants of the program. A model that takes
    images is given their features. Where devices share the model, this is the step of one of them; what it
    gives beside the state is the same on all.
    """
    model = nnx.merge(graphdef, params)

    def run_next(state: DeviceState, index: jax.Array | int) -> tuple[DeviceState, StepArrays]:
        step = unpack_step(packed, shape, page_size, state.last_token_X, state.table_XW, feature_MD, index)
        return _run_unpacked(model, step, state)

    if shape.window == 1:
        return run_next(state, 0)
    return jax.lax.scan(run_next, state, jnp.arange(shape.window, dtype=jnp.int32))


def _run_unpacked(model: Any, step: Unpacked, state: DeviceState) -> tuple[DeviceState, StepArrays]:
    x_TD, kv = model(step.batch, state.kv)
    shards, vocab_size = model.kernels.shards, model.cfg.vocab_size

    def compute_logits(x_BD: jax.Array) -> jax.Array:
        return hide_padding(model.compute_logits(x_BD), shards, vocab_size)

    # Decode rows are the first tokens: a program of nothing else looks nothing up.
    x_BD = x_TD if step.places is None else x_TD[step.batch.sample_token_B]
    rows, slot_B, block_rows = step.rows, step.slot_B, model.kernels.block_rows
    logits_BV = compute_logits(x_BD)
    logits_BV = edit_logits(logits_BV, rows, slot_B, state.edits_XV, state.bias_XV, block_rows)
    token_B = sample(logits_BV, rows, model.kernels.choose_tokens)
    watched_XM = state.watched_XM
    score_BZ = score_sampled(
        x_BD, compute_logits, logits_BV, token_B, rows, slot_B, watched_XM, shards, block_rows
    )
    score_QZ = None
    if step.places is not None:
        score_QZ = score_prompts(x_TD, compute_logits, step.places, watched_XM, shards, block_rows)
    fed_B = jnp.maximum(token_B, 0)  # a row without a token ends its sequence; a stale row may still follow
    own_B = shards.find_own(fed_B, logits_BV.shape[1])
    new_state = DeviceState(
        kv=kv,
        last_token_X=state.last_token_X.at[slot_B].set(fed_B),
        table_XW=step.batch.table_XW,
        edits_XV=state.edits_XV.at[slot_B, own_B].add(1, mode="drop"),
        bias_XV=state.bias_XV,
        watched_XM=state.watched_XM,
    )
    return new_state, StepArrays(token_B, score_BZ, score_QZ)


def list_param_specs(placement: Placement, params: Any) -> Any:
    """How devices share the parameters; None where there is one device."""
    if placement.mesh is None:
        return None
    return jax.tree.map(lambda x: x.sharding.spec, params)


def lower_step(
    graphdef: nnx.GraphDef,
    shape: Shape,
    pool: PoolSize,
    placement: Placement,
    params: Any,
    state: Any,
    packed: Any,
    *features: Any,
) -> jax.stages.Lowered:
    """The step of a shape, ready to be compiled: arrays are described by shape, type and sharding only."""
    specs = state_specs(pool)
    step = placement.spread(
        partial(run_step, graphdef, shape, pool.page_size),
        in_specs=(list_param_specs(placement, params), specs, EVERYWHERE, *[EVERYWHERE for _ in features]),
        out_specs=(specs, EVERYWHERE),
    )
    return jax.jit(step, donate_argnums=1).lower(params, state, packed, *features)


class Programs:
    """The compiled step programs of one model, by shape.

    `model` may hold its parameters or only their shapes and types (Checkpoint.describe_model). Where the
    devices of `placement` share it, it and `cfg` are one device's part; arrays are whole.
    """

    def __init__(
        self,
        model: Any,
        cfg: Any,
        pool: PoolSize,
        kv_dtype: jnp.dtype,
        ladder: Ladder,
        placement: Placement = ALONE,
        images: ImageSizes | None = None,
        hosts: ProgramHosts = ONE_HOST,
    ):
        self.compiles = CompileCounter()
        self._hosts = hosts
        self._kernels = model.kernels
        self._graphdef, params = nnx.split(model)
        self._abstract_params = jax.tree.map(_abstract, params)
        self._placement = placement
        self.encoder: ImageEncoder | None = None  # of a model that reads more than text
        if images is not None:
            described = nnx.merge(self._graphdef, self._abstract_params)
            self.encoder = ImageEncoder(described, images, placement, hosts.admit)
        self.allocate = compile_allocation(cfg, pool, kv_dtype, placement, model.kernels.make_kv)
        self._abstract_state = jax.tree.map(_abstract, self.allocate.out_info)
        self._pool = pool
        self.ladder = ladder
        self.tried_options: Options = {}  # of XLA, besides those that are chosen
        self._first: list[Future[None]] = []
        self.ready: Mapping[Shape, Any] = {}  # replaced, never changed
        self.write_forks: Callable | None = None  # None until it is compiled
        self.is_over = False  # whether compiling has come to its end, with or without success
        self._lock = threading.Lock()
        self.background = Background()

    @property
    def is_warm(self) -> bool:
        has_all_shapes = len(self.ready) == len(self.ladder.shapes)
        return self.write_forks is not None and has_all_shapes and (not self.encoder or self.encoder.is_warm)

    def begin(self) -> None:
        """Start to compile the first programs, each on a thread; `compile_first` waits for them."""
        executor = ThreadPoolExecutor(NUM_FIRST, thread_name_prefix="jaxserve-compile")
        self._first = [executor.submit(self.compile_one, shape) for shape in self.ladder.shapes[:NUM_FIRST]]
        executor.shutdown(wait=False)

    def compile_first(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile what serving needs first, or wait until it is compiled."""
        if not self._first:
            self.begin()
        for num_done, future in enumerate(self._first):
            on_progress(num_done, len(self._first))
            future.result()
        on_progress(len(self._first), len(self._first))

    def compile_one(self, shape: Shape) -> None:
        """Compile the program of a shape, or restore it from the persistent cache."""
        start_s = time.perf_counter()
        features = () if self.encoder is None else (self.encoder.abstract_features,)
        num_words = packed_size(shape, self._pool.table_width, takes_images=bool(features))
        lowered = lower_step(
            self._graphdef,
            shape,
            self._pool,
            self._placement,
            self._abstract_params,
            self._abstract_state,
            self._describe((num_words,)),
            *features,
        )
        is_halved = self._kernels.halves(shape.num_tokens)
        options = chosen_options(jax.default_backend(), jax.devices()[0].device_kind, is_halved)
        program = lowered.compile(compiler_options={**options, **self.tried_options})
        logger.info("compiled the step of %s in %.1f s", shape, time.perf_counter() - start_s)

        def use() -> None:
            with self._lock:  # and a new dict: the step loop may be iterating over the old one
                self.ready = {**self.ready, shape: program}

        self._hosts.admit(_step_name(shape), use)

    def _describe(self, shape: tuple[int, ...], dtype: Any = jnp.int32, axis: str | None = None):
        """An array from the host: whole on every device, or its only axis cut."""
        sharding = self._placement.make_sharding((axis,) if axis else ())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def compile_slot_writer(self) -> Callable:
        """The program that puts a new sequence's penalties and bias in place."""
        ids = self._abstract_state.edits_XV.shape[1:]
        edits_V, bias_V = self._describe(ids, axis="vocab"), self._describe(ids, jnp.float32, axis="vocab")
        by_id = make_spec(("vocab",))
        specs = state_specs(self._pool)
        write = self._placement.spread(write_slot, (specs, EVERYWHERE, by_id, by_id), specs)
        writer = jax.jit(write, donate_argnums=0)
        return writer.lower(self._abstract_state, self._describe(()), edits_V, bias_V).compile()

    def compile_watched_writer(self) -> Callable:
        """The program that puts a new sequence's watched ids in place."""
        watched_XM = self._abstract_state.watched_XM
        watched_M = self._describe(watched_XM.shape[1:])
        write = self._placement.spread(write_watched, EVERYWHERE, EVERYWHERE)
        return jax.jit(write, donate_argnums=0).lower(watched_XM, self._describe(()), watched_M).compile()

    def compile_forks(self) -> None:
        """Compile the program that beams wait for: it writes block tables and copies pages."""
        packed = self._describe(forks_shape(self._pool.table_width))
        specs = state_specs(self._pool)
        write = self._placement.spread(write_forks, (specs, EVERYWHERE), specs)
        program = jax.jit(write, donate_argnums=0).lower(self._abstract_state, packed).compile()

        def use() -> None:
            self.write_forks = program

        self._hosts.admit("forks", use)

    def compile_rest(self, on_done: Callable[[], None]) -> None:
        """Compile what is not ready, on a thread: forks, the vision encoder, and shapes in ladder order; then
        call on_done."""
        todo = {"forks": self.compile_forks} if self.write_forks is None else {}
        todo |= self.encoder.list_programs() if self.encoder is not None else {}
        shapes = [shape for shape in self.ladder.shapes if shape not in self.ready]
        todo |= {_step_name(shape): partial(self.compile_one, shape) for shape in shapes}

        def end(is_done: bool) -> None:
            self.is_over = True
            if is_done:
                on_done()

        self.background.start([partial(self._try_to, name, compile) for name, compile in todo.items()], end)

    def _try_to(self, name: str, compile_program: Callable[[], None]) -> None:
        try:
            compile_program()
        except jax.errors.JaxRuntimeError:  # most likely too little memory for so large a step
            logger.exception("The program of %s could not be compiled; serving without it.", name)
            self._hosts.miss(name)

    def stop(self) -> None:
        """Let the compile thread end after the program at hand."""
        self.background.stop()


def _step_name(shape: Shape) -> str:
    return f"the step of {shape}"


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class CompileCounter:
    """Counts XLA compilations in this process, those restored from the cache included."""

    def __init__(self):
        self.num_compiles = 0
        self.num_late_compiles = 0
        self._is_late = False
        self._is_closed = False
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_labels: str | int) -> None:
        if event == COMPILE_EVENT and not self._is_closed:
            self.num_compiles += 1
            if self._is_late:
                self.num_late_compiles += 1
                logger.warning("a program was compiled after warm-up (%.1f s)", duration_secs)

    def expect_no_more(self) -> None:
        """From now on every compile is late: it stops running requests and should not happen."""
        self._is_late = True

    def close(self) -> None:
        """Count no more: JAX keeps its listeners, and another model in this process compiles too."""
        self._is_closed = True


def use_compile_cache(directory: Path) -> None:
    """Keep compiled programs in a directory across starts (JAX's persistent compilation cache)."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
