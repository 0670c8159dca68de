"""What the scheduler knows: one Seq a live request, and the SchedulerState that holds them all.

Changed only by schedule.py, admit.py, beams.py, speculate.py and window.py; read by the engine through the
functions at the end. Plain data: knows nothing of text, arrays, devices or time. All order is that of lists
and dicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxserve.images import PlacedImage
from jaxserve.scheduler.features import FeatureCache
from jaxserve.scheduler.images import find_cache_ids
from jaxserve.scheduler.lookup import Lookup
from jaxserve.scheduler.pages import PagePool
from jaxserve.scheduler.prefix_cache import Node, PrefixCache
from jaxserve.types import BeamResult, FinishReason, TokenDelta, TokenParams, TokenScores

Sampled = tuple[int, TokenScores | None]  # what one row gave


class SeqStatus(Enum):
    WAITING = "waiting"  # for a slot: never run so far, or retracted
    RUNNING = "running"  # has a slot: in its prefill, or decoding
    FINISHED = "finished"  # stopped, full or aborted; holds nothing


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """The newest token of a hypothesis and the way back to its first; siblings share what is before them."""

    token_id: int
    scores: TokenScores
    before: Link | None
    length: int  # tokens from the first to this one


@dataclass(slots=True, eq=False)
class Beam:
    """A hypothesis of a beam search. It is live until it has a `finish`; then it holds no slot, no page."""

    newest: Link | None  # None for the prompt itself, from which a search starts
    cumulative_logprob: float
    finish: FinishReason | None = None
    slot: int = -1
    page_ids: list[int] = field(default_factory=list)  # what follows Seq.page_ids; siblings may share them
    is_table_known: bool = True  # whether the device has this beam's block table in the slot

    @property
    def length(self) -> int:
        return 0 if self.newest is None else self.newest.length


@dataclass(slots=True, eq=False)
class Seq:
    """One request. Its token positions, once it decodes and two steps are planned ahead:

        0                 num_prompt_tokens      num_known    num_planned
        | prompt tokens   | known output tokens  | in flight  .
        | KV computed, or certain to be, once the planned steps ran   | one more token sampled

    During the prefill nothing is in flight and num_planned < prefill_end = num_known. From the end of
    the prefill on, num_planned + 1 == num_known + num_in_flight: the last sampled token, known or
    not, has no KV yet.

    A beam search (beam_width above 1) is one Seq too. Once its prefill is applied it has `beams`: then
    token_ids remain the prompt, page_ids are the prompt's full pages, and num_planned and num_in_flight
    count the positions of each live beam, which all have the same length.
    """

    seq_id: int  # order of arrival
    rid: str
    params: TokenParams
    priority: int
    cache_salt: str
    num_prompt_tokens: int
    num_kv_tokens: int  # positions that ever need KV; the last output token is sampled and never fed
    token_ids: list[int]  # prompt, then the output tokens known so far
    tail: Node  # of the prefix cache: the end of the part of our pages that is cached
    images: tuple[PlacedImage, ...] = ()  # of the prompt, in their order
    status: SeqStatus = SeqStatus.WAITING
    slot: int = -1
    epoch: int = 0  # counts retractions; results planned in an earlier epoch are ignored
    page_ids: list[int] = field(default_factory=list)
    prefill_end: int = 0  # tokens known at admission: where prefill ends and decoding begins
    num_planned: int = 0  # positions 0 .. num_planned - 1 have their KV computed by planned steps
    num_in_flight: int = 0  # tokens sampled by planned steps that are not applied yet
    num_cached_tokens: int | None = None  # matched at the first admission, and never changed after
    num_scored: int = 0  # of params.scores.prompt_rows, those whose scores were told
    num_score_planned: int = 0  # those that planned steps compute, told or not
    leader: PrefillLead | None = None  # whose prefill this waiting sequence is held for
    num_drafts_in_flight: int = 0  # guessed tokens, the last of those in flight (speculate.py)
    num_drafted: int = 0  # guessed tokens that were verified
    num_accepted: int = 0  # and of these, the ones that became output
    lookup: Lookup | None = None  # what guesses are made from; None until the first is thought of
    match: Node | None = None  # the longest cached prefix that was found while it waits
    match_stamp: int = -1  # when that was: PrefixCache.num_attached; -1 if there may be more of it
    num_passed: int = 0  # admissions before it while it is the front of its class (queue_order.py)
    beam_slots: list[int] = field(default_factory=list)  # beside `slot`, reserved at admission
    beams: list[Beam] = field(default_factory=list)  # best first
    # What the prefix cache knows token_ids by: the same list, unless there are images.
    cache_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cache_ids = find_cache_ids(self.token_ids, self.images) if self.images else self.token_ids

    def append(self, token_ids: list[int]) -> None:
        """More output tokens are known."""
        self.token_ids += token_ids
        if self.images:
            self.cache_ids += token_ids

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_cacheable_tokens(self) -> int:
        """The most tokens whose KV may come out of the prefix cache: the last known token must be computed,
        and so must the first prompt row that is still to be scored."""
        limit = len(self.token_ids) - 1
        scores = self.params.scores
        if scores is not None and self.num_scored < len(scores.prompt_rows):
            limit = min(limit, scores.prompt_rows[self.num_scored])
        return limit

    @property
    def is_prefilling(self) -> bool:
        return self.num_planned < self.prefill_end

    @property
    def can_decode(self) -> bool:
        """Whether the prefill is planned to its end and one more token may be asked for.

        The row at position p samples token p + 1, so asking for no more than max_new_tokens, known and
        in flight, is the same as feeding no position past the last that needs KV. What a beam search
        feeds next is decided by what is in flight.
        """
        if self.num_in_flight and self.is_search:
            return False
        return self.prefill_end <= self.num_planned < self.num_kv_tokens

    @property
    def is_search(self) -> bool:
        return self.params.beam_width > 1

    @property
    def search_depth(self) -> int:
        """Tokens of each live beam."""
        return max((beam.length for beam in self.beams), default=0)

    @property
    def is_fully_planned(self) -> bool:
        """Whether nothing is left to plan: once the planned steps are applied it has ended."""
        return self.num_planned == self.num_kv_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens that are known and whose KV is computed by planned steps: what may be cached."""
        return min(self.num_planned, len(self.token_ids))

    @property
    def queue_key(self) -> tuple[int, int, int]:
        """The waiting queue's order: retracted ones by arrival, then the rest by priority and arrival."""
        if self.epoch > 0:
            return (0, 0, self.seq_id)
        return (1, -self.priority, self.seq_id)


