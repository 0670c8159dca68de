"""When programs are compiled: two before serving, the rest behind its back; one that fails is left out."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import pytest

from jaxserve.runner.buckets import Shape, make_ladder
from jaxserve.runner.device_state import PoolSize
from jaxserve.runner.programs import Programs

POOL = PoolSize(num_pages=9, page_size=8, num_slots=4, table_width=4)
LADDER = make_ladder(max_rows=4, max_tokens=16, min_rows=1, mixes=False)
CANNOT_BE_COMPILED = Shape(2, 0)
WAIT_S = 120.0


@pytest.fixture
def programs(model):
    programs = Programs(model, model.cfg, POOL, jnp.dtype(jnp.float32), LADDER)
    yield programs
    programs.stop()
    programs.compiles.close()


def compile_rest(programs: Programs) -> None:
    done = threading.Event()
    programs.compile_rest(on_done=done.set)
    assert done.wait(WAIT_S)


@pytest.fixture
def compiled(monkeypatch) -> list[Shape]:
    """Shapes in the order in which they were asked for; nothing is compiled."""
    asked: list[Shape] = []

    def note(programs: Programs, shape: Shape) -> None:
        if shape == CANNOT_BE_COMPILED:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        asked.append(shape)
        programs.ready = {**programs.ready, shape: None}

    monkeypatch.setattr(Programs, "compile_one", note)
    return asked


def test_serving_starts_with_one_decode_and_one_prefill_program(programs):
    told: list[tuple[int, int]] = []
    programs.begin()  # as before the weights are read
    programs.compile_first(lambda done, total: told.append((done, total)))
    assert set(programs.ready) == {Shape(1, 0), Shape(0, 16)}
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert not programs.is_warm


def test_the_rest_follows_in_the_order_of_the_ladder_without_what_fails(programs, compiled):
    programs.compile_first(lambda *_: None)
    assert set(compiled) == set(LADDER.shapes[:2])
    compile_rest(programs)
    assert programs.write_forks is not None
    assert compiled[2:] == [shape for shape in LADDER.shapes[2:] if shape != CANNOT_BE_COMPILED]
    assert CANNOT_BE_COMPILED not in programs.ready
    assert not programs.is_warm


def test_a_first_program_that_cannot_be_compiled_ends_the_start(programs, monkeypatch):
    def fail(programs: Programs, shape: Shape) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(Programs, "compile_one", fail)
    programs.begin()
    with pytest.raises(jax.errors.JaxRuntimeError):
        programs.compile_first(lambda *_: None)
