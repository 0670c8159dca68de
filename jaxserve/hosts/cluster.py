"""Joins jax.distributed, so that the devices of all hosts are one list. Before any other use of JAX.

Its own checks of who is alive are slow and end a process without a word, so they come last: the links between
hosts (hosts/link.py) notice first. Knows nothing of what runs then.
"""

from __future__ import annotations

import math

import jax

from jaxserve.errors import UnavailableError

HEARTBEAT_S = 60  # of JAX; after this it ends processes whose peers are gone


def join_cluster(coordinator: str, *, num_hosts: int, rank: int, timeout_s: float) -> None:
    """Wait for all hosts at the address of host 0. Raises UnavailableError if some do not come."""
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes=num_hosts,
            process_id=rank,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(timeout_s),
            coordinator_bind_address=coordinator,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise UnavailableError(
            f"The hosts could not join jax.distributed at {coordinator}: {first_line}"
        ) from error
