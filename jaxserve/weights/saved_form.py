"""What `jaxserve convert` says of a folder that it wrote, in HEADER_FILE, and whether the folder is whole.

    config.json, generation_config.json, tokenizer files     as any model has them
    params/                                                   the parameters, an Orbax checkpoint
    jaxserve_checkpoint.json                                  this header, written last

The parameters are those that a server holds (fused, in their type, perhaps quantised), but for no number of
devices in particular: rows and columns lie as one device has them, and orbax_restore.py gives each device its
own. Written by orbax_save.py, read by resolve.py. Knows nothing of jax.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxserve.errors import WeightError

HEADER_FILE = "jaxserve_checkpoint.json"
PARAMS_FOLDER = "params"
FORMAT_VERSION = 1
# Of Orbax's own files: a folder with one of these and no header is another program's checkpoint.
ORBAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedForm:
    """The header. `padded_rows` names arrays that have rows of zeros behind their own, and how many rows they
    have with them; `files` are the sizes of all files in bytes, by path within the folder."""

    format_version: int
    jaxserve_version: str
    model: str
    architecture: str
    dtype: str  # of matrices that are not quantised
    quantization: str
    param_bytes: int
    padded_rows: Mapping[str, int]
    files: Mapping[str, int]

    @property
    def served_as(self) -> str:
        return name_form(self.dtype, self.quantization)


def name_form(dtype: str, quantization: str) -> str:
    """What matrices are served as, in a word."""
    return dtype if quantization == "none" else quantization


def write_header(folder: Path, form: SavedForm) -> None:
    """The last thing to be written."""
    (folder / HEADER_FILE).write_text(json.dumps(asdict(form), indent=1) + "\n", encoding="utf-8")


def list_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def read_saved_form(folder: Path) -> SavedForm | None:
    """The header of a converted folder; None for a folder of another kind.

    Raises WeightError for one that is not whole, or that a newer jaxserve wrote.
    """
    path = folder / HEADER_FILE
    if not path.is_file():
        if (folder / PARAMS_FOLDER).is_dir():
            raise WeightError(
                f"{folder} is not whole: it holds {PARAMS_FOLDER}/ and no {HEADER_FILE}, which `jaxserve "
                "convert` writes last. Convert or copy the model again."
            )
        return None
    form = _read_header(path)
    for name, num_bytes in form.files.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError:
            raise WeightError(f"{folder} is not whole: it lacks {name}. Convert or copy it again.") from None
        if found != num_bytes:
            raise WeightError(
                f"{folder} is damaged: {name} has {found:,} bytes where {num_bytes:,} were written. Convert "
                "or copy it again."
            )
    return form


def _read_header(path: Path) -> SavedForm:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return SavedForm(**{field.name: content[field.name] for field in fields(SavedForm)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{path} cannot be read: {error}. Convert or copy the model again.") from error
    raise WeightError(
        f"{path} is of format {version}, and this is jaxserve for format {FORMAT_VERSION}. Convert the model "
        "again, or serve it with the jaxserve that wrote it."
    )
