"""What must be the same on all hosts that serve a model together, and what they make of their hardware.

Both sides, leader.py and follower.py, come here, so that they tell and compare the same. Knows nothing of
connections.
"""

from __future__ import annotations

import dataclasses
import sys

import jax

from jaxserve.config import FIELDS, ServerConfig, flag_of
from jaxserve.errors import ConfigError
from jaxserve.hosts.link import digest_of
from jaxserve.runner.sizing import Machine
from jaxserve.weights.resolve import ModelFiles

# Settings of the engine, apart from where things lie on a host.
SHARED_GROUPS = ("Model", "Images", "Memory and batching", "Devices", "Hosts")
OWN_SETTINGS = (
    "model_path", "served_model_name", "tokenizer_path", "chat_template", "download_dir", "weight_version",
    "compilation_cache_dir", "node_rank", "dist_timeout", "dist_token",
)  # fmt: skip


def list_facts(config: ServerConfig, files: ModelFiles) -> dict[str, str]:
    """What a host was started with, by name. The model is compared by what it is, not by where it lies."""
    names = [name for name, field in FIELDS.items() if flag_of(field).group in SHARED_GROUPS]
    facts = {name: str(getattr(config, name)) for name in names if name not in OWN_SETTINGS}
    sizes = [(path.name, path.stat().st_size) for path in files.files]
    if files.saved is not None:
        sizes += sorted(files.saved.files.items())
    return {
        **facts,
        "jax": jax.__version__,
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "the model's config": digest_of(sorted(files.hf_config.items(), key=lambda item: item[0])),
        "the model's files": digest_of(files.kind, sizes),
    }


def find_difference(own: dict[str, str], theirs: dict[str, str], rank: int) -> str | None:
    """A sentence that names what differs on host `rank` from host 0; None if nothing does."""
    differences = [
        f"{name} is {theirs.get(name)} there and {own.get(name)} on host 0"
        for name in own | theirs
        if own.get(name) != theirs.get(name)
    ]
    if not differences:
        return None
    return f"Host {rank} was not started like host 0: {'; '.join(differences)}."


def join_machines(machines: dict[int, Machine]) -> Machine:
    """The machine that all hosts plan for: the least memory of any. Raises ConfigError if they are not of one
    kind."""
    first = machines[0]
    for rank, machine in machines.items():
        for name in ("platform", "device_kind", "compute_capability", "num_devices", "updates_bf16_in_place"):
            own, theirs = getattr(first, name), getattr(machine, name)
            if own != theirs:
                raise ConfigError(f"Host {rank} has {name} {theirs}, host 0 has {own}: they must be alike.")
    return dataclasses.replace(
        first,
        memory_bytes=min(machine.memory_bytes for machine in machines.values()),
        free_bytes=min(machine.free_bytes for machine in machines.values()),
    )
