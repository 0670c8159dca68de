"""From a command line and a YAML file to a ServerConfig: flags over file over defaults.

`load_config` is called by cli.py, which `python -m jaxserve.launch_server` goes through as well. Every
name, help text and range comes from the fields of config.py; values stay text until config.py reads them,
so that a flag and a YAML key are held to one check. Knows nothing of what the settings do.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jaxserve.config import FIELD_BY_KEY, FIELDS, ServerConfig, flag_of, kind_of, read_value
from jaxserve.cuda_flags import IGNORED_FLAGS
from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What a command line comes to: the settings, and sentences to log once logging is set up."""

    config: ServerConfig
    warnings: tuple[str, ...] = ()
    config_file: Path | None = None


def load_config(argv: Sequence[str]) -> LaunchOptions:
    """Settings from flags (such as sys.argv[1:]), over those of `--config FILE`, over defaults.

    Raises ConfigError for an unknown flag or key (naming the nearest), a value of the wrong type or out
    of range, a file that cannot be read, and when no model is named.
    """
    parser = build_parser("jaxserve launch")
    parser.error = _raise_usage_error
    namespace, unknown = parser.parse_known_args([_with_dashes(word) for word in argv])
    if unknown:
        raise ConfigError(_unknown_word(unknown))
    words = vars(namespace)
    files = words.pop("config", [])
    if len(files) > 1:
        raise ConfigError(f"--config was given {len(files)} times; give one file.", param="config")
    config_file = find_config(files[0]) if files else None
    file_values = read_config_file(config_file) if config_file else {}

    flag_values = {name: read_value(name, word) for name, word in words.items() if name in FIELDS}
    ignored = [
        (name, str(config_file)) for name, value in file_values.items() if name not in FIELDS and value
    ]
    ignored += [(name, "the command line") for name in words if name not in FIELDS]
    warnings = tuple(
        f"--{name.replace('_', '-')} (from {source}) is ignored: {IGNORED_FLAGS[name].reason}."
        for name, source in ignored
    )
    values = {name: value for name, value in file_values.items() if name in FIELDS} | flag_values
    if "model_path" not in values:
        names = ", ".join(shipped_configs())
        raise ConfigError(
            f"No model is named: give --model-path, or --config with a file or one of {names}.",
            param="model_path",
        )
    return LaunchOptions(config=ServerConfig(**values), warnings=warnings, config_file=config_file)


def shipped_configs() -> dict[str, Path]:
    """The configs inside the package, by file name."""
    folder = Path(str(resources.files("jaxserve.configs").joinpath("__init__.py"))).parent
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file at `name`, or the shipped config called `name` or `name`.yaml. Raises ConfigError."""
    given = Path(name).expanduser()
    if given.is_file():
        return given
    shipped = shipped_configs()
    found = shipped.get(name) or shipped.get(f"{name}.yaml")
    if found is None:
        raise ConfigError(
            f"There is no config file {name}, and none of that name ships with jaxserve"
            f" ({', '.join(shipped)}).{_nearest(name, shipped)}",
            param="config",
        )
    return found


def read_config_file(path: Path) -> dict[str, Any]:
    """The checked settings of a YAML file by field name; keys in IGNORED_FLAGS are kept as they are.

    Keys are flag names with - or _, or their aliases; null means the default. Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}", param="config") from error
    if content is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path} must be a list of `key: value` lines.", param="config")
    names: list[str] = []
    for key_node, _ in tree.value:  # the tree, because safe_load keeps the last of two equal keys
        where = f"{path}, line {key_node.start_mark.line + 1}"
        key = str(key_node.value).replace("-", "_")
        name = FIELD_BY_KEY.get(key, key)
        if name not in FIELDS and name not in IGNORED_FLAGS:
            raise ConfigError(
                f"{where}: unknown key {key_node.value}.{_nearest(key_node.value, _keys())}", param=key
            )
        if name in names:
            raise ConfigError(f"{where}: {key_node.value} is set a second time.", param=name)
        names.append(name)
    values: dict[str, Any] = {}
    for name, value in zip(names, content.values(), strict=True):
        if value is None:
            continue
        try:
            values[name] = read_value(name, value, folder=path.parent) if name in FIELDS else value
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", param=name) from error
    return values


