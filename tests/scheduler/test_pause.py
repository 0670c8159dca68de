"""What operations do to the schedule: send everything back, begin nothing new, forget what is cached."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.pause import forget_cache, has_begun, num_retracted, salted
from jaxserve.scheduler.schedule import add, retract_all, schedule
from jaxserve.scheduler.state import new_state
from jaxserve.types import TokenParams
from tests.scheduler.steps import LIMITS, PAGE, finish_step, list_rids, run_step, run_to_end, submit


def test_everything_goes_back_in_order_and_what_was_in_flight_is_computed_again():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    for rid in ("a", "b"):
        submit(state, rid, [ord(rid)] * 5)
    run_step(state)
    in_flight = schedule(state, LIMITS)
    submit(state, "new", [3] * 5, priority=9)
    assert (retract_all(state), num_retracted(state), has_begun(state)) == (2, 2, True)
    assert finish_step(state, in_flight) == []  # stale
    plan, _ = run_step(state)
    assert list_rids(state, plan.chunks) == ["a", "b", "new"]
    done = [delta for delta in run_to_end(state) if delta.finish is not None]
    assert {delta.rid: (delta.num_output_tokens, delta.num_retractions) for delta in done} == {
        "a": (8, 1),
        "b": (8, 1),
        "new": (8, 0),
    }


def test_nothing_new_begins_while_what_has_begun_comes_to_its_end():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=8)
    submit(state, "running", [1] * 5)
    run_step(state)
    submit(state, "retracted", [2] * 5)
    run_step(state)
    retract_all(state)
    submit(state, "new", [3] * 5)
    closing = replace(LIMITS, admits_new=False)
    while has_begun(state):
        plan, _ = run_step(state, closing)
        assert "new" not in list_rids(state, [row for row in plan.chunks if row.seq_id in state.running])
    assert schedule(state, closing).is_empty
    assert [seq.rid for seq in state.waiting] == ["new"]
    assert run_to_end(state)[-1].rid == "new"


def test_a_request_keeps_its_own_salt_whenever_it_goes_back():
    """It runs through the first exchange of weights, is sent back after it, and waits during the second."""
    state = new_state(num_pages=50, page_size=PAGE, max_rows=2)
    params = TokenParams(max_new_tokens=8)
    for rid, salt in (("hers", "secret"), ("odd", "x|y")):
        add(state, rid=rid, prompt_ids=[1] * 9, params=params, cache_salt=salted(salt, 0))
    run_step(state)
    forget_cache(state, 1)
    retract_all(state)
    forget_cache(state, 2)
    assert [seq.cache_salt for seq in state.waiting] == [salted("secret", 2), salted("x|y", 2)]


def test_pages_of_earlier_weights_are_not_found_by_those_who_wait_or_come_later():
    state = new_state(num_pages=50, page_size=PAGE, max_rows=1)
    params = TokenParams(max_new_tokens=8)
    prompt = [1] * 9

    def submit_salted(rid: str, salt: str, era: int) -> None:
        add(state, rid=rid, prompt_ids=prompt, params=params, cache_salt=salted(salt, era))

    submit_salted("running", "s", 0)
    run_step(state)
    submit_salted("waiting", "s", 0)
    for era in (1, 2):
        forget_cache(state, era)
        check_integrity(state)
    submit_salted("later", "s", 2)
    submit_salted("other", "t", 2)
    done = {delta.rid: delta.num_cached_tokens for delta in run_to_end(state) if delta.finish is not None}
    # Those who wait share with each other again, under their own salts, and with nobody from before.
    assert done == {"running": 0, "waiting": 0, "later": 8, "other": 0}
