"""Where downloaded models lie, and how a file comes to lie there whole or not at all.

Used by pypi.py and resolve.py. A file is written beside its place under another name, checked, flushed, and
renamed into place, under a lock that concurrent starts share. Knows nothing of models or of networks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxserve.errors import WeightError

# What a download or a load tells while it runs: a line for a person, bytes done, bytes in all if known.
ProgressCallback = Callable[[str, int, int | None], None]


def cache_dir(download_dir: str | Path | None = None) -> Path:
    """The folder of our own downloads: `download_dir`, else $JAXSERVE_CACHE, else ~/.cache/jaxserve."""
    chosen = download_dir or os.environ.get("JAXSERVE_CACHE") or "~/.cache/jaxserve"
    return Path(chosen).expanduser()


@contextlib.contextmanager
def hold_lock(lock_path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock among processes and threads. Calls `on_wait` once if another holds it.

    The lock is the kernel's (flock), so a process that is killed leaves none behind; the file stays.
    """
    with open(lock_path, "a") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


def write_verified(target: Path, partial: Path, chunks: Iterable[bytes], sha256: str | None) -> None:
    """Write `chunks` to `partial`, check their hash, and rename it to `target`: whole or not at all.

    `partial` must lie on the same disk. Raises WeightError for a wrong hash; OSError passes. In either case
    `partial` is removed.
    """
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if sha256 is not None and digest.hexdigest() != sha256.lower():
            raise WeightError(
                f"The download of {target.name} has the sha256 {digest.hexdigest()}, not {sha256.lower()}: "
                "it was damaged on the way or is another file. It was discarded; start again."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    flush(target.parent)


def describe_write_failure(error: OSError, folder: Path, needed_bytes: int | None) -> WeightError:
    """The sentence for a disk that is full or cannot be written."""
    needed = "" if needed_bytes is None else f" The model needs {needed_bytes:,} bytes there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightError(
            f"The disk that holds {folder} is full.{needed} Make room, or name another folder with "
            "--download-dir."
        )
    return WeightError(
        f"Cannot write to {folder}: {error.strerror or error}.{needed} Name another folder with "
        "--download-dir."
    )


def flush(path: Path) -> None:
    """Put a file's contents on the disk, or a folder's names, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
