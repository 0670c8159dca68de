"""The flags of `jaxserve plan` that `jaxserve launch` has not; all others are the server's own.

Imports nothing heavy: cli.py reads it for `--help`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from jaxserve.errors import ConfigError

# libtpu and the CUDA plugin compile; neither is to look for hardware, or to mind another that does.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
DEFAULT_SEQUENCES = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is to be planned for. `json_path` is None for none, "-" for standard output."""

    topologies: tuple[str, ...]
    compiles: bool = True
    prompt_tokens: int = 1024
    output_tokens: int = 256
    sequences: tuple[int, ...] = DEFAULT_SEQUENCES
    target_itl_ms: float | None = None
    target_throughput: float | None = None
    efficiency: float = 0.7
    json_path: str | None = None

    @property
    def context(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def has_targets(self) -> bool:
        return self.target_itl_ms is not None or self.target_throughput is not None


def build_plan_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve plan",
        usage="jaxserve plan [--config FILE] [--model-path MODEL] --topology SLICE [flags]",
        description="Tell whether a model fits a slice that is not here, and how fast it could be there.",
        epilog="All flags of `jaxserve launch` are taken as well. Nothing is downloaded but a config.json.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--topology",
        action="append",
        nargs="+",
        metavar="SLICE",
        help="v5e:4x4, h200:8, all sizes of a chip (v5e), or all; several at once. Chips: v4, v5e, v5p, v6e, "
        "tpu7x, h200",
    )
    add("--prompt-tokens", type=_positive, metavar="N", help="tokens of a prompt [1024]")
    add("--output-tokens", type=_positive, metavar="N", help="tokens of a reply [256]")
    add(
        "--sequences",
        type=_positive,
        nargs="+",
        metavar="N",
        help="how many decode at once, over the whole slice [1 8 32 128]",
    )
    add("--target-itl-ms", type=float, metavar="X", help="find the cheapest slice with so little a token")
    add("--target-throughput", type=float, metavar="X", help="the same, with so many tokens a second")
    add(
        "--efficiency",
        type=float,
        metavar="X",
        help="share of the roofline to count on when targets are judged [0.7]",
    )
    add("--no-compile", dest="compiles", action="store_false", help="arithmetic only: an answer in seconds")
    add(
        "--json",
        dest="json_path",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON too; without FILE to standard output, in place of the table",
    )
    add("-h", "--help", action="help", help="show this and stop")
    return parser


def read_plan_options(argv: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """The options, and the words that are left for the server's flags. Raises ConfigError."""
    parser = build_plan_parser()
    parser.error = _raise_usage_error
    namespace, rest = parser.parse_known_args(list(argv))
    values = vars(namespace)
    groups = values.pop("topology", None)
    if not groups:
        raise ConfigError(
            "No slice is named: give --topology, such as v5e:2x2, h200:1, or all.", param="topology"
        )
    values["topologies"] = tuple(word for group in groups for word in group)
    if "sequences" in values:
        values["sequences"] = tuple(sorted(set(values["sequences"])))
    options = PlanOptions(**values)
    if not 0 < options.efficiency <= 1:
        raise ConfigError(f"efficiency must be above 0 and at most 1, got {options.efficiency}.")
    for name in ("target_itl_ms", "target_throughput"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value:g}.", param=name)
    return options, rest


def keep_to_cpu() -> None:
    """Before jax is imported: plan on this machine's CPU, whatever else it has."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _positive(word: str) -> int:
    """A count above 0, or argparse's own sentence."""
    value = int(word)
    if value < 1:
        raise ValueError(word)
    return value


_positive.__name__ = "whole number above 0"  # as argparse names a type in its sentence


def _raise_usage_error(message: str) -> NoReturn:
    raise ConfigError(message.removeprefix("argument ").rstrip(".") + ".")
