"""Prompt-lookup speculation: which sequences get rows for guessed tokens in a step, and how many.

Called by schedule.py. Pure functions over SchedulerState; knows nothing of devices, clocks or text.

A draft is a run of guessed tokens (lookup.py) that is verified by rows of the same slot in the same step: row
p feeds the last known token, row p + 1 the first guess, and so on. The model writes K and V before it
attends, so each row sees those before it. Each samples the token after its own, from the randomness of that
position; as long as a row's guess is the token that was sampled before it, what it samples is just what
would have been sampled without any draft. So the reply is the same, greedy or not (up to the float noise
between program shapes), and a wrong guess costs a row and nothing else.

A step with drafts has no overlap: nothing is planned until it is applied, for what it accepts says where its
sequences go on. So it must pay for the wait, and for the larger program that more rows may need. Both are
estimated: StepLimits tells what programs cost, as the engine measured it, and every sequence learns how
often its guesses are right, used or not. A step takes the drafts that promise the most tokens for its time,
none if that is no more than without: a request for which guessing does not pay runs as if there were none.

Not drafted: beam searches, and requests with penalties, for which the device counts what it samples.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxserve.scheduler.lookup import Lookup
from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, StepLimits
from jaxserve.scheduler.state import Sampled, SchedulerState, Seq, find_end

LEAST_GAIN = 1.05  # a step with drafts must promise so many times the tokens per time of one without
LEAST_CHANCE = 0.1  # of a guess to be right, for a row to be thought of
MOST_CERTAIN = 0.98  # no chance is higher
MOST_SEQUENCES = 64  # decoding at once: in a larger crowd the host's time is worth more than guesses
MAX_READ_TOKENS = 4096  # that lookups take in for one plan, so that a long prompt holds up nobody


class Draft(NamedTuple):
    seq: Seq
    num_tokens: int


def is_verifying(state: SchedulerState) -> bool:
    """Whether a step with drafts is in flight: then its results come before any other plan."""
    return state.max_drafts > 0 and any(seq.num_drafts_in_flight for seq in state.running.values())


def choose_drafts(state: SchedulerState, limits: StepLimits) -> list[Draft]:
    """The drafts of the next step. One whose sequence has tokens in flight can only be planned, and is to
    be chosen anew, when they are known."""
    if not state.max_drafts or not limits.row_buckets:
        return []
    seqs = [seq for seq in state.running.values() if not seq.is_prefilling and not seq.is_fully_planned]
    num_rows = sum(max(len(seq.beams), 1) for seq in seqs)
    if not 0 < num_rows < limits.row_buckets[-1] or len(seqs) > MOST_SEQUENCES:
        return []
    if not _could_pay(limits, num_rows, num_rows + len(seqs) * state.max_drafts):
        return []
    chances: list[tuple[float, int]] = []  # of one more row, and the place of its sequence in `seqs`
    num_left = MAX_READ_TOKENS
    for index, seq in enumerate(seqs):
        if can_draft(seq):
            num_left -= _read_tokens(seq, num_left)
            chances += [(chance, index) for chance in _list_chances(state, seq)]
    chances.sort(reverse=True)
    num_chosen = _choose_number(limits, num_rows, [chance for chance, _ in chances])
    counts: dict[int, int] = {}
    for _, index in chances[:num_chosen]:
        counts[index] = counts.get(index, 0) + 1
    return [Draft(seqs[index], count) for index, count in counts.items()]


def can_draft(seq: Seq) -> bool:
    params = seq.params
    has_penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    return not has_penalties and not seq.is_search


def add_drafts(state: SchedulerState, rows: dict[int, DecodeRow], drafts: list[Draft]) -> list[DecodeRow]:
    """All rows (given by seq_id), those of each draft behind the row of its sequence, if it still has one."""
    if not drafts:
        return list(rows.values())
    draft_by_id = {draft.seq.seq_id: draft for draft in drafts}
    decode = []
    for row in rows.values():
        decode.append(row)
        if row.seq_id in draft_by_id:
            decode += _draft_rows(state, row, draft_by_id[row.seq_id])
    return decode


def _draft_rows(state: SchedulerState, row: DecodeRow, draft: Draft) -> list[DecodeRow]:
    """The rows that verify a draft, behind `row`, which feeds the sequence's last known token.

    Fewer than were chosen if pages are short: those that others may want in this step are left to them, and
    nobody gives way for a draft.
    """
    seq = draft.seq
    rows: list[DecodeRow] = []
    assert seq.lookup is not None
    for token_id in seq.lookup.guess(seq.cache_ids, draft.num_tokens):
        if token_id < 0:  # of an image, which stands in a prompt only
            break
        index = seq.num_planned // state.page_size
        if index == len(seq.page_ids):
            if state.cache.num_available <= len(state.running):
                break
            seq.page_ids.append(state.cache.allocate())
        page_id = seq.page_ids[index]
        rows.append(DecodeRow(row.slot, row.seq_id, row.epoch, seq.num_planned, page_id, token_id))
        seq.num_planned += 1
        seq.num_in_flight += 1
    seq.num_drafts_in_flight = len(rows)
    return rows


def verify_row(seq: Seq, row: DecodeRow, result: Sampled, accepted: list[Sampled]) -> None:
    """Accept what a row of a draft gave, if it was fed the token that the row before it gave and that row
    was accepted and not the last of the reply.

    Without a number only the first row fails its sequence: a later one may have been fed a wrong guess.
    """
    if row.position != len(seq.token_ids) - 1 + len(accepted):
        return
    if accepted:
        token_id = accepted[-1][0]
        has_ended = find_end(seq.params, token_id, seq.num_output_tokens + len(accepted)) is not None
        if token_id != row.token_id or has_ended or result[0] == NO_TOKEN:
            return
    accepted.append(result)


def settle_draft(state: SchedulerState, seq: Seq, num_accepted: int) -> None:
    """A step that verified a draft was applied: forget the positions behind what it accepted.

    What wrong guesses left in a page that stays lies at positions that are fed again before they are read.
    """
    num_drafts, seq.num_drafts_in_flight = seq.num_drafts_in_flight, 0
    num_rejected = num_drafts - num_accepted
    seq.num_planned -= num_rejected
    seq.num_in_flight -= num_rejected
    num_pages = state.pages_for(seq.num_planned)
    state.cache.drop(seq.page_ids[num_pages:])
    del seq.page_ids[num_pages:]
    seq.num_drafted += num_drafts
    seq.num_accepted += num_accepted
    state.num_drafted += num_drafts
    state.num_accepted += num_accepted


def _could_pay(limits: StepLimits, num_rows: int, most_rows: int) -> bool:
    """Whether drafts would pay if every guess were right: if not, nobody needs to guess."""
    return _choose_number(limits, num_rows, [MOST_CERTAIN] * (most_rows - num_rows)) > 0


def _read_tokens(seq: Seq, max_tokens: int) -> int:
    if seq.lookup is None:
        seq.lookup = Lookup()
    return seq.lookup.read(seq.cache_ids, seq.num_prompt_tokens, max_tokens)


def _list_chances(state: SchedulerState, seq: Seq) -> list[float]:
    """How likely each further row of a draft is to be accepted; descending.

    Of a sequence with tokens in flight, after they came as expected.
    """
    lookup = seq.lookup
    if lookup is None or lookup.source < 0 or lookup.num_read < seq.num_known:
        return []
    num_tokens = min(state.max_drafts, seq.num_kv_tokens - 1 - seq.num_planned)
    chances = []
    chance = 1.0
    for num_ahead in range(seq.num_in_flight + num_tokens):
        chance *= min(lookup.rate(num_ahead), MOST_CERTAIN)
        if chance < LEAST_CHANCE:
            break
        if num_ahead >= seq.num_in_flight:
            chances.append(chance)
    return chances


def _choose_number(limits: StepLimits, num_rows: int, chances: list[float]) -> int:
    """How many of the rows with these chances, best first, to add to `num_rows` that run anyway."""
    best_number = 0
    best_rate = 0.0
    for bucket, cost in zip(limits.row_buckets, limits.row_costs, strict=True):
        if bucket < num_rows:
            continue
        if best_rate == 0.0:
            best_rate = num_rows / cost * LEAST_GAIN  # without drafts, and so without a wait
        number = min(bucket - num_rows, len(chances))
        rate = (num_rows + sum(chances[:number])) / (cost + limits.wait_cost)
        if number and rate > best_rate:
            best_number, best_rate = number, rate
    return best_number
