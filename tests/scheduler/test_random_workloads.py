"""Random workloads on a device that models memory: whatever the schedule, every reply is the oracle's."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.plan import StepLimits
from jaxserve.types import ScoreParams, TokenParams
from tests.scheduler.memory_device import VOCAB
from tests.scheduler.simulation import TOKEN_BUCKETS, Simulation

PARAMS = st.builds(
    lambda max_new, min_new, stop_ids, seed: TokenParams(
        max_new_tokens=max_new, min_new_tokens=min(min_new, max_new), stop_ids=stop_ids, seed=seed
    ),
    st.one_of(st.integers(0, 2), st.integers(5, 20)),
    st.integers(0, 3),
    st.sampled_from([(), (3,), (5, 7)]),
    st.integers(0, 4),
)

SEARCHES = st.builds(
    lambda max_new, width, extra, stop_ids: TokenParams(
        max_new_tokens=max_new,
        stop_ids=stop_ids,
        beam_width=width,
        scores=ScoreParams(of_output=True, num_top=width + extra),
    ),
    st.one_of(st.integers(0, 2), st.integers(5, 12)),
    st.integers(2, 5),
    st.sampled_from([0, 0, 2, VOCAB]),
    st.sampled_from([(), (3,), (5, 7), (0, 1, 2, 3)]),
)


@st.composite
def prompts(draw):
    """Prompts of three families with long common prefixes, some with an ending of their own."""
    family = draw(st.integers(0, 2))
    shared = [(family + i * i) % VOCAB for i in range(draw(st.integers(1, 20)))]
    return shared + draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))


SCORED = st.builds(
    lambda params, of_output: replace(params, scores=ScoreParams(of_output=of_output, num_top=2)),
    PARAMS,
    st.booleans(),
)


@st.composite
def requests(draw):
    """A prompt and what is wanted of it: often scores of some of its rows, if there are any at all."""
    prompt_ids = draw(prompts())
    params = draw(st.one_of(PARAMS, SCORED, SEARCHES))
    rows = draw(st.sets(st.integers(0, 22), max_size=6))
    if params.scores is not None:
        prompt_rows = tuple(sorted(row for row in rows if row < len(prompt_ids) - 1))
        params = replace(params, scores=replace(params.scores, prompt_rows=prompt_rows))
    return prompt_ids, params


ADD = st.tuples(
    st.just("add"),
    requests(),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.sampled_from(["", "", "x"]),
)
STEP = st.tuples(st.just("step"), st.integers(1, 5))
ABORT = st.tuples(st.just("abort"), st.integers(0, 30))
SETTLE = st.tuples(st.just("settle"))
OPERATION = st.integers(0, 11).flatmap(lambda kind: ([ADD] * 7 + [STEP] * 3 + [ABORT, SETTLE])[kind])


@st.composite
def workloads(draw):
    page_size = draw(st.sampled_from([1, 2, 4]))
    row_buckets = draw(st.sampled_from([(1, 2, 4, 8), (4, 8, 16), (5,)]))
    limits = StepLimits(
        page_size=page_size,
        max_rows=draw(st.integers(1, 5)),
        max_chunks=draw(st.integers(1, 3)),
        max_chunk_tokens=draw(st.sampled_from([3, 4, 9, 16, 20])),
        max_mixed_tokens=draw(st.sampled_from([None, 2, 4, 30])),
        token_buckets=TOKEN_BUCKETS,
        row_buckets=row_buckets,
        row_costs=tuple(1 + rows * draw(st.sampled_from([0.0, 0.05])) for rows in row_buckets),
        wait_cost=draw(st.sampled_from([0.0, 0.2])),
        window=draw(st.integers(1, page_size)),
        window_rows=draw(st.sampled_from([row_buckets, row_buckets[:1]])),
    )
    num_usable_pages = draw(st.integers(28, 48)) // page_size
    max_drafts = draw(st.sampled_from([0, 1, 3, 7]))
    depth, use_prefix_cache = draw(st.integers(0, 2)), draw(st.booleans())
    settings_of_engine = (page_size, num_usable_pages, limits, depth, use_prefix_cache, max_drafts)
    return settings_of_engine, draw(st.lists(OPERATION, min_size=8, max_size=30))


def run_workload(workload) -> Simulation:
    settings_of_engine, operations = workload
    simulation = Simulation(*settings_of_engine)
    for name, *arguments in operations:
        if name == "add":
            (prompt_ids, params), priority, cache_salt = arguments
            simulation.add(prompt_ids, params, priority, cache_salt)
        elif name == "step":
            for _ in range(arguments[0]):
                simulation.step()
        elif name == "abort" and simulation.requests:
            simulation.abort(arguments[0])
        elif name == "settle":
            while simulation.in_flight:
                simulation.apply_oldest()
    simulation.drain()
    return simulation


@settings(max_examples=400, deadline=None)
@given(workloads())
def test_every_reply_is_the_oracles_and_no_page_is_lost(workload):
    run_workload(workload)


@settings(max_examples=40, deadline=None)
@given(workloads())
def test_the_same_calls_give_the_same_plans(workload):
    first, second = run_workload(workload), run_workload(workload)
    assert first.log == second.log
