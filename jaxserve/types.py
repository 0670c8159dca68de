"""The plain data that crosses between rooms: sampling parameters, finish reasons, token deltas.

Used by the HTTP side, the engine and the library alike. Knows nothing of text processing, of HTTP,
of arrays or of devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from jaxserve.errors import InvalidRequestError

MAX_LISTED_IDS = 1024  # in logit_bias and stop_token_ids; OpenAI's API takes 300
MAX_STOP_CHARS = 1024
MAX_STOP_CHARS_IN_ALL = 8192
GREEDY_BELOW_TEMPERATURE = 1e-6  # SGLang's threshold: anything cooler is argmax


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a user may ask of generation, under SGLang's names and defaults.

    `top_k` -1 means all; `max_new_tokens` None means until the context is full, 0 means prefill only.
    `seed` None draws a fresh one per request. `beam_width` above 1 searches instead of sampling: then
    `temperature` must be 0, and what else changes the distribution or the number of choices be left alone.
    `logprobs` None asks for none; a number asks for those of the output's tokens and so many
    alternatives, from prompt position `logprob_start` on if that is given, and for those of `logprob_ids`
    at each position. Raises InvalidRequestError from `validate`.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_regex: tuple[str, ...] = ()
    beam_width: int = 1
    logprobs: int | None = None
    logprob_start: int | None = None
    logprob_ids: tuple[int, ...] = ()
    are_logprobs_scaled: bool = False

    def validate(self, vocab_size: int | None = None, names: Mapping[str, str] | None = None) -> None:
        """Raise InvalidRequestError with a sentence naming the field, its value and its range.

        `names` says what the caller calls a field, where that differs from here.
        """
        check = _Checker(names or {})
        check.require(self.temperature >= 0, "temperature", self.temperature, "a finite number >= 0")
        check.require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        check.require(self.top_k == -1 or self.top_k >= 1, "top_k", self.top_k, "-1 (all) or at least 1")
        check.require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        for name in ("frequency_penalty", "presence_penalty"):
            check.require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "in [-2, 2]")
        check.require(
            0 < self.repetition_penalty <= 2, "repetition_penalty", self.repetition_penalty, "in (0, 2]"
        )
        check.require(self.n >= 1, "n", self.n, "at least 1")
        check.require(self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "at least 0")
        if self.max_new_tokens is not None:
            check.require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "at least 0")
            most = f"at most {check.name('max_new_tokens')} ({self.max_new_tokens})"
            check.require(
                self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens, most
            )
        check.require(len(self.stop) <= 32, "stop", f"{len(self.stop)} strings", "at most 32 strings")
        sizes = [len(stop) for stop in self.stop]
        longest, total = max(sizes, default=0), sum(sizes)
        allowed = f"strings of at most {MAX_STOP_CHARS} characters each"
        check.require(longest <= MAX_STOP_CHARS, "stop", f"one of {longest}", allowed)
        allowed = f"at most {MAX_STOP_CHARS_IN_ALL} characters in all"
        check.require(total <= MAX_STOP_CHARS_IN_ALL, "stop", total, allowed)
        for name in ("logit_bias", "stop_token_ids"):
            number = len(getattr(self, name))
            check.require(number <= MAX_LISTED_IDS, name, f"{number} ids", f"at most {MAX_LISTED_IDS} ids")
        for token_id, bias in self.logit_bias.items():
            check.require(math.isfinite(bias), f"logit_bias[{token_id}]", bias, "finite")
        if vocab_size is not None:
            for name in ("logit_bias", "stop_token_ids"):
                for token_id in getattr(self, name):
                    check.require(
                        0 <= token_id < vocab_size, name, token_id, f"a token id in [0, {vocab_size})"
                    )
        _check_beams(self, check)
        _check_scores(self, vocab_size, check)


@dataclass(frozen=True, slots=True)
class _Checker:
    """Refusals under the names that the caller uses."""

    names: Mapping[str, str]

    def name(self, field_name: str) -> str:
        return self.names.get(field_name, field_name)

    def require(self, condition: bool, field_name: str, value: object, allowed: str) -> None:
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (condition and finite):
            name = self.name(field_name)
            raise InvalidRequestError(f"{name} must be {allowed}, got {value}.", param=name)


def _check_scores(params: SamplingParams, vocab_size: int | None, check: _Checker) -> None:
    if params.logprobs is None:
        for field_name in ("logprob_start", "logprob_ids"):
            if getattr(params, field_name) not in (None, ()):
                name = check.name(field_name)
                raise InvalidRequestError(f"{name} needs {check.name('logprobs')}.", param=name)
        return
    allowed = f"between 0 and {MAX_TOP_LOGPROBS}"
    check.require(0 <= params.logprobs <= MAX_TOP_LOGPROBS, "logprobs", params.logprobs, allowed)
    if params.logprob_start is not None:
        check.require(params.logprob_start >= 0, "logprob_start", params.logprob_start, "at least 0")
    num_ids = len(params.logprob_ids)
    check.require(
        num_ids <= MAX_WATCHED_IDS, "logprob_ids", f"{num_ids} ids", f"at most {MAX_WATCHED_IDS} ids"
    )
    for token_id in params.logprob_ids:
        if vocab_size is not None and not 0 <= token_id < vocab_size:
            name = check.name("logprob_ids")
            raise InvalidRequestError(
                f"{name} holds the out-of-vocabulary id {token_id}; ids are in [0, {vocab_size}).", param=name
            )


# What beam search has no meaning for: it follows the plain sum of log-probabilities.
_NOT_WITH_BEAMS = (
    *("n", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("logit_bias", "min_new_tokens", "stop", "stop_regex"),
)


def _check_beams(params: SamplingParams, check: _Checker) -> None:
    allowed = f"between 0 and {MAX_BEAM_WIDTH} (0 and 1: no beam search)"
    check.require(0 <= params.beam_width <= MAX_BEAM_WIDTH, "beam_width", params.beam_width, allowed)
    if params.beam_width <= 1:
        return
    is_greedy = params.temperature < GREEDY_BELOW_TEMPERATURE
    check.require(is_greedy, "temperature", params.temperature, "0 with beam_width above 1")
    check.require(params.max_new_tokens != 0, "max_new_tokens", 0, "at least 1 with beam_width above 1")
    unset = SamplingParams()
    for field_name in _NOT_WITH_BEAMS:
        if getattr(params, field_name) != getattr(unset, field_name):
            name = check.name(field_name)
            raise InvalidRequestError(f"{name} cannot be combined with beam_width above 1.", param=name)


# The most alternatives, watched ids and beams that a step computes for one row: sizes of its programs.
MAX_TOP_LOGPROBS = 128
MAX_WATCHED_IDS = 128
MAX_BEAM_WIDTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreParams:
    """Which log-probabilities a request wants; natural logarithms over the whole vocabulary.

    They are of the model's own distribution (temperature 1, no penalties, no bias), or with `is_scaled`
    of the one that is sampled from, before top-k, top-p and min-p cut it. `prompt_rows` are ascending
    positions of the prompt: the scores of row p are those of the token at p + 1, seen from 0..p, so the
    last position of a prompt is no row (what follows it is output). Each position wanted gets its token's
    log-probability, `num_top` alternatives (best first, lowest id on ties) and those of `watched_ids`.
    A beam search looks at more alternatives than its results need to tell: they tell `num_told` (None: all).
    """

    of_output: bool = False
    prompt_rows: tuple[int, ...] = ()
    num_top: int = 0
    watched_ids: tuple[int, ...] = ()
    is_scaled: bool = False
    num_told: int | None = None


class TokenScores(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one position; -inf is a possible value. The lists are as long as was asked."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    watched_logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenParams:
    """The part of SamplingParams that the engine acts on: numbers and token ids, no text.

    `top_k` 0 means all. `stop_ids` already holds the model's end-of-sequence ids unless the request
    ignores them. `max_new_tokens` is already clipped to what the context allows, and is at least 0.
    `beam_width` above 1 is beam search: greedy, without penalties, bias and minimum length.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    scores: ScoreParams | None = None
    beam_width: int = 1

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE or self.top_k == 1

    @property
    def has_extras(self) -> bool:
        """Whether the logits are edited before sampling (penalties, bias, suppressed stop ids)."""
        return bool(
            self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_new_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishReason:
    """Why a request ended. `matched` is the stop token id, the stop string, or the pattern of stop_regex.

    kind "stop" | "length" | "abort". For "abort", `message` says why, and `http_status` is 0 when the
    user asked for it, otherwise the status of the error that ended the request.
    """

    kind: str
    matched: int | str | None = None
    message: str = ""
    http_status: int = 0


class BeamResult(msgspec.Struct, frozen=True, kw_only=True):
    """One hypothesis of a beam search: its tokens, the closing stop token included, and their scores.

    `cumulative_logprob` is the plain sum of the tokens' log-probabilities.
    """

    token_ids: list[int]
    scores: list[TokenScores]
    cumulative_logprob: float
    finish: FinishReason


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request, as the engine tells them: at most one delta a request and step.

    `token_ids` includes the stop token that ended the request. The counts are totals so far. A struct
    because the step loop makes one a row: a frozen dataclass takes four times as long.

    `scores` has an entry for each of `token_ids` if the request wants them, else it is empty.
    `prompt_scores` continue those of earlier deltas, in the order of ScoreParams.prompt_rows; the last
    come no later than the first output token. A beam search sends one delta at its end, with the `beams`
    best first and no token_ids of its own; `num_output_tokens` is then their sum.
    """

    rid: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_retractions: int = 0
    num_drafted: int = 0  # tokens guessed and verified (speculation), and of these the ones that came true
    num_accepted: int = 0
    finish: FinishReason | None = None
    scores: list[TokenScores] = []
    prompt_scores: list[TokenScores] = []
    beams: list[BeamResult] = []


# What device memory is given back by: the tags of SGLang's routes that mean something here.
WEIGHTS = "weights"
KV_CACHE = "kv_cache"
MEMORY_TAGS = (WEIGHTS, KV_CACHE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine knows once the model is loaded; constant while it serves."""

    model_path: str
    architecture: str
    model_type: str
    vocab_size: int
    context_length: int  # prompt + output tokens of one request
    max_total_tokens: int  # token slots in the KV pool
    max_running_requests: int
    page_size: int
    num_pages: int
    chunked_prefill_size: int
    param_bytes: int
    kv_bytes: int
    dtype: str
    quantization: str
    platform: str
    device_kind: str
    num_devices: int  # that share the model
    startup_s: float = 0.0


QUEUE_TIME_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's live counts, sent with its outputs and at least once a second while idle."""

    num_running: int = 0
    num_queued: int = 0
    num_free_pages: int = 0  # free or reclaimable from the prefix cache
    num_cached_pages: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0  # by prefills, those of retracted requests included
    num_evicted_tokens: int = 0  # out of the prefix cache, for want of pages
    num_generated_tokens: int = 0
    num_encoded_images: int = 0  # those whose features were on the device already not counted
    num_drafted_tokens: int = 0  # guessed and verified by speculation
    num_accepted_tokens: int = 0  # of those, the ones that became output
    num_retractions: int = 0
    num_aborted: int = 0
    num_finished: int = 0
    num_compiles: int = 0  # programs compiled or restored from the compile cache
    num_late_compiles: int = 0  # of those, after warm-up ended: should stay 0
    is_warm: bool = False  # every program of the bucket ladder is ready
    step_gap_s: float = 0.0  # device idle time between steps, summed
    step_busy_s: float = 0.0
    gen_throughput: float = 0.0  # tokens a second, over the last window
    is_paused: bool = False
    released: tuple[str, ...] = ()  # of MEMORY_TAGS; while any is away nothing runs
    param_bytes: int = 0  # of device memory, now; so are the next three
    kv_bytes: int = 0
    slot_bytes: int = 0  # sampling state and block tables
    device_bytes: int = 0  # all that this process holds, as the device's allocator counts; 0 if it cannot
    host_param_bytes: int = 0  # weights that sleep in host memory
    num_retracted: int = 0  # of those queued, the ones that have run before
    num_waiting_tokens: int = 0  # prompt tokens of those queued; at most a quarter of a second old
    queue_time_s: float = 0.0  # from arrival to admission, summed
    queue_time_counts: tuple[int, ...] = ()  # requests by QUEUE_TIME_BUCKETS_S, the last one beyond them

    @property
    def spec_accept_rate(self) -> float:
        """The share of guessed tokens that became output."""
        return self.num_accepted_tokens / self.num_drafted_tokens if self.num_drafted_tokens else 0.0

    @property
    def spec_accept_length(self) -> float:
        """Tokens that a sequence gets in a step, those steps counted that verified nothing; 0 without any."""
        num_passes = self.num_generated_tokens - self.num_accepted_tokens
        return self.num_generated_tokens / num_passes if num_passes and self.num_drafted_tokens else 0.0
