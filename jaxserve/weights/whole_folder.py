"""A folder that comes to lie in its place whole or not at all. Used by convert.py.

It is written beside its place as NAME.partial, under a lock, flushed to the disk, and renamed. What an
interrupted run left is removed by the next; no reader takes it for the folder. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxserve.errors import ConfigError, WeightError
from jaxserve.weights.cache import flush

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def whole_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write in; it becomes `target` when the block ends, and goes away if it raises.

    Raises ConfigError for a target that is there already or cannot be made, and for a disk with less room
    than `needed_bytes`; WeightError for what fails while it is written.
    """
    target = target.absolute()
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    _check_target(target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{partial} cannot be made: {error.strerror}.", param="output") from error
    with _lock(partial):
        try:
            _empty(partial)
            _check_room(partial, needed_bytes)
            yield partial
            _flush(partial)
            os.rename(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise _describe_failure(error, target) from error
            raise
    flush(target.parent)


def _describe_failure(error: OSError, target: Path) -> WeightError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightError(f"The disk that was to hold {target} is full; what was written is removed again.")
    reason = error.strerror or error
    return WeightError(f"{target} could not be written: {reason}. What was written is removed again.")


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return  # a rename takes its place
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already. Remove it, or name another.", param="output")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against another process that would write it; the kernel frees it if we are killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"Another process is writing {folder}.", param="output") from None
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    """Remove what an interrupted run left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"The disk that holds {folder.parent} has {free_bytes / 1e9:.1f} GB free, and the model takes "
            f"{needed_bytes / 1e9:.1f} GB.",
            param="output",
        )


def _flush(folder: Path) -> None:
    """Every file and folder below, so that the rename is not on the disk before they are."""
    for path, _, names in os.walk(folder):
        for name in names:
            flush(Path(path, name))
        flush(Path(path))
