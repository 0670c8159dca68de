"""Which host this is among those that serve a model together, and where they meet: from flags, or found.

`take_seat` is called once, by cli.py, before anything is started. On the hosts of a TPU slice the flags may
be left out: GKE tells each its place in the environment, a TPU VM asks the metadata server, as
jax.distributed.initialize does (jax/_src/clusters/cloud_tpu_cluster.py). Knows nothing of jax: host 0's HTTP
process calls it too.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

DEFAULT_PORT = 20000  # of host 0; jax.distributed takes the one after it
METADATA_TIMEOUT_S = 5.0
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The hosts of a TPU slice, and which of them this is."""

    rank: int
    addresses: tuple[str, ...]


def take_seat(config: ServerConfig) -> ServerConfig:
    """The settings with nnodes, node_rank and dist_init_addr decided. Raises ConfigError where they do not go
    together."""
    has_flags = (config.nnodes, config.node_rank, config.dist_init_addr) != (None, None, None)
    found = None if has_flags else find_slice(os.environ)
    if found is not None and len(found.addresses) > 1:
        config = dataclasses.replace(
            config,
            nnodes=len(found.addresses),
            node_rank=found.rank,
            dist_init_addr=f"{found.addresses[0]}:{DEFAULT_PORT}",
        )
    config = dataclasses.replace(config, nnodes=config.nnodes or 1, node_rank=config.node_rank or 0)
    check_seat(config)
    return config


def check_seat(config: ServerConfig) -> None:
    """Raise ConfigError unless the settings make sense for several hosts, or for one."""
    num_hosts, rank = config.nnodes or 1, config.node_rank or 0
    if rank >= num_hosts:
        raise ConfigError(
            f"node_rank must be below nnodes, {num_hosts}: hosts are counted from 0, got {rank}.",
            param="node_rank",
        )
    if num_hosts == 1:
        return
    if config.dp_size > 1:
        raise ConfigError(
            f"dp_size above 1 is served on one host, and these {num_hosts} share a single copy of the model. "
            "Start a server for each copy, or set nnodes to 1 to serve from this host alone.",
            param="dp_size",
        )
    if config.dist_init_addr is None:
        raise ConfigError(
            "Several hosts need --dist-init-addr HOST:PORT: the address of host 0, the same on each.",
            param="dist_init_addr",
        )
    read_address(config.dist_init_addr)
    if config.tp_size % num_hosts:
        raise ConfigError(
            f"tp_size counts the devices of all {num_hosts} hosts and must be a multiple of them, got "
            f"{config.tp_size}. To serve from this host alone, set nnodes to 1.",
            param="tp_size",
        )


def read_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # One more port is taken after it.
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65534:
        raise ConfigError(
            f"dist_init_addr must be HOST:PORT with a port from 1 to 65534, such as 10.0.0.1:{DEFAULT_PORT}, "
            f"got {text}.",
            param="dist_init_addr",
        )
    return host, int(port)


def find_slice(environ: Mapping[str, str]) -> Slice | None:
    """The slice that this host belongs to; None where there is no TPU, or nothing that tells."""
    names = environ.get("TPU_WORKER_HOSTNAMES", "")
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    if names and environ.get("TPU_WORKER_ID", "").isdecimal():
        return _make_slice(environ["TPU_WORKER_ID"], names)
    if environ.get("TPU_SKIP_MDS_QUERY") or not any(glob.glob(pattern) for pattern in TPU_FILES):
        return None
    server = f"http://{environ.get('GCE_METADATA_IP', 'metadata.google.internal')}"
    number = ask_metadata(server, "agent-worker-number")
    workers = ask_metadata(server, "worker-network-endpoints")
    return None if number is None or workers is None else _make_slice(number, workers)


def _make_slice(number: str, workers: str) -> Slice:
    """Workers are host names, or name:id:address."""
    addresses = tuple(worker.strip().split(":")[-1] for worker in workers.split(","))
    return Slice(rank=int(number), addresses=addresses)


def ask_metadata(server: str, key: str) -> str | None:
    """An attribute of this machine; None if it has none, or is no machine of Google's cloud."""
    url = f"{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is next to us
    try:
        with opener.open(request, timeout=METADATA_TIMEOUT_S) as answer:
            return answer.read().decode().strip() or None
    except (urllib.error.URLError, TimeoutError, socket.gaierror, ConnectionError):
        return None
