"""`jaxserve convert`: a model as a folder that a server starts from without the original. Called by cli.py.

The parameters are read, fused and quantised as for serving, and written as an Orbax checkpoint
(weights/orbax_save.py); beside them goes what else serving needs. The folder is there only when all of it is
(weights/whole_folder.py). Touches no device: a machine without one converts for one.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from jaxserve import __version__
from jaxserve.blueprint import checkpoint_bits
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.models.interface import ParamSpec
from jaxserve.progress import Progress
from jaxserve.runner.checkpoint import read_family
from jaxserve.runner.memory import trim_heap
from jaxserve.runner.sizing import choose_dtype
from jaxserve.weights.gguf import copy_gguf_metadata
from jaxserve.weights.loader import load_params
from jaxserve.weights.orbax_save import save_params
from jaxserve.weights.resolve import ModelFiles, resolve_model
from jaxserve.weights.safetensors import INDEX_FILE
from jaxserve.weights.saved_form import FORMAT_VERSION, PARAMS_FOLDER, SavedForm, list_sizes, write_header
from jaxserve.weights.served import count_served_bytes
from jaxserve.weights.whole_folder import whole_folder

TOKENIZER_GGUF = (
    "tokenizer.gguf"  # what a .gguf file says of its tokenizer and chat template, without weights
)
COPIED_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
# Written here, or of the files that are not copied.
NOT_COPIED = ("config.json", "generation_config.json", INDEX_FILE)
# The share of the disk that is wanted for metadata, tokenizer and padding, on top of the parameters.
SPARE = 1.02

logger = logging.getLogger("jaxserve.convert")


def convert(config: ServerConfig, output: Path) -> SavedForm:
    """Convert the model of `config` to the folder `output`, which must not be there yet.

    `quantization` auto is none, for the machine that will serve is not known. Raises ConfigError or
    WeightError.
    """
    start_s = time.perf_counter()
    if config.quantization == "int4":
        raise ConfigError(
            "quantization int4 cannot be converted yet: what is served in 4 bits depends on the devices. "
            "Launch the original with it.",
            param="quantization",
        )
    with Progress(config.log_level) as progress:
        files = resolve_model(
            config.model_path,
            revision=config.revision,
            download_dir=config.download_dir,
            load_format=config.load_format,
            on_progress=progress.update,
        )
        if files.saved is not None:
            raise ConfigError(
                f"{config.model_path} was converted already, to {files.saved.served_as}. Convert the "
                "original.",
                param="model_path",
            )
        family, cfg = read_family(config.model_path, files)
        form = _write(config, files, family.param_specs(cfg), output, progress)
    logger.info(
        "Wrote %s: %.2f GB of parameters as %s in %.1f s",
        output,
        form.param_bytes / 1e9,
        form.served_as,
        time.perf_counter() - start_s,
    )
    return form


def _write(
    config: ServerConfig, files: ModelFiles, specs: list[ParamSpec], output: Path, progress: Progress
) -> SavedForm:
    dtype = choose_dtype(config, checkpoint_bits(files, specs))
    quantization = "none" if config.quantization == "auto" else config.quantization
    param_bytes = count_served_bytes(specs, dtype=dtype, quantization=quantization)

    def tell(_stage: str, done: float, total: float | None) -> None:
        trim_heap()  # of chunks that were written; else as much as a tenth of the model would add up
        progress.update("Converting weights", done, total)

    load = partial(
        load_params,
        files,
        specs,
        dtype=dtype,
        quantization=quantization,
        on_progress=tell,
        random_seed=config.random_seed or 0,
    )
    with whole_folder(output, int(param_bytes * SPARE)) as folder:
        _write_companions(files, folder)
        padded_rows = save_params(
            folder / PARAMS_FOLDER,
            specs,
            lambda put: load(put=put),
            dtype=dtype,
            quantization=quantization,
        )
        form = SavedForm(
            format_version=FORMAT_VERSION,
            jaxserve_version=__version__,
            model=Path(files.model_id).name,
            architecture=files.hf_config["architectures"][0],
            dtype=dtype,
            quantization=quantization,
            param_bytes=param_bytes,
            padded_rows=padded_rows,
            files=list_sizes(folder),
        )
        write_header(folder, form)
    return form


def _write_companions(files: ModelFiles, folder: Path) -> None:
    """config.json, the tokenizer with its chat template, and how images are prepared."""
    gguf = next((path for path in files.files if path.suffix == ".gguf"), None)
    if gguf is not None:
        copy_gguf_metadata(gguf, folder / TOKENIZER_GGUF)
    else:
        for pattern in COPIED_PATTERNS:
            for path in files.local_dir.glob(pattern):
                if path.is_file() and path.name not in NOT_COPIED:
                    shutil.copyfile(path, folder / path.name)
    # The parameters are not packed as the original's may be.
    hf_config = {name: value for name, value in files.hf_config.items() if name != "quantization_config"}
    _write_json(folder / "config.json", hf_config)
    if files.generation_config:
        _write_json(folder / "generation_config.json", files.generation_config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
