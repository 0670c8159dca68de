"""Each route's sampling fields to SamplingParams, and those to what the engine acts on.

Here live the defaults that differ between routes: /generate and /v1/completions take 1.0 and friends,
chat takes the model's generation_config first; 128, 16 and fill-the-context new tokens. Called by the
routes and by generation. Pure functions.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TypeVar

from msgspec import UNSET

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import refuse_value
from jaxserve.server.schemas import REFUSED_BY_ALL, ChatBody, CompletionBody, SamplingBody
from jaxserve.server.settings import SamplingDefaults
from jaxserve.types import SamplingParams, TokenParams

T = TypeVar("T")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
GENERATE_MAX_NEW_TOKENS = 128  # SGLang's for /generate
_SEED_BITS = 31
_SEED_MASK = (1 << _SEED_BITS) - 1
_MAX_TEMPERATURE = 1e6  # every token as likely as any other
_MIN_SHARE = 1e-6
_MAX_BIAS = 1e9  # certain, or impossible
_REFUSED_IN_SAMPLING = (
    *("json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "custom_params", "beam_width"),
    *("watermark", "choice"),
)


def read_native_sampling(body: SamplingBody) -> SamplingParams:
    """`sampling_params` of /generate. Raises InvalidRequestError for what is not supported."""
    for name in _REFUSED_IN_SAMPLING:
        refuse_value(name, getattr(body, name), REFUSED_BY_ALL.get(name, "by this version."))
    max_new_tokens = GENERATE_MAX_NEW_TOKENS if body.max_new_tokens is UNSET else body.max_new_tokens
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=_or(body.min_new_tokens, 0),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=_or(body.top_k, -1),
        min_p=_or(body.min_p, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        stop=_read_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        spaces_between_special_tokens=_or(body.spaces_between_special_tokens, True),
        no_stop_trim=bool(body.no_stop_trim),
        n=_or(body.n, 1),
        logit_bias=body.logit_bias or {},
        seed=body.sampling_seed if body.sampling_seed is not None else body.seed,
    )


def read_chat_sampling(body: ChatBody, defaults: SamplingDefaults) -> SamplingParams:
    """Chat: the request, else the model's generation_config, else 1.0; no length means the context."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return _read_openai_sampling(
        body,
        max_new_tokens=_check_max_tokens(name, max_tokens),
        temperature=_or(body.temperature, _or(defaults.temperature, 1.0)),
        top_p=_or(body.top_p, _or(defaults.top_p, 1.0)),
        top_k=_or(body.top_k, _or(defaults.top_k, -1)),
        min_p=_or(body.min_p, _or(defaults.min_p, 0.0)),
        repetition_penalty=_or(body.repetition_penalty, _or(defaults.repetition_penalty, 1.0)),
    )


def read_completion_sampling(body: CompletionBody) -> SamplingParams:
    """/v1/completions: plain 1.0 defaults, 16 tokens."""
    max_tokens = _check_max_tokens("max_tokens", body.max_tokens)
    return _read_openai_sampling(
        body,
        max_new_tokens=_or(max_tokens, COMPLETION_MAX_TOKENS),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=_or(body.top_k, -1),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
    )


def _read_openai_sampling(
    body: ChatBody | CompletionBody,
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=_or(body.min_tokens, 0),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=repetition_penalty,
        stop=_read_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        no_stop_trim=bool(body.no_stop_trim),
        n=_or(body.n, 1),
        logit_bias=body.logit_bias or {},
        seed=body.seed,
    )


def to_token_params(
    sampling: SamplingParams,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    vocab_size: int,
    draw: Random,
) -> TokenParams:
    """The engine's half of the parameters; `draw` gives the seed when the request names none.

    `ignore_eos` switches off every stop by token, `stop_token_ids` included (as SGLang does). Seeds
    of more than 31 bits are folded, so that any int64 is accepted and small ones keep their value.
    The engine computes in float32: numbers that would become 0 or infinity there are moved to where
    they mean the same.
    """
    seed = draw.getrandbits(_SEED_BITS) if sampling.seed is None else _fold_seed(sampling.seed)
    stop_ids = () if sampling.ignore_eos else tuple(dict.fromkeys((*eos_ids, *sampling.stop_token_ids)))
    return TokenParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, max_new_tokens),
        temperature=min(sampling.temperature, _MAX_TEMPERATURE),
        top_p=max(sampling.top_p, _MIN_SHARE),
        top_k=sampling.top_k if 0 < sampling.top_k < vocab_size else 0,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=max(sampling.repetition_penalty, _MIN_SHARE),
        seed=seed,
        stop_ids=stop_ids,
        logit_bias=tuple(
            (token_id, max(-_MAX_BIAS, min(bias, _MAX_BIAS)))
            for token_id, bias in sampling.logit_bias.items()
        ),
    )


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of the i-th of n choices: a given seed is moved on, so that choices differ."""
    return (
        sampling if sampling.seed is None or choice == 0 else replace(sampling, seed=sampling.seed + choice)
    )


def _fold_seed(seed: int) -> int:
    bits = seed & ((1 << 64) - 1)
    return (bits ^ (bits >> _SEED_BITS) ^ (bits >> (2 * _SEED_BITS))) & _SEED_MASK


def _check_max_tokens(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InvalidRequestError(f"{name} must be at least 1, got {value}.", param=name)
    return value


def _read_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """An empty stop string asks for nothing and is dropped."""
    stops = [stop] if isinstance(stop, str) else stop or []
    return tuple(text for text in stops if text)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