@dataclass(frozen=True, slots=True)
class PrefillLead:
    """A running prefill that will have cached `num_tokens` tokens which another sequence also needs."""

    seq: Seq
    epoch: int
    num_tokens: int

    @property
    def is_pending(self) -> bool:
        seq = self.seq
        is_same_run = seq.status is SeqStatus.RUNNING and seq.epoch == self.epoch
        return is_same_run and seq.num_planned < self.num_tokens


@dataclass(slots=True)
class SchedulerState:
    """All of it. The counts at the end are totals since the start, for the engine's statistics."""

    page_size: int
    max_rows: int
    pool: PagePool
    cache: PrefixCache
    waiting: list[Seq] = field(default_factory=list)  # sorted by queue_key
    running: dict[int, Seq] = field(default_factory=dict)  # by seq_id, in order of admission
    by_rid: dict[str, Seq] = field(default_factory=dict)  # waiting and running
    free_slots: list[int] = field(default_factory=list)  # a stack: the last one is given next
    prefers_cached: bool = True  # whether requests whose prefix is cached may go before others
    next_seq_id: int = 0
    num_steps: int = 0  # plans that were not empty
    num_prompt_tokens: int = 0  # of requests admitted
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0  # by prefills, those of retracted requests included
    num_generated_tokens: int = 0
    num_retractions: int = 0
    num_aborted: int = 0
    num_finished: int = 0  # by stop or length
    max_drafts: int = 0  # guessed tokens for one sequence in one step; 0: no speculation
    num_drafted: int = 0  # guessed tokens verified
    num_accepted: int = 0  # guessed tokens that became output
    features: FeatureCache | None = None  # None for a model that reads text only
    num_encoded_images: int = 0

    def clear_caches(self) -> None:
        """Evict what nobody uses: pages, and the features of images, which nobody holds beyond a plan."""
        self.cache.clear()
        if self.features is not None:
            self.features.clear()

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def new_state(
    num_pages: int,
    page_size: int,
    max_rows: int,
    use_prefix_cache: bool = True,
    prefers_cached: bool = True,
    max_drafts: int = 0,
    features: FeatureCache | None = None,
) -> SchedulerState:
    """An idle scheduler over `num_pages` pages (page 0 is trash, so one less is used), `max_rows` slots.

    With `max_drafts` it speculates: so many guessed tokens at most for a sequence in a step. `features` are
    there if the model takes images.
    """
    assert page_size >= 1, f"page_size must be at least 1, got {page_size}"
    assert max_rows >= 1, f"max_rows must be at least 1, got {max_rows}"
    pool = PagePool(num_pages)
    cache = PrefixCache(pool=pool, page_size=page_size, is_enabled=use_prefix_cache)
    free_slots = list(range(max_rows - 1, -1, -1))
    return SchedulerState(
        page_size=page_size,
        max_rows=max_rows,
        pool=pool,
        cache=cache,
        free_slots=free_slots,
        prefers_cached=prefers_cached,
        max_drafts=max_drafts,
        features=features,
    )


def num_running(state: SchedulerState) -> int:
    return len(state.running)


def num_waiting(state: SchedulerState) -> int:
    return len(state.waiting)


def num_free_pages(state: SchedulerState) -> int:
    """Pages that are free, or cached and not in use."""
    return state.cache.num_available


def has_work(state: SchedulerState) -> bool:
    """Whether any request is waiting or running. `schedule` may still have nothing to plan until the
    steps in flight are applied."""
    return bool(state.running or state.waiting)


def make_delta(
    seq: Seq,
    token_ids: list[int],
    finish: FinishReason | None = None,
    *,
    scores: list[TokenScores] | None = None,
    prompt_scores: list[TokenScores] | None = None,
    beams: list[BeamResult] | None = None,
) -> TokenDelta:
    """New tokens of one request (already part of `seq`) and scores, with its counts so far; or all beams."""
    num_beam_tokens = sum(len(beam.token_ids) for beam in beams) if beams else 0
    return TokenDelta(
        rid=seq.rid,
        token_ids=token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_cached_tokens=seq.num_cached_tokens or 0,
        num_output_tokens=len(seq.token_ids) - seq.num_prompt_tokens + num_beam_tokens,
        num_retractions=seq.epoch,
        num_drafted=seq.num_drafted,
        num_accepted=seq.num_accepted,
        finish=finish,
        scores=scores or [],
        prompt_scores=prompt_scores or [],
        beams=beams or [],
    )


def find_end(params: TokenParams, token_id: int, num_output_tokens: int) -> FinishReason | None:
    """Whether a token is the last of its reply, being the `num_output_tokens`-th, and why."""
    if token_id in params.stop_ids and num_output_tokens >= params.min_new_tokens:
        return FinishReason(kind="stop", matched=token_id)
    if num_output_tokens >= params.max_new_tokens:
        return FinishReason(kind="length")
    return None
