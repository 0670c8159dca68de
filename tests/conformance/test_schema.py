"""schemathesis reads /openapi.json and asks every route for it: no 5xx, and no answer that is not described.

It sends bodies that fit their schema and bodies that do not, unknown methods and content types. A body that
fits may still ask for something impossible (a temperature of -1), so a 400 is always allowed.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from jaxserve.server.openapi import describe_api
from tests.fakes import FakeEngine, open_client

SLOW_AND_CHOOSY = (
    HealthCheck.function_scoped_fixture,
    HealthCheck.filter_too_much,
    HealthCheck.too_slow,
    HealthCheck.large_base_example,
    HealthCheck.data_too_large,
)
schema = schemathesis.openapi.from_dict(describe_api())


@pytest.fixture
def served() -> Iterator[httpx.Client]:
    """A server for each route, so that one that sleeps or pauses is no matter to the others."""
    with open_client(FakeEngine(tokens_per_delta=32), max_sequences=8) as client:
        yield client


def test_the_description_that_is_served_is_the_one_that_is_tested(served):
    assert served.get("/openapi.json").json() == describe_api()


@schema.parametrize()
@settings(max_examples=30, suppress_health_check=SLOW_AND_CHOOSY)
def test_every_answer_is_as_described(case, served):
    excluded = [positive_data_acceptance]
    if "" in (case.query or {}).values():  # ?timeout= is as good as none
        excluded.append(negative_data_rejection)
    case.call_and_validate(base_url=str(served.base_url), timeout=20, excluded_checks=excluded)
