"""Which devices of this host each of several engine processes sees (--dp-size), as environment variables.

`divide_devices` is called by cli.py and launch.py before a process starts; whoever imports jax in it sees its
own devices only. A CPU has nothing to divide: each process makes devices of all of it. GPUs and TPU chips are
counted by their device files, since asking a driver would take hold of them. Knows nothing of jax.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.hosts.seat import TPU_FILES

GPU_FILES = ("/dev/nvidia[0-9]*",)
# How libtpu wants a process's chips: a grid, as in jax/_src/test_multiprocess.py.
TPU_GRIDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
TPU_PORT = 8476  # of the first process; each has its own


def count_files(patterns: tuple[str, ...]) -> int:
    return sum(len(glob.glob(pattern)) for pattern in patterns)


def divide_devices(
    config: ServerConfig, environ: Mapping[str, str], num_gpus: int | None = None, num_tpus: int | None = None
) -> list[dict[str, str]]:
    """The variables of each engine process, by dp_rank; empty for a single one, which sees all.

    CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS are respected where they are set. None counts the devices of
    this machine. Raises ConfigError for more engines than the devices suffice for.
    """
    dp_size, tp_size = config.dp_size, config.tp_size
    if dp_size == 1:
        return [{}]
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return [{} for _ in range(dp_size)]
    num_gpus = count_files(GPU_FILES) if num_gpus is None else num_gpus
    num_tpus = count_files(TPU_FILES) if num_tpus is None else num_tpus
    gpus = _list_visible(environ.get("CUDA_VISIBLE_DEVICES"), num_gpus)
    # GPUs that are lent to virtual machines have the same files as TPU chips.
    tpus = [] if gpus else _list_visible(environ.get("TPU_VISIBLE_CHIPS"), num_tpus)
    for kind, devices in (("GPUs", gpus), ("TPU chips", tpus)):
        if 0 < len(devices) < dp_size * tp_size:
            raise ConfigError(
                f"dp_size {dp_size} with tp_size {tp_size} needs {dp_size * tp_size} {kind}, and this "
                f"process sees {len(devices)}. Lower one of them, or make more devices visible.",
                param="dp_size",
            )
    if tpus and tp_size not in TPU_GRIDS:
        raise ConfigError(
            f"On TPUs dp_size above 1 needs a tp_size of {', '.join(map(str, TPU_GRIDS))}, got {tp_size}.",
            param="tp_size",
        )
    shares = [slice(rank * tp_size, (rank + 1) * tp_size) for rank in range(dp_size)]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[share])} for share in shares]
    return [_describe_chips(tpus[share], rank) if tpus else {} for rank, share in enumerate(shares)]


def _list_visible(chosen: str | None, num_devices: int) -> list[str]:
    """Names of the devices that this process sees; none if the machine has none of that kind."""
    if not num_devices:
        return []
    if chosen is None:
        return [str(index) for index in range(num_devices)]
    return [name.strip() for name in chosen.split(",") if name.strip()]


def _describe_chips(chips: list[str], rank: int) -> dict[str, str]:
    """A process with these chips that knows of no other. With less than all this libtpu takes all chips."""
    port = str(TPU_PORT + rank)
    return {
        "TPU_VISIBLE_CHIPS": ",".join(chips),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_GRIDS[len(chips)],
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": port,
        "CLOUD_TPU_TASK_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
