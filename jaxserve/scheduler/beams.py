"""Beam search: which hypotheses of a request go on, and which slots and pages they have.

Called by schedule.py and admit.py, which treat a search as one sequence: one place in the queue, one
prefill, one victim. Pure functions over SchedulerState; knows nothing of devices, results or text.

The search (xLLM's). The first hypotheses are the best `beam_width` tokens after the prompt. In each step
every live beam offers its best `beam_width` continuations and every finished one itself; of all these the
best `beam_width` by plain sum of log-probabilities are kept. Equal sums go by the rank of the parent, then
by token id. There is no length penalty and no early end: a beam is finished by a stop id or by
max_new_tokens, and the search is over when all that are kept are finished. A small vocabulary may offer
fewer than beam_width.

Pages. The prompt's full pages belong to the Seq, once for all beams. What follows is held by each beam, and
shared: a hypothesis that has several children hands its slot and pages to the first of them, and the
others become owners of the same pages too. A page is copied only when a beam is about to write into it and
somebody else still owns it, so the last owner writes in place:

    prompt of 2 full pages and a bit       Seq.page_ids  7 3     Beam.page_ids  9
    three beams, before their first step   Seq.page_ids  7 3     Beam.page_ids  9  | 9  | 9
    and after it, with two copies          Seq.page_ids  7 3     Beam.page_ids  11 | 12 | 9

So a page that beams share is never written, and the prefix cache, which owns full pages of prompts only,
never sees a page of a beam.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, PageCopy, PageTable
from jaxserve.scheduler.state import Beam, Link, SchedulerState, Seq
from jaxserve.types import BeamResult, FinishReason, TokenParams, TokenScores


class Candidate(NamedTuple):
    """A hypothesis that may be kept. The order of these tuples is the order of choice."""

    cost: float  # minus the sum of its log-probabilities
    rank: int  # of its parent, or its own if it is finished already
    token_id: int  # NO_TOKEN for a finished one
    place: int  # of the token in the parent's list of alternatives


@dataclass(slots=True)
class BeamStep:
    """What one search adds to a plan."""

    rows: list[DecodeRow] = field(default_factory=list)
    tables: list[PageTable] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)


def fit_search(state: SchedulerState, num_prompt_tokens: int, params: TokenParams) -> TokenParams:
    """The parameters of a search that fits when it is alone: max_new_tokens is clipped to the pool.

    Raises InvalidRequestError if there are too few slots, or too few pages for even one token a beam.
    """
    if params.max_new_tokens == 0:
        return dataclasses.replace(params, beam_width=1)  # a prefill: there is nothing to search
    width, scores = params.beam_width, params.scores
    if scores is None or not scores.of_output or scores.num_top < width or scores.is_scaled:
        raise InvalidRequestError(
            f"beam_width {width} needs the unscaled log-probabilities of at least {width} alternatives "
            f"for each output token, got {scores}.",
            param="beam_width",
        )
    if width > state.max_rows:
        raise InvalidRequestError(
            f"beam_width must be at most {state.max_rows}, the sequences that this server runs at once, "
            f"got {width}. Ask for fewer beams, or start the server with a larger --max-running-requests.",
            param="beam_width",
        )
    num_shared = num_prompt_tokens // state.page_size
    num_own = (state.pool.num_usable - num_shared) // width
    num_new_tokens = (num_shared + num_own) * state.page_size - num_prompt_tokens
    if num_new_tokens < 1:
        raise InvalidRequestError(
            f"A beam_width of {width} after a prompt of {num_prompt_tokens} tokens needs "
            f"{num_shared + width} pages of {state.page_size} tokens, but the KV pool holds "
            f"{state.pool.num_usable}. Ask for fewer beams, shorten the prompt, or start the server with a "
            "larger --max-total-tokens.",
            param="beam_width",
        )
    return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, num_new_tokens))


def begin(state: SchedulerState, seq: Seq) -> None:
    """Turn a sequence whose prefill is done into a search with the prompt as its only hypothesis."""
    num_shared = seq.num_prompt_tokens // state.page_size
    prompt = Beam(newest=None, cumulative_logprob=0.0, slot=seq.slot, page_ids=seq.page_ids[num_shared:])
    del seq.page_ids[num_shared:]
    seq.beams = [prompt]


def advance(state: SchedulerState, seq: Seq, row_scores: Sequence[TokenScores]) -> None:
    """Choose the next beams, given the scores of a row of each live one, in their order."""
    width = seq.params.beam_width
    parents = seq.beams
    rows = iter(row_scores)
    scores = [next(rows) if beam.finish is None else None for beam in parents]
    offers = [_list_offers(rank, beam, scores[rank], width) for rank, beam in enumerate(parents)]
    best = list(islice(heapq.merge(*offers), width))
    seq.beams = [_take_offer(seq.params, parents[offer.rank], scores[offer.rank], offer) for offer in best]
    _hand_over(state, seq, parents, [offer.rank for offer in best])


def is_over(seq: Seq) -> bool:
    return all(beam.finish is not None for beam in seq.beams)


def count_output_tokens(seq: Seq) -> int:
    """Output tokens that a request has so far, in all its hypotheses."""
    return seq.num_output_tokens + sum(beam.length for beam in seq.beams)


def list_results(seq: Seq) -> list[BeamResult]:
    """The finished beams, best first."""
    results = []
    for beam in seq.beams:
        links: list[Link] = []
        link = beam.newest
        while link is not None:
            links.append(link)
            link = link.before
        links.reverse()
        assert beam.finish is not None
        results.append(
            BeamResult(
                token_ids=[link.token_id for link in links],
                scores=[link.scores for link in links],
                cumulative_logprob=beam.cumulative_logprob,
                finish=beam.finish,
            )
        )
    return results


def count_step_pages(state: SchedulerState, seq: Seq) -> int:
    """Pages that the next step of a search takes out of the pool."""
    live = _list_live(seq)
    index = seq.num_planned // state.page_size - len(seq.page_ids)
    if index == len(live[0].page_ids):
        return len(live)
    return len(live) - len({beam.page_ids[index] for beam in live})


def count_first_pages(state: SchedulerState, seq: Seq) -> int:
    """Pages for the prompt of a search, a copy of its last one for each beam, and one more to grow.

    No more than the search may come to hold, which by `fit_search` is no more than the pool.
    """
    num_shared = seq.num_prompt_tokens // state.page_size
    num_pages = state.pages_for(min(seq.num_prompt_tokens + state.page_size, seq.num_kv_tokens))
    return num_shared + seq.params.beam_width * (num_pages - num_shared)


def count_soon_pages(state: SchedulerState, seq: Seq) -> int:
    """Pages that a search wants soon: copies of the one it is filling, and one more to grow for each beam."""
    live = _list_live(seq)
    num_pages = state.pages_for(min(seq.num_planned + state.page_size, seq.num_kv_tokens))
    num_grown = (num_pages - len(seq.page_ids) - len(live[0].page_ids)) * len(live)
    return num_grown + (count_step_pages(state, seq) if seq.num_planned % state.page_size else 0)


def plan_step(state: SchedulerState, seq: Seq) -> BeamStep:
    """A row for each live beam, after making the page it writes its own. Takes count_step_pages pages."""
    step = BeamStep()
    position = seq.num_planned
    index = position // state.page_size - len(seq.page_ids)
    for beam in _list_live(seq):
        if index == len(beam.page_ids):
            beam.page_ids.append(state.cache.allocate())
        elif state.pool.refcounts[beam.page_ids[index]] > 1:
            source = beam.page_ids[index]
            beam.page_ids[index] = state.cache.allocate()
            state.cache.drop([source])
            step.copies.append(PageCopy(source=source, target=beam.page_ids[index]))
        if not beam.is_table_known:
            step.tables.append(PageTable(slot=beam.slot, page_ids=seq.page_ids + beam.page_ids))
            beam.is_table_known = True
        assert beam.newest is not None
        page_id, token_id = beam.page_ids[index], beam.newest.token_id
        step.rows.append(DecodeRow(beam.slot, seq.seq_id, seq.epoch, position, page_id, token_id))
    seq.num_planned += 1
    seq.num_in_flight += 1
    return step


def drop_beams(state: SchedulerState, seq: Seq) -> None:
    """Forget the hypotheses and let go of their pages."""
    for beam in seq.beams:
        state.cache.drop(beam.page_ids)
    seq.beams = []


def _list_live(seq: Seq) -> list[Beam]:
    return [beam for beam in seq.beams if beam.finish is None]


def _list_offers(rank: int, beam: Beam, row: TokenScores | None, width: int) -> Iterator[Candidate]:
    """Best first: the order of the row, whose alternatives are sorted by log-probability and id."""
    base = beam.cumulative_logprob
    if row is None:
        yield Candidate(-base, rank, NO_TOKEN, 0)
        return
    for place, token_id in enumerate(row.top_ids[:width]):
        yield Candidate(-(base + row.top_logprobs[place]), rank, token_id, place)


def _take_offer(params: TokenParams, parent: Beam, row: TokenScores | None, offer: Candidate) -> Beam:
    if row is None:
        return parent
    assert params.scores is not None  # fit_search
    told = slice(params.scores.num_told)
    scores = TokenScores(
        row.top_logprobs[offer.place], row.top_ids[told], row.top_logprobs[told], row.watched_logprobs
    )
    newest = Link(offer.token_id, scores, parent.newest, parent.length + 1)
    finish = None
    if offer.token_id in params.stop_ids:
        finish = FinishReason(kind="stop", matched=offer.token_id)
    elif newest.length >= params.max_new_tokens:
        finish = FinishReason(kind="length")
    return Beam(newest, -offer.cost, finish)


def _hand_over(state: SchedulerState, seq: Seq, parents: list[Beam], ranks: list[int]) -> None:
    """Give the live beams of `seq` the slots and pages of their parents, which stand at `ranks`."""
    heirs: dict[int, list[Beam]] = {rank: [] for rank, parent in enumerate(parents) if parent.finish is None}
    for beam, rank in zip(seq.beams, ranks, strict=True):
        if beam.finish is None:
            heirs[rank].append(beam)
    for rank, children in heirs.items():
        parent = parents[rank]
        if not children:
            state.cache.drop(parent.page_ids)
        for beam in children[1:]:
            beam.page_ids = list(parent.page_ids)
            beam.is_table_known = False
            state.cache.share(beam.page_ids)
        for beam in children[:1]:
            beam.slot, beam.page_ids = parent.slot, parent.page_ids
    taken = {beam.slot for beam in seq.beams}
    spare = [slot for slot in (seq.slot, *seq.beam_slots) if slot not in taken]
    for beam in _list_live(seq):
        if beam.slot < 0:
            beam.slot = spare.pop(0)
