"""Work behind the steps: at a low priority, and less than half of the time while steps run."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from jaxserve.runner.background import IDLE_S, REST_RATIO, Background

PIECE_S = 0.2
WAIT_S = 30.0


@pytest.fixture
def background():
    background = Background()
    yield background
    background.stop()


def do_pieces(
    background: Background, num_pieces: int, *, steps_run: bool, are_pressed: bool = False
) -> float:
    """Seconds from the first piece to the end; the work itself takes num_pieces * PIECE_S of them."""
    ended = threading.Event()
    start_s = time.monotonic()
    background.start([lambda: time.sleep(PIECE_S)] * num_pieces, lambda _: ended.set())
    while not ended.wait(0.01):
        if steps_run:
            background.note_step(is_pressed=are_pressed)
        assert time.monotonic() - start_s < WAIT_S
    return time.monotonic() - start_s


def test_it_rests_after_each_piece_while_steps_run(background):
    assert do_pieces(background, 3, steps_run=True) >= 3 * PIECE_S * (1 + REST_RATIO)


def test_it_works_on_where_no_step_runs(background):
    assert do_pieces(background, 3, steps_run=False) < 3 * PIECE_S * (1 + REST_RATIO)


def test_it_works_on_where_requests_wait_for_what_it_makes(background):
    took_s = do_pieces(background, 3, steps_run=True, are_pressed=True)
    assert took_s < 3 * PIECE_S * (1 + REST_RATIO)


def test_it_works_on_soon_after_the_last_step(background):
    background.note_step()
    took_s = do_pieces(background, 10, steps_run=False)
    assert 10 * PIECE_S + IDLE_S / 2 < took_s < 10 * PIECE_S * (1 + REST_RATIO)


def test_stopping_ends_a_rest_and_leaves_the_remaining_pieces(background):
    done: list[int] = []
    ended: list[bool] = []
    first_is_done = threading.Event()

    def do_first() -> None:
        time.sleep(PIECE_S)
        background.note_step()
        done.append(1)
        first_is_done.set()

    background.start([do_first, lambda: done.append(2)], ended.append)
    assert first_is_done.wait(WAIT_S)
    background.stop()
    assert done == [1]
    assert ended == [False]


def test_what_a_piece_raises_ends_the_work_and_is_told_as_not_done(background, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    ended: list[bool] = []

    def fail() -> None:
        raise ValueError("no")

    background.start([fail, fail], ended.append)
    background.stop()
    assert ended == [False]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_steps_go_first(background):
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    priorities: list[int] = []
    ended = threading.Event()

    def note_priority() -> None:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    background.start([note_priority], lambda _: ended.set())
    assert ended.wait(WAIT_S)
    assert priorities[0] > ours
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours
