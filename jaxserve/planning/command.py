"""`jaxserve plan`: puts the parts together. Called by cli.py, which it is imported by only when it is run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.console import Console

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.planning.candidates import choose_arrangement, choose_cheapest
from jaxserve.planning.compilers import choose_programs, compile_programs, find_missing_compiler
from jaxserve.planning.fit import SliceFit, fit_slice, list_arrangements, suggest_remedies
from jaxserve.planning.options import PlanOptions
from jaxserve.planning.report import SlicePlan, describe_plan, print_plan
from jaxserve.planning.shapes import find_model
from jaxserve.planning.slices import Slice, list_slices
from jaxserve.weights.resolve import ModelFiles

OFF_TERMINAL_WIDTH = 110

logger = logging.getLogger("jaxserve.planning")


def plan(config: ServerConfig, options: PlanOptions, console: Console | None = None) -> list[SlicePlan]:
    """Plan a model for each slice that is named, and print it. Raises ConfigError or WeightError."""
    files = find_model(config)
    places = list_slices(options.topologies)
    fits = [_arrange(config, files, where, options) for where in places]
    cheapest = choose_cheapest(fits, options) if options.has_targets else None
    plans = [_plan_slice(config, files, fit, options) for fit in fits]
    described = describe_plan(config.model_name, plans, options, cheapest)
    if options.json_path == "-":
        print(json.dumps(described, indent=2))
        return plans
    print_plan(config.model_name, plans, options, cheapest, console or _open_console())
    if options.json_path is not None:
        _write(Path(options.json_path), json.dumps(described, indent=2) + "\n")
    return plans


def _arrange(config: ServerConfig, files: ModelFiles, where: Slice, options: PlanOptions) -> SliceFit:
    """Copies on as many devices as can share a layer; where there are targets, as those are met best."""
    if not options.has_targets:
        return fit_slice(config, files, where, options.context)
    return choose_arrangement(list_arrangements(config, files, where, options.context), options)


def _plan_slice(config: ServerConfig, files: ModelFiles, fit: SliceFit, options: PlanOptions) -> SlicePlan:
    programs, not_compiled = [], "--no-compile was given"
    if options.compiles and fit.blueprint is not None:
        not_compiled = find_missing_compiler(fit.where)
        if not not_compiled:
            logger.info("Compiling for %s", fit.where)
            programs = compile_programs(fit.blueprint, fit.where, choose_programs(fit.blueprint))
    made = SlicePlan(fit=fit, programs=tuple(programs), not_compiled=not_compiled, remedies=())
    if made.fits:
        return made
    return SlicePlan(
        fit=fit,
        programs=made.programs,
        not_compiled=made.not_compiled,
        remedies=tuple(suggest_remedies(config, files, fit)),
    )


def _open_console() -> Console:
    """The terminal, or a width that the tables need where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=OFF_TERMINAL_WIDTH, highlight=False)


def _write(path: Path, text: str) -> None:
    try:
        path.expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", param="json") from error
