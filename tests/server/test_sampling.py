"""What a request's sampling fields become for the engine."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError
from jaxserve.server.decode import decode_body
from jaxserve.server.sampling import for_choice, read_native_sampling, to_token_params
from jaxserve.server.schemas import SamplingBody
from jaxserve.types import SamplingParams


def to_engine(sampling: SamplingParams, max_new_tokens: int = 10):
    return to_token_params(
        sampling, max_new_tokens=max_new_tokens, eos_ids=(2, 3), vocab_size=100, draw=Random(0)
    )


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


@pytest.mark.parametrize(
    "name", ["json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "custom_params"]
)
def test_constraints_are_refused_never_ignored(name):
    with pytest.raises(InvalidRequestError, match=f"{name} is not supported") as caught:
        read_native_sampling(msgspec.convert({name: "x"}, SamplingBody))
    assert caught.value.param == name
