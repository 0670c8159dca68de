"""What every test gets: eight fake CPU devices, a bounded hypothesis profile, a free port, a server.

The environment is set before anything imports jax, and nothing here imports it: tests of the scheduler,
of text and of the command line start at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.e2e.served import SHARED_FLAGS, Served, serve

NUM_FAKE_DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The one place to turn to "strict", which makes implicit promotion an error.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "standard")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    device_flag = f"--xla_force_host_platform_device_count={NUM_FAKE_DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_flag}".strip()

# No deadline: the first example often compiles. Derandomised, so that a red run can be repeated.
settings.register_profile(
    "jaxserve",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("jaxserve")


@pytest.fixture
def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_server() -> Iterator[Served]:
    """One server, as `jaxserve launch` makes it, for the tests that leave nothing behind."""
    with serve(*SHARED_FLAGS) as served:
        yield served
