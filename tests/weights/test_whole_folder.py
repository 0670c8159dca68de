"""A folder is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError, WeightError
from jaxserve.weights.whole_folder import PARTIAL_SUFFIX, whole_folder


def write(target: Path, needed_bytes: int = 1) -> None:
    with whole_folder(target, needed_bytes) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("all of it")
        assert not target.exists() or not any(target.iterdir())


def test_it_appears_at_the_end_with_all_that_was_written(tmp_path):
    target = tmp_path / "missing" / "out"
    write(target)
    assert (target / "sub" / "file").read_text() == "all of it"
    assert os.listdir(target.parent) == ["out"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"out is there already\. Remove it"):
        write(target)


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left"), WeightError, "The disk that was to hold .*out is full"),
        (OSError(errno.EIO, "Input/output error"), WeightError, "out could not be written: .*output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "broken disk", "Ctrl-C"],
)
def test_what_fails_leaves_nothing(tmp_path, error, raised, sentence):
    def write_half() -> None:
        with whole_folder(tmp_path / "out", 1) as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(raised, match=sentence):
        write_half()
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(ConfigError, match=r"has 1\.0 GB free, and the model takes 2\.0 GB"):
        write(tmp_path / "out", needed_bytes=2 * 10**9)
    assert os.listdir(tmp_path) == []


WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from jaxserve.weights.whole_folder import whole_folder
with whole_folder(Path(sys.argv[1]), 1) as folder:
    (folder / "left").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_run_that_was_killed_is_replaced_by_the_next_and_one_that_lives_is_not(tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(ConfigError, match="Another process is writing"):
            write(target)
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == ["out" + PARTIAL_SUFFIX]
    deadline_s = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    write(target)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["sub"]
