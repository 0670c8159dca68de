"""A server that is shared by the tests which leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.fakes import FakeEngine, open_client


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    with open_client(FakeEngine()) as shared:
        yield shared
