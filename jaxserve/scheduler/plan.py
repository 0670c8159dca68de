"""StepPlan: everything the runner needs for one step, as plain numbers.

Made by scheduler/schedule.py, run by runner/runner.py, and one day broadcast to the other hosts. It
serialises, prints and compares; it holds no arrays and no references to requests.

One step computes decode rows (one token each, fed from the device's own memory of the last sampled
token) and prefill chunks (runs of known tokens), in that order:

    decode[0] .. decode[R-1]   chunks[0] tokens | chunks[1] tokens | ...

Several decode rows may be of one slot, at consecutive positions: the first feeds the last known token, the
others guesses of those after it (speculate.py). A row sees what those before it wrote in the same step.

Every decode row, and every chunk with `samples`, yields one sampled token. Results come back in the same
order: all decode rows, then all chunks (chunks that do not sample yield a value to ignore). A row whose
logits are not numbers yields NO_TOKEN.

A window (window.py) is several steps of the same decode rows in one launch, and of nothing else: each row
runs `num_steps` times, at consecutive positions, and yields as many tokens, behind each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from jaxserve.types import TokenParams, TokenScores

NO_TOKEN = -1
NO_ROW = -1  # of a token that is text


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A slot given to a sequence: its sampling state before the first chunk of this step runs."""

    slot: int
    params: TokenParams
    prompt_ids: list[int]
    output_ids: list[int]  # not empty when the sequence was retracted before
    grids: tuple[tuple[int, int, int], ...] = ()  # of the prompt's images, in their order


class DecodeRow(msgspec.Struct, frozen=True):
    slot: int
    seq_id: int
    epoch: int  # the sequence's count of retractions when this row was planned
    position: int  # of the token fed in this step; the row attends to position + 1 tokens
    page_id: int  # of the page that holds `position`
    token_id: int = NO_TOKEN  # what to feed; NO_TOKEN: what the slot's only row of the last step sampled
    num_steps: int = 1  # of a window, in which the row takes part
    next_page_id: int = 0  # of the page behind page_id, if a window reaches it


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    slot: int
    seq_id: int
    epoch: int
    start: int  # position of token_ids[0]
    token_ids: list[int]
    page_ids: list[int]  # the sequence's whole block table, long enough for start + len(token_ids)
    samples: bool  # whether the chunk's last token is the last known one, so that its logits are sampled
    # Places in token_ids whose next token is scored, ascending, and that token. Costs a product with the
    # head for each, so these are exactly the rows that the request wants.
    score_places: list[int] = field(default_factory=list)
    score_targets: list[int] = field(default_factory=list)
    # Of each token, where the features that stand for it are, or NO_ROW; [] if no token is of an image.
    feature_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PageTable:
    """The whole block table of a slot, written before the step's rows run. For beams, whose tables change
    with their parents; other decode rows only ever append to what their prefill wrote."""

    slot: int
    page_ids: list[int]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copies a page in every layer before the step's rows run; all sources are read before any is written."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ImageEncode:
    """An image that the vision encoder reads before the step's rows run, or some of the encoder's stages (its
    blocks) of it; its features go to `rows` after the last one. A plan with the next stages follows soon; in
    between there is no other image."""

    content_id: str
    grid: tuple[int, int, int]  # patches in time, down and across
    patches: bytes  # uint8; empty behind stage 0
    rows: list[int]  # one a token
    first_stage: int = 0
    end_stage: int = 1  # the first one that does not run in this step
    is_last: bool = True  # whether that is the end of the encoder


@dataclass(frozen=True, slots=True)
class StepPlan:
    step: int
    inits: tuple[SlotInit, ...]
    decode: tuple[DecodeRow, ...]
    chunks: tuple[PrefillChunk, ...]
    tables: tuple[PageTable, ...] = ()
    copies: tuple[PageCopy, ...] = ()
    num_waiting: int = 0  # requests that found no place in it
    encode: ImageEncode | None = None
    window: int = 1  # steps of one launch

    @property
    def num_chunk_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.chunks and self.encode is None


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold. The bucket ladders list only programs that are compiled and ready."""

    page_size: int
    max_rows: int  # running sequences, = number of slots
    max_chunks: int  # prefill chunks in one step
    max_chunk_tokens: int  # prefill tokens in one step
    token_buckets: tuple[int, ...]  # ascending sizes of the prefill token axis
    max_mixed_tokens: int | None = None  # prefill tokens in a step that has decode rows too; None: as many
    is_final: bool = False  # whether no more programs will become ready
    can_fork: bool = True  # whether tables can be written and pages copied: beams wait for it
    admits_new: bool = True  # False: only what has run before may enter, so that all of that ends
    # For speculation: ascending sizes of the decode programs, what a step in each costs, and what it costs
    # to plan a step only when the one before is known; any unit of time.
    row_buckets: tuple[int, ...] = ()
    row_costs: tuple[float, ...] = ()
    wait_cost: float = 0.0
    window: int = 1  # steps of one launch, at most; no more than a page has tokens
    window_rows: tuple[int, ...] = ()  # those of row_buckets whose programs run a window
    max_image_patches: int = 0  # of an image that the vision programs can encode
    # Stages of the vision encoder, and by its programs' patches, ascending, how many of them take about as
    # long as max_mixed_tokens of a prompt.
    num_image_stages: int = 1
    stages_a_step: tuple[tuple[int, int], ...] = ()

    def count_image_stages(self, num_patches: int) -> int:
        """Of an image in a step that others wait for; one at least."""
        found = next((most for patches, most in self.stages_a_step if patches >= num_patches), 1)
        return min(max(found, 1), self.num_image_stages)

    def can_run(self, num_rows: int) -> bool:
        """Whether the programs allow a request of so many rows: the beams of a search, or one."""
        return num_rows == 1 or (self.can_fork and num_rows <= self.max_rows)


class StepResult(msgspec.Struct, frozen=True):
    """What a step gave, in the plan's order: decode rows, then chunks.

    `scores` is empty when no row of the step wants any, else one entry a result (None for those that want
    none). `prompt_scores` has one list a chunk with score_places, in the order of the chunks.
    """

    token_ids: list[int]
    scores: list[TokenScores | None] = []
    prompt_scores: list[list[TokenScores]] = []
