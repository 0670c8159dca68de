"""The compiled step programs write the donated KV pool in place, whatever its type: read from the programs.

A copy of the pool would cost more than the step itself and show in no result, only in time and memory.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.programs import Programs

# Programs are compiled for shapes and nothing is allocated, so the pool may be far larger than all else.
POOL = PoolSize(num_pages=65537, page_size=16, num_slots=4, table_width=32)
# One row, rows, chunks, both, and rows several steps in a row.
SHAPES = [Shape(1, 0), Shape(4, 0), Shape(0, 64), Shape(4, 16), Shape(4, 0, 4)]

# `%name = type[dims]{layout} opcode(`: an instruction with one array as its result.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)
# What may have a result of the pool's size: names for it, and writes of a few places into it.
HARMLESS = {"parameter", "get-tuple-element", "bitcast", "reshape", "call", "while"}
WRITES = {"scatter", "dynamic-update-slice", "fusion"}  # what is in a fusion is checked itself


CONVERTS_BFLOAT16 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA of jax 0.10 converts a bfloat16 pool on the CPU to write into it",
)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", pytest.param("bfloat16", marks=CONVERTS_BFLOAT16)])
def test_no_instruction_of_a_step_copies_the_pool(model, kv_dtype):
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=1, mixes=True)
    programs = Programs(model, model.cfg, POOL, jnp.dtype(kv_dtype), ladder)
    kv = programs.allocate.out_info.kv
    kv_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))
    smallest_leaf = min(math.prod(leaf.shape) for leaf in jax.tree.leaves(kv))
    for shape in SHAPES:
        programs.compile_one(shape)
        program = programs.ready[shape]
        copies = [
            (name, opcode)
            for name, _, dims, opcode in INSTRUCTION.findall(program.as_text())
            if math.prod(int(dim) for dim in dims.split(",") if dim) >= smallest_leaf
            and opcode not in HARMLESS | WRITES
        ]
        assert not copies, f"{shape}, {kv_dtype}: {copies}"
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= kv_bytes
        assert memory.temp_size_in_bytes < kv_bytes / 50
    programs.compiles.close()


def test_the_reading_of_programs_finds_a_copy():
    """A program that is known to copy: its input is not donated."""
    pool = jax.ShapeDtypeStruct((65537, 16, 2), jnp.float32)
    program = jax.jit(lambda x: x.at[3].set(1.0)).lower(pool).compile()
    found = INSTRUCTION.findall(program.as_text() or "")
    assert "copy" in {opcode for _, _, dims, opcode in found if dims == "65537,16,2"}
