"""Short ways to drive the scheduler by hand, one step at a time, on a device that samples what it is told."""

from jaxserve.scheduler.integrity import check_integrity
from jaxserve.scheduler.plan import StepLimits, StepResult
from jaxserve.scheduler.schedule import add, apply, schedule
from jaxserve.scheduler.state import has_work
from jaxserve.types import TokenParams

PAGE = 4
TOKEN = 900  # what the device samples here unless a test says otherwise; no prompt contains it
STOP = 901


LIMITS = StepLimits(page_size=PAGE, max_rows=8, max_chunks=4, max_chunk_tokens=32, token_buckets=(8, 16, 32))


def submit(state, rid, prompt_ids, max_new_tokens=8, priority=0, **params):
    token_params = TokenParams(max_new_tokens=max_new_tokens, stop_ids=(STOP,), **params)
    add(state, rid=rid, prompt_ids=list(prompt_ids), params=token_params, priority=priority)


def finish_step(state, plan, token_id=TOKEN):
    deltas = apply(state, plan, StepResult([token_id] * (len(plan.decode) + len(plan.chunks))))
    check_integrity(state)
    return deltas


def run_step(state, limits=LIMITS, token_id=TOKEN):
    """One step without overlap."""
    plan = schedule(state, limits)
    check_integrity(state)
    return plan, finish_step(state, plan, token_id)


def run_to_end(state, limits=LIMITS):
    deltas = []
    while has_work(state):
        deltas += run_step(state, limits)[1]
    return deltas


def list_rids(state, items):
    """The requests that rows or chunks belong to."""
    return [state.running[item.seq_id].rid for item in items]
