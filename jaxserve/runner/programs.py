"""The only place where step programs are jitted, compiled and counted.

A program is compiled ahead of time for its Shape and called as an executable, so a shape that was never
compiled is an error here and never a silent pause. The runner compiles two, starts serving, and
compiles the rest on a thread. Compiles are counted from jax.monitoring, so that an unexpected one
anywhere in the process shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.runner.batch import packed_size, unpack_step
from jaxserve.runner.buckets import Ladder, Shape
from jaxserve.runner.device_state import DeviceState, write_slot
from jaxserve.runner.sampler import sample

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

logger = logging.getLogger("jaxserve.runner")


def run_step(
    graphdef: nnx.GraphDef, shape: Shape, page_size: int, params: Any, state: DeviceState, packed: jax.Array
) -> tuple[DeviceState, jax.Array]:
    """The whole step, as one program: unpack, model, sample, remember. Returns the sampled tokens [B].

    Donates `state`. `graphdef`, `shape` and `page_size` are constants of the program.
    """
    step = unpack_step(packed, shape, page_size, state.last_token_X, state.table_XW)
    model = nnx.merge(graphdef, params)
    logits_BV, kv = model(step.batch, state.kv)
    token_B = sample(logits_BV, step.rows, step.slot_B, state.edits_XV, state.bias_XV)
    new_state = DeviceState(
        kv=kv,
        last_token_X=state.last_token_X.at[step.slot_B].set(token_B),
        table_XW=step.batch.table_XW,
        edits_XV=state.edits_XV.at[step.slot_B, token_B].add(1),
        bias_XV=state.bias_XV,
    )
    return new_state, token_B


class Programs:
    """The compiled step programs of one model, by shape."""

    def __init__(
        self, graphdef: nnx.GraphDef, params: Any, state: DeviceState, ladder: Ladder, page_size: int
    ):
        self._graphdef = graphdef
        self._abstract_params = jax.tree.map(_abstract, params)
        self._abstract_state = jax.tree.map(_abstract, state)
        self._page_size = page_size
        self._table_width = state.table_XW.shape[1]
        self.ladder = ladder
        self.ready: Mapping[Shape, Any] = {}  # replaced, never changed
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_warm(self) -> bool:
        return len(self.ready) == len(self.ladder.shapes)

    def compile_one(self, shape: Shape) -> None:
        """Compile the program of a shape, or restore it from the persistent cache."""
        start_s = time.perf_counter()
        packed = jax.ShapeDtypeStruct((packed_size(shape, self._table_width),), jnp.int32)
        step = jax.jit(partial(run_step, self._graphdef, shape, self._page_size), donate_argnums=1)
        lowered = step.lower(self._abstract_params, self._abstract_state, packed)
        program = lowered.compile()
        # A new dict: the step loop may be iterating over the old one.
        self.ready = {**self.ready, shape: program}
        logger.info("compiled the step of %s in %.1f s", shape, time.perf_counter() - start_s)

    def compile_slot_writer(self) -> Callable:
        """The program that puts a new sequence's penalties and bias in place."""
        vocab_size = self._abstract_state.edits_XV.shape[1]
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        edits_V = jax.ShapeDtypeStruct((vocab_size,), jnp.int32)
        bias_V = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
        writer = jax.jit(write_slot, donate_argnums=0)
        return writer.lower(self._abstract_state, slot, edits_V, bias_V).compile()

    def compile_rest(self, on_done: Callable[[], None]) -> None:
        """Compile every shape that is not ready, in ladder order, on a thread; then call on_done."""

        def work() -> None:
            for shape in self.ladder.shapes:
                if self._stopping.is_set():
                    return
                if shape not in self.ready:
                    try:
                        self.compile_one(shape)
                    except jax.errors.JaxRuntimeError:  # most likely too little memory for so large a step
                        logger.exception("The step of %s could not be compiled; serving without it.", shape)
            on_done()

        self._thread = threading.Thread(target=work, name="jaxserve-compile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the compile thread end after the program at hand."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
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
