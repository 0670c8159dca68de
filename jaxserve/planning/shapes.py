"""Where `plan` finds a model's config.json: on this machine, among the shapes that ship, or on the hub.

A shape is a config.json without weights under configs/shapes/. Popular models have one, so that planning for
them needs no network.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from jaxserve.config import ServerConfig
from jaxserve.weights.resolve import ModelFiles, resolve_model


def find_model(config: ServerConfig) -> ModelFiles:
    """The model's config, and no weights. Raises ConfigError or WeightError."""
    path = config.model_path
    shape = None if Path(path).expanduser().exists() else list_shapes().get(shape_name(path))
    return resolve_model(
        path if shape is None else str(shape),
        revision=config.revision,
        download_dir=config.download_dir,
        load_format="dummy",
        on_progress=lambda *_: None,
    )


def list_shapes() -> dict[str, Path]:
    """The shapes that ship, by name."""
    folder = Path(str(resources.files("jaxserve.configs").joinpath("__init__.py"))).parent / "shapes"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def shape_name(model_path: str) -> str:
    """ "qwen2.5-7b" of Qwen/Qwen2.5-7B-Instruct: without its owner, and tuning keeps the shape."""
    name = model_path.rpartition("/")[2].lower()
    return re.sub(r"^meta-|-instruct$", "", name)
