"""A device that models memory, and the oracles of what requests get from it.

It keeps what each (page, offset) holds: a token, its position, and a hash of everything before it, as the
KV of a real token depends on its whole prefix. A row may only attend to exactly the right ones; a page that
is shared by mistake, stale, leaked or reused too early shows at once. What it samples and how it rates
tokens are functions of that hash, so that a wrong read would also change the reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.scheduler.plan import NO_TOKEN, DecodeRow, PrefillChunk, StepPlan, StepResult
from jaxserve.types import BeamResult, FinishReason, TokenParams, TokenScores

VOCAB = 13
REPETITIVE_SEEDS = (3, 4)


def extend_hash(prefix_hash: int, token_id: int) -> int:
    return hash((prefix_hash, token_id))


def sample_token(prefix_hash: int, params: TokenParams, num_output_tokens: int) -> int:
    token_id = ((prefix_hash >> 8) + params.seed) % VOCAB
    if params.seed in REPETITIVE_SEEDS and prefix_hash % 8:  # a text that repeats itself, most of the time
        token_id = num_output_tokens * (params.seed + 1) % 5
    while num_output_tokens < params.min_new_tokens and token_id in params.stop_ids:
        token_id = (token_id + 1) % VOCAB
    return token_id


def rate_tokens(prefix_hash: int) -> list[float]:
    """A log-probability for each token: quarters, so that sums are exact and ties are common."""
    return [-(1 + (prefix_hash >> 4 * token_id) % 16) / 4 for token_id in range(VOCAB)]


def score_row(prefix_hash: int, num_top: int) -> TokenScores:
    ratings = rate_tokens(prefix_hash)
    top_ids = sorted(range(VOCAB), key=lambda token_id: (-ratings[token_id], token_id))[:num_top]
    top_logprobs = [ratings[token_id] for token_id in top_ids]
    return TokenScores(top_logprobs[0], top_ids, top_logprobs, [])


def score_prompt_row(prefix_hash: int, row: int, target_id: int) -> TokenScores:
    """Shows of which row it is, and that the row saw what stands before it."""
    return TokenScores(rate_tokens(prefix_hash)[target_id], [row, target_id], [], [])


@dataclass
class Hypothesis:
    token_ids: list[int]
    prefix_hash: int
    sum: float = 0.0
    finish: FinishReason | None = None


def search_simply(prefix_hash: int, params: TokenParams, max_new_tokens: int) -> list[Hypothesis]:
    """The search over whole lists: every continuation of every beam is made, sorted and cut."""
    beams = [Hypothesis([], prefix_hash)]
    while any(beam.finish is None for beam in beams):
        offers = []
        for rank, beam in enumerate(beams):
            if beam.finish is not None:
                offers.append((-beam.sum, rank, -1, beam))
                continue
            for token_id, logprob in enumerate(rate_tokens(beam.prefix_hash)):
                longer = Hypothesis(
                    [*beam.token_ids, token_id],
                    extend_hash(beam.prefix_hash, token_id),
                    beam.sum + logprob,
                )
                if token_id in params.stop_ids:
                    longer.finish = FinishReason(kind="stop", matched=token_id)
                elif len(longer.token_ids) == max_new_tokens:
                    longer.finish = FinishReason(kind="length")
                offers.append((-longer.sum, rank, token_id, longer))
        offers.sort(key=lambda offer: offer[:3])
        beams = [offer[3] for offer in offers[: params.beam_width]]
    return beams


@dataclass
class Request:
    """One request with its oracle: what it would get alone, computed one token after the other."""

    rid: str
    prompt_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""
    token_ids: list[int] = field(default_factory=list)  # the prompt and the reply, past its stop as well
    hashes: list[int] = field(default_factory=list)  # of the tokens up to and with each position

    @property
    def first_hash(self) -> int:
        """Differs by salt, so that pages shared between salts would be wrong ones."""
        return len(self.cache_salt)

    def entry_at(self, position: int) -> tuple[int, int, int]:
        """What memory must hold for a position."""
        while len(self.hashes) <= position:
            index = len(self.hashes)
            before = self.hashes[-1] if self.hashes else self.first_hash
            num_output_tokens = index - len(self.prompt_ids)
            if num_output_tokens < 0:
                token_id = self.prompt_ids[index]
            else:
                token_id = sample_token(before, self.params, num_output_tokens)
            self.token_ids.append(token_id)
            self.hashes.append(extend_hash(before, token_id))
        return self.token_ids[position], position, self.hashes[position]

    def expect_reply(self, max_new_tokens: int) -> tuple[list[int], FinishReason]:
        """The reply, and why it ends."""
        num_prompt_tokens = len(self.prompt_ids)
        reply: list[int] = []
        while len(reply) < max_new_tokens:
            reply.append(self.entry_at(num_prompt_tokens + len(reply))[0])
            if reply[-1] in self.params.stop_ids and len(reply) >= self.params.min_new_tokens:
                return reply, FinishReason(kind="stop", matched=reply[-1])
        return reply, FinishReason(kind="length")

    def expect_scores(self, num_tokens: int) -> list[TokenScores]:
        """Those told with the first tokens of the reply."""
        scores = self.params.scores
        if scores is None or not scores.of_output:
            return []
        first_row = len(self.prompt_ids) - 1
        rows = range(first_row, first_row + num_tokens)
        return [score_row(self.entry_at(row)[2], scores.num_top) for row in rows]

    def expect_prompt_scores(self) -> list[TokenScores]:
        rows = self.params.scores.prompt_rows if self.params.scores else ()
        return [score_prompt_row(self.entry_at(row)[2], row, self.prompt_ids[row + 1]) for row in rows]

    def expect_beams(self, max_new_tokens: int) -> list[BeamResult]:
        """The beams; the scores of each token are those of the row that follows its own prefix."""
        assert self.params.scores is not None
        last_hash = self.entry_at(len(self.prompt_ids) - 1)[2]
        results = []
        for beam in search_simply(last_hash, self.params, max_new_tokens):
            scores = []
            prefix_hash = last_hash
            for token_id in beam.token_ids:
                row = score_row(prefix_hash, self.params.scores.num_top)
                logprob = rate_tokens(prefix_hash)[token_id]
                scores.append(TokenScores(logprob, row.top_ids, row.top_logprobs, []))
                prefix_hash = extend_hash(prefix_hash, token_id)
            assert beam.finish is not None
            results.append(
                BeamResult(
                    token_ids=beam.token_ids, scores=scores, cumulative_logprob=beam.sum, finish=beam.finish
                )
            )
        return results


@dataclass
class Slot:
    params: TokenParams
    known_ids: list[int]
    table: list[int] = field(default_factory=list)
    last_token_id: int = NO_TOKEN


@dataclass
class Feed:
    """Tokens that one row or chunk computes in this step, or a draft: a row and those that verify guesses."""

    request: Request
    slot: Slot
    start: int
    token_ids: list[int]
    samples: bool
    is_draft: bool = False  # each of its tokens yields a result


@dataclass
class MemoryDevice:
    page_size: int
    requests: list[Request]  # by seq_id
    slots: dict[int, Slot] = field(default_factory=dict)
    memory: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    num_copies: int = 0
    num_rows: int = 0  # of decoding

    def launch(self, plan: StepPlan) -> StepResult:
        """Run a step; returns its results, aligned as plan.py says."""
        if plan.window > 1:
            return self._launch_window(plan)
        for init in plan.inits:
            known_ids = init.prompt_ids + init.output_ids
            self.slots[init.slot] = Slot(init.params, known_ids)
        self._fork(plan)
        feeds = self._list_feeds(plan)
        # A step may neither rely on, nor be hurt by, the order in which its own rows read and write.
        for feed in feeds:
            self._check_context(feed, feed.start)
        written: dict[tuple[int, int], tuple[int, int, int]] = {}
        for feed in feeds:
            prefix_hash = self._read(feed.slot, feed.start - 1)[2] if feed.start else feed.request.first_hash
            for position, token_id in enumerate(feed.token_ids, start=feed.start):
                prefix_hash = extend_hash(prefix_hash, token_id)
                place = self._place(feed.slot, position)
                assert place not in written, f"two rows of one step write {place}"
                written[place] = (token_id, position, prefix_hash)
        self.memory.update(written)
        for feed in feeds:  # guesses may be wrong
            self._check_context(feed, feed.start + (1 if feed.is_draft else len(feed.token_ids)))
        prompt_scores = [
            self._score_prompt(feed, chunk)
            for feed, chunk in zip(feeds[len(feeds) - len(plan.chunks) :], plan.chunks, strict=True)
            if chunk.score_places
        ]
        results = [result for feed in feeds for result in self._list_results(feed)]
        token_ids, scores = zip(*results, strict=True)
        return StepResult(list(token_ids), list(scores), prompt_scores)

    def _launch_window(self, plan: StepPlan) -> StepResult:
        """Its steps one by one: of the rows that still take part, each fed what it sampled before."""
        alone = StepPlan(plan.step, (), plan.decode, (), num_waiting=plan.num_waiting, window=plan.window)
        assert plan == alone, "a window of more than decode rows"
        assert plan.window == max(row.num_steps for row in plan.decode)
        assert len({row.slot for row in plan.decode}) == len(plan.decode), "a window with a draft"
        told: list[list[tuple[int, TokenScores | None]]] = [[] for _ in plan.decode]
        for step in range(plan.window):
            live = [index for index, row in enumerate(plan.decode) if step < row.num_steps]
            rows = tuple(self._move_row(plan.decode[index], step) for index in live)
            result = self.launch(StepPlan(plan.step, (), rows, ()))
            for index, sampled in zip(live, zip(result.token_ids, result.scores, strict=True), strict=True):
                told[index].append(sampled)
        token_ids, scores = zip(*(sampled for row in told for sampled in row), strict=True)
        return StepResult(list(token_ids), list(scores))

    def _move_row(self, row: DecodeRow, step: int) -> DecodeRow:
        position = row.position + step
        is_same_page = position // self.page_size == row.position // self.page_size
        page_id = row.page_id if is_same_page else row.next_page_id
        token_id = NO_TOKEN if step else row.token_id
        return DecodeRow(row.slot, row.seq_id, row.epoch, position, page_id, token_id)

    def _fork(self, plan: StepPlan) -> None:
        for table in plan.tables:
            self.slots[table.slot].table = list(table.page_ids)
        self.num_copies += len(plan.copies)
        targets = [copy.target for copy in plan.copies]
        assert len(set(targets)) == len(targets), f"two copies to one page: {plan.copies}"
        before = dict(self.memory)
        for copy in plan.copies:
            for offset in range(self.page_size):
                self.memory.pop((copy.target, offset), None)
                if (copy.source, offset) in before:
                    self.memory[copy.target, offset] = before[copy.source, offset]

    def _list_feeds(self, plan: StepPlan) -> list[Feed]:
        feeds: list[Feed] = []
        for row in plan.decode:
            slot = self.slots[row.slot]
            self.num_rows += 1
            index = row.position // self.page_size
            assert index <= len(slot.table), f"slot {row.slot} has no table up to page {index}"
            slot.table[index:] = [row.page_id]
            token_id = slot.last_token_id if row.token_id == NO_TOKEN else row.token_id
            assert token_id != NO_TOKEN, f"nobody knows what slot {row.slot} is to be fed"
            before = feeds[-1] if feeds else None
            if before and before.slot is slot:
                assert row.position == before.start + len(before.token_ids), "a draft with a gap"
                before.token_ids.append(token_id)
                before.is_draft = True
                continue
            feeds.append(Feed(self.requests[row.seq_id], slot, row.position, [token_id], True))
        for chunk in plan.chunks:
            slot = self.slots[chunk.slot]
            end = chunk.start + len(chunk.token_ids)
            slot.table = list(chunk.page_ids)
            assert chunk.token_ids == slot.known_ids[chunk.start : end]
            assert chunk.samples == (end == len(slot.known_ids) and slot.params.max_new_tokens > 0)
            feeds.append(Feed(self.requests[chunk.seq_id], slot, chunk.start, chunk.token_ids, chunk.samples))
        return feeds

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        page_id = slot.table[position // self.page_size]
        assert page_id != 0, "a real token is to be written to the trash page"
        return page_id, position % self.page_size

    def _read(self, slot: Slot, position: int) -> tuple[int, int, int]:
        return self.memory[self._place(slot, position)]

    def _check_context(self, feed: Feed, num_tokens: int) -> None:
        """What a row sees is its request's own text; for a beam any continuation of the prompt, in one piece
        (whether it is the right one shows in what is found)."""
        request = feed.request
        prefix_hash = request.first_hash
        for position in range(num_tokens):
            held = self._read(feed.slot, position)
            if slot_searches(feed.slot) and position >= len(request.prompt_ids):
                right = (held[0], position, extend_hash(prefix_hash, held[0]))
            else:
                right = request.entry_at(position)
            assert held == right, f"{request.rid} reads {held} at position {position}, expected {right}"
            prefix_hash = held[2]

    def _list_results(self, feed: Feed) -> list[tuple[int, TokenScores | None]]:
        """One for the last token that is fed, or for each of a draft."""
        first = 0 if feed.is_draft else len(feed.token_ids) - 1
        return [self._sample(feed, feed.start + index) for index in range(first, len(feed.token_ids))]

    def _sample(self, feed: Feed, position: int) -> tuple[int, TokenScores | None]:
        if not feed.samples:
            return 0, None
        slot = feed.slot
        prefix_hash = self._read(slot, position)[2]
        num_output_tokens = position + 1 - len(feed.request.prompt_ids)
        token_id = sample_token(prefix_hash, slot.params, num_output_tokens)
        # Which row of a draft the device remembers is left open: none may be relied on.
        slot.last_token_id = NO_TOKEN if feed.is_draft else token_id
        scores = slot.params.scores
        if scores is None or not scores.of_output:
            return token_id, None
        return token_id, score_row(prefix_hash, scores.num_top)

    def _score_prompt(self, feed: Feed, chunk: PrefillChunk) -> list[TokenScores]:
        rows = [chunk.start + place for place in chunk.score_places]
        return [
            score_prompt_row(self._read(feed.slot, row)[2], row, target_id)
            for row, target_id in zip(rows, chunk.score_targets, strict=True)
        ]


def slot_searches(slot: Slot) -> bool:
    return slot.params.beam_width > 1
