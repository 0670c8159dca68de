"""The soak of images, in its short form: memory is counted over all processes, and a leak is told."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

from scripts import soak_images
from tests import tiny_vl


def test_images_are_new_and_of_every_kind():
    files = [soak_images.make_image(seed, 300) for seed in range(8)]
    assert len(set(files)) == 8
    assert {Image.open(io.BytesIO(data)).format for data in files} == set(soak_images.KINDS)


def test_memory_is_that_of_all_processes():
    alone_mib = soak_images.read_memory_mib(os.getpid())
    hold = "import sys; held = b'x' * (100 << 20); print(len(held), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert soak_images.read_memory_mib(os.getpid()) > alone_mib + 90
        child.kill()


@pytest.mark.slow
def test_memory_stays_flat_for_a_while(tmp_path):
    folder = tiny_vl.write_tiny_vl_checkpoint(tmp_path / "vl")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.soak_images", "--model-path", str(folder), "--requests", "60"),
            *("--most-side", "300", "--", "--dtype", "float32", "--max-image-pixels", "50176"),
            *("--max-total-tokens", "8k", "--max-running-requests", "8", "--log-level", "warning"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n|") >= 10
