"""Each route's sampling fields to SamplingParams, and those to what the engine acts on.

What a request leaves open is filled in from below, and here live the defaults that differ between routes:

    the request  >  --preferred-sampling-params  >  (chat only) generation_config  >  the route's defaults

with 128, 16 and fill-the-context new tokens. Called by the routes and by generation. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_body, refuse_value
from jaxserve.server.schemas import REFUSED_BY_ALL, ChatBody, CompletionBody, SamplingBody
from jaxserve.server.settings import SamplingDefaults
from jaxserve.types import GREEDY_BELOW_TEMPERATURE, SamplingParams, ScoreParams, TokenParams

T = TypeVar("T")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
GENERATE_MAX_NEW_TOKENS = 128  # SGLang's for /generate
LOGPROBS_MODES = ("raw", "scaled")
PRIORITY_NAMES = {"HIGH": 1, "DEFAULT": 0, "NORMAL": 0, "LOW": -1}  # xLLM's classes
_SEED_BITS = 31
_SEED_MASK = (1 << _SEED_BITS) - 1
_MAX_TEMPERATURE = 1e6  # every token as likely as any other
_MIN_SHARE = 1e-6
_MAX_BIAS = 1e9  # certain, or impossible
_REFUSED_IN_SAMPLING = (
    *("json_schema", "regex", "ebnf", "structural_tag", "custom_params", "watermark", "choice"),
)
# What beam search has no meaning for: a request that says it is refused, defaults are left out.
_NOT_WITH_BEAMS = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "min_new_tokens", "stop", "stop_regex", "n"),
)


def read_preferred(preferred: Mapping[str, Any]) -> SamplingBody:
    """The server's --preferred-sampling-params, under the names of /generate's sampling_params.

    Raises InvalidRequestError for an unknown name, a wrong type, and what no request could ask for either.
    """
    if not preferred:
        return SamplingBody()
    try:
        body = msgspec.convert(dict(preferred), SamplingBody, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"preferred_sampling_params is invalid: {error}.") from None
    _refuse_unsupported(body)
    return body


def read_native_sampling(
    body: SamplingBody, preferred: Mapping[str, Any] | None = None, *, beam_width: int | None = None
) -> SamplingParams:
    """`sampling_params` of /generate; `beam_width` is the one beside them, as in xLLM's bodies.

    Raises InvalidRequestError for what is not supported.
    """
    _refuse_unsupported(body)
    if beam_width is not None and body.beam_width not in (None, beam_width):
        raise InvalidRequestError(
            f"beam_width is {beam_width} beside sampling_params and {body.beam_width} in it.",
            param="beam_width",
        )
    body = _fill(body, SamplingBody(beam_width=beam_width))
    return _settle(body, preferred or {}, max_new_tokens=GENERATE_MAX_NEW_TOKENS)


def _refuse_unsupported(body: SamplingBody) -> None:
    for name in _REFUSED_IN_SAMPLING:
        refuse_value(name, getattr(body, name), REFUSED_BY_ALL.get(name, "by this version."))


def read_chat_sampling(
    body: ChatBody, defaults: SamplingDefaults, preferred: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Chat: the model's generation_config counts, and no length means the context."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = _read_openai_fields(body, _check_max_tokens(name, max_tokens, at_least=1))
    return _settle(asked, preferred or {}, _recommend(defaults), max_new_tokens=None)


def read_library_sampling(
    asked: SamplingParams | Mapping[str, Any] | None,
    preferred: Mapping[str, Any],
    defaults: SamplingDefaults | None = None,
) -> SamplingParams:
    """What a caller of the library asks for: all of it, or some names of /generate's sampling_params, or
    nothing. `defaults` are the model's, for a chat. Raises InvalidRequestError for an unknown name or a wrong
    type."""
    if isinstance(asked, SamplingParams):
        return asked
    body = SamplingBody()
    if isinstance(asked, Mapping):
        body = decode_body(msgspec.json.encode(asked), SamplingBody)
        _refuse_unsupported(body)
    elif asked is not None:
        raise InvalidRequestError(
            f"sampling_params must be SamplingParams or a dict, got {type(asked).__name__}.",
            param="sampling_params",
        )
    recommended = None if defaults is None else _recommend(defaults)
    return _settle(body, preferred, recommended, max_new_tokens=GENERATE_MAX_NEW_TOKENS)


def _recommend(defaults: SamplingDefaults) -> SamplingBody:
    return SamplingBody(
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
    )


def read_completion_sampling(
    body: CompletionBody, preferred: Mapping[str, Any] | None = None
) -> SamplingParams:
    """/v1/completions: plain 1.0 defaults, 16 tokens; none at all if only the prompt is to be scored."""
    max_tokens = _check_max_tokens("max_tokens", body.max_tokens, at_least=0 if body.echo else 1)
    asked = _read_openai_fields(body, max_tokens)
    return _settle(asked, preferred or {}, max_new_tokens=COMPLETION_MAX_TOKENS)


def _read_openai_fields(body: ChatBody | CompletionBody, max_tokens: int | None) -> SamplingBody:
    return SamplingBody(
        max_new_tokens=UNSET if max_tokens is None else max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        stop_regex=body.stop_regex,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        no_stop_trim=body.no_stop_trim or body.include_stop_str_in_output,
        n=body.n,
        beam_width=body.beam_width,
        logit_bias=body.logit_bias,
        seed=body.seed,
    )


def _settle(
    asked: SamplingBody,
    preferred: Mapping[str, Any],
    recommended: SamplingBody | None = None,
    *,
    max_new_tokens: int | None,
) -> SamplingParams:
    """Fill in what was not asked for. `max_new_tokens` is the route's default, None for the context."""
    below = _fill(read_preferred(preferred), recommended or SamplingBody())
    width = _or(_or(asked.beam_width, below.beam_width), 1)
    if width > 1:
        if _or(asked.temperature, 0.0) >= GREEDY_BELOW_TEMPERATURE:
            raise InvalidRequestError(
                f"temperature must be 0 with beam_width above 1, got {asked.temperature}.",
                param="temperature",
            )
        below = msgspec.structs.replace(below, **dict.fromkeys(_NOT_WITH_BEAMS))
    body = _fill(asked, below)
    return SamplingParams(
        max_new_tokens=max_new_tokens if body.max_new_tokens is UNSET else body.max_new_tokens,
        min_new_tokens=_or(body.min_new_tokens, 0),
        temperature=_or(body.temperature, 1.0 if width <= 1 else 0.0),
        top_p=_or(body.top_p, 1.0),
        top_k=_or(body.top_k, -1),
        min_p=_or(body.min_p, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        stop=_read_texts(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        stop_regex=_read_texts(body.stop_regex),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        spaces_between_special_tokens=_or(body.spaces_between_special_tokens, True),
        no_stop_trim=bool(body.no_stop_trim),
        n=_or(body.n, 1),
        beam_width=width,
        logit_bias=body.logit_bias or {},
        seed=body.sampling_seed if body.sampling_seed is not None else body.seed,
    )


def _fill(body: SamplingBody, below: SamplingBody) -> SamplingBody:
    """`body`, with `below` where it is silent. A max_new_tokens of null is not silent: it fills the context;
    a seed under either name is one seed."""
    missing = {
        name: getattr(below, name)
        for name in SamplingBody.__struct_fields__
        if getattr(body, name) is (UNSET if name == "max_new_tokens" else None)
    }
    if body.sampling_seed is not None or body.seed is not None:
        missing.pop("sampling_seed", None)
        missing.pop("seed", None)
    return msgspec.structs.replace(body, **missing)


def count_choices(sampling: SamplingParams) -> int:
    """How many replies one prompt gets: its beams, or n."""
    return sampling.beam_width if sampling.beam_width > 1 else sampling.n


def read_logprobs_mode(mode: str | None) -> bool:
    """Whether logprobs are to be of the scaled distribution; InvalidRequestError for an unknown mode."""
    if mode is not None and mode not in LOGPROBS_MODES:
        raise InvalidRequestError(
            f"logprobs_mode must be one of {', '.join(LOGPROBS_MODES)}, got {mode!r}.", param="logprobs_mode"
        )
    return mode == "scaled"


def read_priority(priority: int | str | None) -> int:
    """A number, or one of xLLM's names in any case."""
    if not isinstance(priority, str):
        return priority or 0
    level = PRIORITY_NAMES.get(priority.upper())
    if level is None:
        raise InvalidRequestError(
            f"priority must be an integer or one of {', '.join(PRIORITY_NAMES)}, got {priority!r}.",
            param="priority",
        )
    return level


def read_dp_rank(routed: int | None, older: int | None) -> int | None:
    """The engine that a request names, under either name."""
    return older if routed is None else routed


def check_choices(best_of: int | None, num_return_sequences: int | None, sampling: SamplingParams) -> None:
    """Other servers' ways to ask for choices are fine where they say the same as n and beam_width."""
    if best_of is not None and best_of > sampling.n:
        raise InvalidRequestError(
            f"best_of above n ({sampling.n}) is not supported by this version, got {best_of}.",
            param="best_of",
        )
    width = max(sampling.beam_width, 1)
    if num_return_sequences is not None and num_return_sequences not in (0, width):
        raise InvalidRequestError(
            f"num_return_sequences must be left out or equal beam_width ({width}), "
            f"got {num_return_sequences}; use beam_width{' or n' if width == 1 else ''}.",
            param="num_return_sequences",
        )


def to_token_params(sampling: SamplingParams, *, eos_ids: tuple[int, ...], vocab_size: int) -> TokenParams:
    """The engine's half of the parameters, but for what depends on the prompt (`fit_to_prompt`) and on the
    choice (`read_seed`): requests with the same parameters share the lists in it.

    `ignore_eos` switches off every stop by token, `stop_token_ids` included (as SGLang does). The engine
    computes in float32: numbers that would become 0 or infinity there are moved to where they mean the same.
    """
    stop_ids = () if sampling.ignore_eos else tuple(dict.fromkeys((*eos_ids, *sampling.stop_token_ids)))
    return TokenParams(
        max_new_tokens=0,
        temperature=min(sampling.temperature, _MAX_TEMPERATURE),
        top_p=max(sampling.top_p, _MIN_SHARE),
        top_k=sampling.top_k if 0 < sampling.top_k < vocab_size else 0,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=max(sampling.repetition_penalty, _MIN_SHARE),
        stop_ids=stop_ids,
        logit_bias=tuple(
            (token_id, max(-_MAX_BIAS, min(bias, _MAX_BIAS)))
            for token_id, bias in sampling.logit_bias.items()
        ),
        beam_width=max(sampling.beam_width, 1),
    )


def fit_to_prompt(
    params: TokenParams, sampling: SamplingParams, *, max_new_tokens: int, num_prompt_tokens: int
) -> TokenParams:
    """`params`, made of `sampling`, for one prompt."""
    return replace(
        params,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, max_new_tokens),
        scores=_to_score_params(sampling, num_prompt_tokens),
    )


def read_seed(sampling: SamplingParams, draw: Random) -> int:
    """The seed of one choice; `draw` gives it when the request names none.

    Seeds of more than 31 bits are folded, so that any int64 is accepted and small ones keep their value.
    """
    return draw.getrandbits(_SEED_BITS) if sampling.seed is None else _fold_seed(sampling.seed)


def _to_score_params(sampling: SamplingParams, num_prompt_tokens: int) -> ScoreParams | None:
    """Row p scores the token at p + 1, so the first token from logprob_start on has none of its own.

    A beam search needs as many alternatives as it has beams, whatever the reply shows.
    """
    is_search = sampling.beam_width > 1
    if sampling.logprobs is None and not is_search:
        return None
    start = num_prompt_tokens if sampling.logprob_start is None else sampling.logprob_start
    return ScoreParams(
        of_output=True,
        prompt_rows=tuple(range(start, num_prompt_tokens - 1)),
        num_top=max(sampling.logprobs or 0, sampling.beam_width if is_search else 0),
        watched_ids=sampling.logprob_ids,
        is_scaled=sampling.are_logprobs_scaled,
        num_told=(sampling.logprobs or 0) if is_search else None,
    )


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of the i-th of n choices: a given seed is moved on, so that choices differ."""
    return (
        sampling if sampling.seed is None or choice == 0 else replace(sampling, seed=sampling.seed + choice)
    )


def _fold_seed(seed: int) -> int:
    bits = seed & ((1 << 64) - 1)
    return (bits ^ (bits >> _SEED_BITS) ^ (bits >> (2 * _SEED_BITS))) & _SEED_MASK


def _check_max_tokens(name: str, value: int | None, *, at_least: int) -> int | None:
    if value is not None and value < at_least:
        raise InvalidRequestError(f"{name} must be at least {at_least}, got {value}.", param=name)
    return value


def _read_texts(value: str | list[str] | None) -> tuple[str, ...]:
    """One or many; an empty one asks for nothing and is dropped."""
    texts = [value] if isinstance(value, str) else value or []
    return tuple(text for text in texts if text)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
