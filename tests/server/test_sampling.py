"""What a request's sampling fields become for the engine."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_body
from jaxserve.server.sampling import (
    fit_to_prompt,
    for_choice,
    read_native_sampling,
    read_preferred,
    read_seed,
    to_token_params,
)
from jaxserve.server.schemas import SamplingBody
from jaxserve.types import SamplingParams, ScoreParams


def to_engine(sampling: SamplingParams, max_new_tokens: int = 10):
    shared = to_token_params(sampling, eos_ids=(2, 3), vocab_size=100)
    params = fit_to_prompt(shared, sampling, max_new_tokens=max_new_tokens, num_prompt_tokens=5)
    return replace(params, seed=read_seed(sampling, Random(0)))


def test_nothing_given_is_sglangs_defaults_and_so_is_null():
    nulls = {name: None for name in SamplingBody.__struct_fields__ if name != "max_new_tokens"}
    assert read_native_sampling(SamplingBody()) == SamplingParams()
    assert read_native_sampling(msgspec.convert(nulls, SamplingBody)) == SamplingParams()


def test_null_length_fills_the_context_but_an_absent_one_is_128():
    assert read_native_sampling(decode_body(b'{"max_new_tokens": null}', SamplingBody)).max_new_tokens is None
    assert read_native_sampling(decode_body(b"{}", SamplingBody)).max_new_tokens == 128


def test_every_number_reaches_the_engine():
    sampling = SamplingParams(
        min_new_tokens=4,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        stop_token_ids=(9, 3),
        logit_bias={5: -1.0},
        seed=11,
    )
    params = to_engine(sampling)
    assert (params.max_new_tokens, params.min_new_tokens, params.temperature) == (10, 4, 0.5)
    assert (params.top_p, params.top_k, params.min_p) == (0.9, 7, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.2, 0.3, 1.2)
    assert (params.stop_ids, params.logit_bias, params.seed) == ((2, 3, 9), ((5, -1.0),), 11)


def test_min_new_tokens_never_exceeds_what_the_context_leaves():
    assert to_engine(SamplingParams(min_new_tokens=50), max_new_tokens=3).min_new_tokens == 3


def test_extreme_numbers_stay_within_float32_and_int32():
    extreme = SamplingParams(
        temperature=1e300, top_p=1e-300, top_k=10**30, repetition_penalty=1e-300, logit_bias={1: -1e300}
    )
    params = to_engine(extreme)
    assert (params.temperature, params.top_p, params.top_k) == (1e6, 1e-6, 0)
    assert (params.repetition_penalty, params.logit_bias) == (1e-6, ((1, -1e9),))
    assert to_engine(SamplingParams(top_k=99)).top_k == 99


def test_stop_may_be_a_string_or_a_list_and_empty_ones_ask_for_nothing():
    assert read_native_sampling(SamplingBody(stop="a")).stop == ("a",)
    assert read_native_sampling(SamplingBody(stop=["a", "", "b"])).stop == ("a", "b")
    assert read_native_sampling(SamplingBody(stop="")).stop == ()


@given(st.integers(min_value=0, max_value=2**31 - 1))
def test_seeds_of_31_bits_keep_their_value(seed):
    assert to_engine(SamplingParams(seed=seed)).seed == seed


@given(st.integers())
def test_any_seed_fits_the_engine_and_says_the_same_each_time(seed):
    first = to_engine(SamplingParams(seed=seed)).seed
    assert 0 <= first < 2**31
    assert to_engine(SamplingParams(seed=seed)).seed == first


def test_choices_of_one_request_differ_but_the_first_is_what_n_of_one_gives():
    sampling = SamplingParams(seed=5)
    assert [for_choice(sampling, choice).seed for choice in range(3)] == [5, 6, 7]
    assert for_choice(SamplingParams(), 2).seed is None


def test_scores_are_of_the_output_and_of_the_rows_before_the_prompt_tokens_asked_for():
    assert to_engine(SamplingParams()).scores is None
    assert to_engine(SamplingParams(logprobs=3)).scores == ScoreParams(of_output=True, num_top=3)
    asked = SamplingParams(logprobs=0, logprob_start=2, logprob_ids=(7,), are_logprobs_scaled=True)
    assert to_engine(asked).scores == ScoreParams(
        of_output=True, prompt_rows=(2, 3), watched_ids=(7,), is_scaled=True
    )


@pytest.mark.parametrize(("logprobs", "num_top", "num_told"), [(None, 4, 0), (0, 4, 0), (9, 9, 9)])
def test_a_search_needs_a_candidate_a_beam_whatever_is_shown(logprobs, num_top, num_told):
    params = to_engine(SamplingParams(beam_width=4, temperature=0, logprobs=logprobs))
    assert params.beam_width == 4
    assert params.scores == ScoreParams(of_output=True, num_top=num_top, num_told=num_told)
    assert to_engine(SamplingParams(beam_width=0)).beam_width == 1


def test_a_preference_fills_what_is_not_said_but_null_length_is_said():
    preferred = {"temperature": 0.5, "max_new_tokens": 9, "seed": 3, "logit_bias": {"5": 1}}
    sampling = read_native_sampling(SamplingBody(), preferred)
    assert (sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0.5, 9, 3)
    assert sampling.logit_bias == {5: 1.0}
    asked = SamplingBody(max_new_tokens=None, temperature=0.0, sampling_seed=4)
    sampling = read_native_sampling(asked, {**preferred, "sampling_seed": 8})
    assert (sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0.0, None, 4)
    assert read_native_sampling(SamplingBody(seed=4), {"sampling_seed": 8}).seed == 4
    with pytest.raises(InvalidRequestError, match="preferred_sampling_params is invalid"):
        read_preferred({"temprature": 1})


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (SamplingParams(logprob_start=0), "logprob_start needs logprobs."),
        (SamplingParams(logprobs=500), "logprobs must be between 0 and 128, got 500."),
        (SamplingParams(logprobs=1, logprob_ids=(100,)), "logprob_ids holds the out-of-vocabulary id 100"),
        (SamplingParams(beam_width=2), "temperature must be 0 with beam_width above 1, got 1.0."),
        (SamplingParams(beam_width=2, temperature=0, top_k=3), "top_k cannot be combined with beam_width"),
    ],
)
def test_the_library_refuses_under_its_own_names(params, sentence):
    with pytest.raises(InvalidRequestError) as caught:
        params.validate(100)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    "name", ["json_schema", "regex", "ebnf", "structural_tag", "custom_params", "watermark"]
)
def test_constraints_are_refused_never_ignored(name):
    with pytest.raises(InvalidRequestError, match=f"{name} is not supported") as caught:
        read_native_sampling(msgspec.convert({name: "x"}, SamplingBody))
    assert caught.value.param == name


def test_stop_strings_have_a_most_length_each_and_in_all():
    SamplingParams(stop=("a" * 1024,) * 8).validate()
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop=("b", "a" * 1025)).validate()
    assert str(caught.value) == "stop must be strings of at most 1024 characters each, got one of 1025."
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop=("a" * 1024,) * 8 + ("b",)).validate()
    assert str(caught.value) == "stop must be at most 8192 characters in all, got 8193."
