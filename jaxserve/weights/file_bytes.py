"""A read-only file as ranges of bytes. The readers of GGUF and safetensors fetch tensor rows through it.

Reads go through pread rather than a memory map: pages of a map count as the process's own memory while it
loads (a second copy of the whole checkpoint), and a map over a file that shrinks kills the process with a
bus error where a short read is an error with a name. The page cache serves both alike. Knows no format.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from jaxserve.errors import WeightError


class FileBytes:
    """An open file. `read` may be called from several threads at once; `close` when done."""

    def __init__(self, path: Path):
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise WeightError(f"Cannot open {path}: {error.strerror}.") from error
        self.path = path
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        """Bytes [offset, offset + num_bytes) as a fresh uint8 array. Raises WeightError if cut short."""
        buffer = np.empty(num_bytes, np.uint8)
        view = buffer.data
        num_read = 0
        while num_read < num_bytes:
            got = os.preadv(self._descriptor, [view[num_read:]], offset + num_read)
            if got == 0:
                raise WeightError(
                    f"{self.path} ends at byte {offset + num_read}, before the {num_bytes} bytes wanted at "
                    f"{offset}: the file is truncated. Download it again."
                )
            num_read += got
        return buffer

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
