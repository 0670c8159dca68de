"""What the engine tells the scheduler of its programs' costs, before and after it has measured them."""

import pytest

from jaxserve.engine.costs import LEAST_SAMPLES, NUM_SAMPLES, STALE_STEPS, StepCosts
from jaxserve.scheduler.plan import StepLimits

LIMITS = StepLimits(
    page_size=4, max_rows=8, max_chunks=1, max_chunk_tokens=8, token_buckets=(8,), row_buckets=(1, 2, 4, 8)
)


def measure(costs: StepCosts, num_rows: int, time_s: float, times: int = LEAST_SAMPLES) -> None:
    costs.fill(LIMITS)
    for _ in range(times):
        costs.add_step(num_rows, time_s)


def test_a_program_that_never_ran_costs_what_smaller_ones_do_and_nothing_if_none_ran():
    costs = StepCosts()
    measure(costs, 3, 0.02)  # runs in the program of 4 rows
    row_costs = costs.fill(LIMITS).row_costs
    assert row_costs[0] == row_costs[1] < 1e-6
    assert row_costs[2:] == pytest.approx((0.02, 0.02))


def test_costs_are_means_without_the_worst_and_grow_with_the_rows():
    costs = StepCosts()
    measure(costs, 1, 0.01)
    measure(costs, 8, 0.03, times=2)
    measure(costs, 8, 0.05, times=2)
    costs.add_step(8, 9.0)
    measure(costs, 2, 0.09)  # while the machine did something else
    assert costs.fill(LIMITS).row_costs == pytest.approx((0.01, 0.04, 0.04, 0.04))


def test_a_few_steps_are_not_believed_and_old_ones_no_longer():
    costs = StepCosts()
    measure(costs, 1, 0.01)
    measure(costs, 8, 0.04, times=LEAST_SAMPLES - 1)
    assert costs.fill(LIMITS).row_costs[-1] == pytest.approx(0.01)
    measure(costs, 8, 0.04)
    measure(costs, 1, 0.01, times=STALE_STEPS + 1)
    assert costs.fill(LIMITS).row_costs[-1] == pytest.approx(0.01)
    measure(costs, 8, 0.03)
    assert costs.fill(LIMITS).row_costs[-1] == pytest.approx(0.03)


def test_a_wait_costs_what_the_latest_did():
    costs = StepCosts()
    costs.add_wait(0.001)
    assert costs.fill(LIMITS).wait_cost == 0.0
    for _ in range(NUM_SAMPLES):
        costs.add_wait(0.002)
    assert costs.fill(LIMITS).wait_cost == pytest.approx(0.002)


def test_a_step_of_more_rows_than_any_program_is_no_measure():
    costs = StepCosts()
    measure(costs, 9, 0.5)
    assert costs.fill(LIMITS).row_costs[-1] < 1e-6