def build_parser(program: str) -> argparse.ArgumentParser:
    """The command line, made from the fields. Values stay text, so that files and flags share one check."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [--config FILE] [--model-path MODEL] [flags]",
        description="Serve a model over HTTP.",
        epilog="A size may be written 8k (8192). Flags win over the file, the file over [defaults].",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file whose keys are these flags: a path, or the name of a config that ships"
        " (`jaxserve configs` lists them)",
    )
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    groups: dict[str, Any] = {}
    for name, setting in FIELDS.items():
        flag = flag_of(setting)
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        spellings = [f"--{word.replace('_', '-')}" for word in (name, *flag.aliases)]
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if kind_of(setting) == "bool" else {}
        groups[flag.group].add_argument(
            *spellings, dest=name, metavar=_placeholder(setting), help=_help(setting), **switch
        )
    for name, ignored in IGNORED_FLAGS.items():
        arity: dict[str, Any] = (
            {"action": "store_true"} if ignored.num_values == 0 else {"nargs": ignored.num_values}
        )
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=argparse.SUPPRESS, **arity)
    return parser


def build_convert_parser() -> argparse.ArgumentParser:
    """The flags of `jaxserve convert` that `jaxserve launch` has not."""
    parser = argparse.ArgumentParser(
        prog="jaxserve convert",
        usage="jaxserve convert [--config FILE] [--model-path MODEL] --output DIR [flags]",
        description="Write a model as it is served, fused and perhaps quantised, to a folder that `jaxserve "
        "launch` starts from on any number of devices, without the original.",
        epilog="All flags of `jaxserve launch` are taken as well: --dtype and --quantization say what is "
        "written, and --quantization auto is none.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--output", action="append", metavar="DIR", help="the folder to make")
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    return parser


def read_output(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that `jaxserve convert` is to make, and the words that are left. Raises ConfigError."""
    parser = build_convert_parser()
    parser.error = _raise_usage_error
    namespace, rest = parser.parse_known_args(list(argv))
    outputs = vars(namespace).get("output", [])
    if len(outputs) != 1 or not outputs[0].strip():
        raise ConfigError("Say with --output DIR, once, which folder to make.", param="output")
    if "://" in outputs[0]:
        raise ConfigError(f"output must be a folder on this machine, got {outputs[0]}.", param="output")
    return Path(outputs[0]).expanduser(), rest


def _placeholder(setting: Field[Any]) -> str:
    flag = flag_of(setting)
    if flag.choices:
        return "{" + ",".join(flag.choices) + "}"
    if flag.is_path or flag.is_size:
        return "PATH" if flag.is_path else "SIZE"
    return {"bool": "true", "str": "TEXT", "int": "N", "float": "X", "Mapping": "JSON"}[kind_of(setting)]


def _help(setting: Field[Any]) -> str:
    flag = flag_of(setting)
    text = flag.help
    if flag.high != math.inf:
        text += f" ({flag.low} to {flag.high})"
    if setting.default not in (None, MISSING, False):
        text += f" [{setting.default}]"
    return text.replace("%", "%%")


def _with_dashes(word: str) -> str:
    """`--max_total_tokens=8k` spelt as `--max-total-tokens=8k`; both forms are in use."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown_word(words: Sequence[str]) -> str:
    word = next((word for word in words if word.startswith("-")), words[0])
    if not word.startswith("-"):
        return f"Unexpected word {word}: every setting is a flag. For a model write --model-path {word}."
    name = word.partition("=")[0]
    return f"Unknown flag {name}.{_nearest(name, [f'--{key}' for key in [*_keys(), 'config', 'help']])}"


def _keys() -> list[str]:
    return [key.replace("_", "-") for key in [*FIELD_BY_KEY, *IGNORED_FLAGS]]


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.replace("_", "-"), list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _raise_usage_error(message: str) -> NoReturn:
    raise ConfigError(message.removeprefix("argument ").rstrip(".") + ".")
