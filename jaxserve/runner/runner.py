"""ModelRunner: runs StepPlans on the device. One upload, one launch, one small download a step.

Called by engine/loop.py. Holds the parameters, the device state and the compiled programs; a step's
tokens come back as a `PendingStep` that is read later, so that the next step can be launched first.
Knows pages, slots and token ids; knows nothing of requests, text or the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.runner.batch import pack_step, slot_params
from jaxserve.runner.buckets import Ladder, split_step
from jaxserve.runner.device_state import PoolSize, allocate, edit_rows
from jaxserve.runner.programs import CompileCounter, Programs
from jaxserve.scheduler.plan import SlotInit, StepLimits, StepPlan, StepResult
from jaxserve.types import TokenParams

logger = logging.getLogger("jaxserve.runner")


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A launched step: the sampled tokens of its launches, still on their way."""

    launches: tuple[tuple[jax.Array, int, int, int], ...]  # token_B, decode rows, padded rows, chunks

    def read(self) -> StepResult:
        """Wait for the device; the tokens in the plan's order: decode rows, then chunks."""
        decode: list[int] = []
        chunks: list[int] = []
        for token_B, num_decode, padded_rows, num_chunks in self.launches:
            tokens = np.asarray(token_B).tolist()
            decode += tokens[:num_decode]
            chunks += tokens[padded_rows : padded_rows + num_chunks]
        return StepResult(decode + chunks)


class ModelRunner:
    def __init__(self, model: nnx.Module, cfg: Any, pool: PoolSize, kv_dtype: jnp.dtype, ladder: Ladder):
        graphdef, self._params = nnx.split(model)
        self._state = allocate(cfg, pool, kv_dtype)
        self._vocab_size = cfg.vocab_size
        self._pool = pool
        greedy_F = slot_params(TokenParams(max_new_tokens=0), 0)  # padding asks for nothing, not even top-p
        self._params_XF = np.tile(greedy_F, (pool.num_slots + 1, 1))
        self.compiles = CompileCounter()
        self.programs = Programs(graphdef, self._params, self._state, ladder, pool.page_size)
        self._write_slot = self.programs.compile_slot_writer()

    @property
    def param_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))

    @property
    def kv_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.kv))

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile what serving needs first: the ladder's first two programs."""
        first = self.programs.ladder.shapes[:2]
        for num_done, shape in enumerate(first):
            on_progress(num_done, len(first))
            self.programs.compile_one(shape)
        on_progress(len(first), len(first))

    def close(self) -> None:
        """Stop compiling in the background; the runner must not be used afterwards."""
        self.programs.stop()
        self.compiles.close()

    def compile_counts(self) -> tuple[int, int, bool]:
        """Compiles so far, those after warm-up, and whether every program of the ladder is ready."""
        return self.compiles.num_compiles, self.compiles.num_late_compiles, self.programs.is_warm

    def limits(self) -> StepLimits:
        """What a step may hold, given the programs that are ready now."""
        ready = self.programs.ready
        token_buckets = sorted(
            {shape.num_tokens for shape in ready if shape.num_tokens and not shape.num_rows}
        )
        most_rows = max(shape.num_rows for shape in ready if not shape.num_tokens)
        return StepLimits(
            page_size=self._pool.page_size,
            max_rows=min(most_rows, self._pool.num_slots),
            max_chunks=min(shape.num_chunks for shape in ready if shape.num_tokens),
            max_chunk_tokens=token_buckets[-1],
            token_buckets=tuple(token_buckets),
        )

    def step(self, plan: StepPlan) -> PendingStep:
        """Launch a plan and return at once. The plan must fit `limits()`."""
        for init in plan.inits:
            self._init_slot(init)
        shapes = split_step(len(plan.decode), plan.num_chunk_tokens, list(self.programs.ready))
        assert shapes is not None, f"no program is ready for {plan}"
        launches = []
        for shape in shapes:
            decode = plan.decode if shape.num_rows else ()
            chunks = plan.chunks if shape.num_tokens else ()
            packed = pack_step(
                shape, decode, chunks, self._params_XF, self._pool.page_size, self._pool.table_width
            )
            self._state, token_B = self.programs.ready[shape](self._params, self._state, packed)
            token_B.copy_to_host_async()
            launches.append((token_B, len(decode), shape.num_rows, len(chunks)))
        return PendingStep(tuple(launches))

    def _init_slot(self, init: SlotInit) -> None:
        self._params_XF[init.slot] = slot_params(init.params, len(init.prompt_ids))
        if init.params.has_extras:
            edits_V, bias_V = edit_rows(self._vocab_size, init.params, init.prompt_ids, init.output_ids)
            self._state = self._write_slot(self._state, np.int32(init.slot), edits_V, bias_V)
