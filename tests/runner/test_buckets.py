"""The ladder of program shapes, and which programs a step runs in."""

from __future__ import annotations

from jaxserve.runner.buckets import Shape, make_ladder, split_step


def test_a_cpu_ladder_compiles_the_smallest_decode_and_one_prefill_first():
    ladder = make_ladder(max_rows=8, max_tokens=256, min_rows=2, mixes=False)
    assert ladder.shapes[:2] == (Shape(2, 0), Shape(0, 64))
    assert set(ladder.shapes) == {
        *(Shape(rows, 0) for rows in (2, 4, 8)),
        *(Shape(0, tokens) for tokens in (16, 64, 128, 256)),
    }


def test_what_lets_more_be_done_at_once_is_compiled_before_what_saves_time():
    ladder = make_ladder(max_rows=64, max_tokens=256, min_rows=1, mixes=False)
    assert ladder.shapes[2:5] == (Shape(8, 0), Shape(0, 256), Shape(64, 0))


def test_no_mixed_program_is_longer_than_a_mixed_step():
    ladder = make_ladder(max_rows=8, max_tokens=512, min_rows=8, mixes=True, max_mixed_tokens=128)
    assert [shape.num_tokens for shape in ladder.shapes if shape.num_rows and shape.num_tokens] == [
        16,
        64,
        128,
    ]
    assert ladder.token_buckets == (16, 64, 128, 256, 512)


def test_a_ladder_of_one_row_and_a_short_context_still_has_both_kinds():
    ladder = make_ladder(max_rows=1, max_tokens=3, min_rows=1, mixes=False)
    assert set(ladder.shapes) == {Shape(1, 0), Shape(0, 1), Shape(0, 3)}


def test_one_slot_still_runs_in_the_smallest_program_that_is_fast():
    assert make_ladder(max_rows=1, max_tokens=64, min_rows=2, mixes=False).shapes[0] == Shape(2, 0)


def test_limits_that_are_no_powers_of_two_are_reached():
    ladder = make_ladder(max_rows=12, max_tokens=100, min_rows=1, mixes=True)
    assert Shape(12, 0) in ladder.shapes
    assert Shape(12, 100) in ladder.shapes
    assert ladder.token_buckets[-1] == 100


def test_a_step_runs_in_the_smallest_ready_program_that_holds_it():
    ready = [Shape(2, 0), Shape(8, 0), Shape(0, 64), Shape(0, 256)]
    assert split_step(3, 0, ready) == [Shape(8, 0)]
    assert split_step(0, 64, ready) == [Shape(0, 64)]


def test_a_mixed_step_runs_as_two_programs_until_a_mixed_one_is_ready():
    ready = [Shape(8, 0), Shape(0, 64)]
    assert split_step(5, 60, ready) == [Shape(8, 0), Shape(0, 64)]
    assert split_step(5, 60, [*ready, Shape(8, 64)]) == [Shape(8, 64)]


def test_windows_come_with_every_decode_program_and_never_alone():
    ladder = make_ladder(max_rows=4, max_tokens=64, min_rows=1, mixes=True, window=4)
    shapes = ladder.shapes
    assert shapes[:3] == (Shape(1, 0), Shape(0, 64), Shape(1, 0, 4))
    decode = [shape for shape in shapes if not shape.num_tokens]
    assert decode == [Shape(rows, 0, window) for rows in (1, 4, 2) for window in (1, 4)]
    assert ladder.window == 4
    assert split_step(3, 0, shapes) == [Shape(4, 0)]
    assert split_step(3, 0, shapes, window=4) == [Shape(4, 0, 4)]


def test_a_step_that_fits_nothing_is_told():
    assert split_step(9, 0, [Shape(8, 0), Shape(0, 64)]) is None
    assert split_step(1, 65, [Shape(8, 0), Shape(0, 64)]) is None
