"""Sends random images to a server for as long as it is told, and watches the memory of its processes.

    python -m scripts.soak_images --model-path MODEL --requests 500

Starts the server itself, with the flags behind `--`. Each image is new, of random size, kind and content, so
that every cache on its way fills and has to let go. Prints the resident memory of all the server's processes
after each tenth of the requests; the exit status is 1 if it grew by more than --most-growth-mib from the
third tenth to the last. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
from PIL import Image

from jaxserve.utils import find_free_port

MIB = 1 << 20
NUM_PARTS = 10
SETTLED_PART = 3  # by then programs are compiled and caches are full
KINDS = ("PNG", "JPEG", "WEBP", "GIF")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--most-side", type=int, default=1000, help="pixels of an image's longer side")
    parser.add_argument("--most-growth-mib", type=float, default=64.0)
    parser.add_argument("flags", nargs="*", help="of the server, behind --")
    args = parser.parse_args()
    port = find_free_port("127.0.0.1")
    command = [sys.executable, "-m", "jaxserve", "launch", "--model-path", args.model_path]
    with subprocess.Popen([*command, "--port", str(port), *args.flags]) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_warm(url, server)
            sizes = soak(url, server.pid, args.requests, args.concurrency, args.most_side)
        finally:
            server.terminate()
    growth_mib = sizes[-1] - sizes[SETTLED_PART - 1]
    print(f"growth from part {SETTLED_PART} to the last: {growth_mib:.1f} MiB")
    return int(growth_mib > args.most_growth_mib)


def soak(url: str, pid: int, num_requests: int, concurrency: int, most_side: int) -> list[float]:
    """MiB after each part."""
    sizes: list[float] = []
    num_per_part = max(num_requests // NUM_PARTS, 1)
    print("| requests | MiB resident |\n| ---: | ---: |")
    with ThreadPoolExecutor(concurrency) as threads:
        for part in range(NUM_PARTS):
            first = part * num_per_part
            seeds = range(first, first + num_per_part)
            statuses = list(threads.map(lambda seed: ask(url, seed, most_side), seeds))
            assert set(statuses) == {200}, f"answers with {sorted(set(statuses))}"
            sizes.append(read_memory_mib(pid))
            print(f"| {first + num_per_part} | {sizes[-1]:.1f} |", flush=True)
    return sizes


def ask(url: str, seed: int, most_side: int) -> int:
    """One request with a new image; its status."""
    data = base64.b64encode(make_image(seed, most_side)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is it?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=600).status_code


def make_image(seed: int, most_side: int) -> bytes:
    """A file of coarse noise: a pixel in eight is drawn, as noise that fine would not compress at all."""
    source = random.Random(seed)
    width, height = source.randrange(16, most_side), source.randrange(16, most_side)
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, KINDS[seed % len(KINDS)])
    return buffer.getvalue()


def wait_until_warm(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until every program is compiled, which takes memory too."""
    while server.poll() is None:
        try:
            info = requests.get(f"{url}/server_info", timeout=10)
            if info.status_code == 200 and info.json()["internal_states"][0]["is_warm"]:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"The server ended with status {server.returncode}.")


def read_memory_mib(pid: int) -> float:
    """Resident memory of a process and all that it started."""
    total_bytes = 0
    todo = [pid]
    while todo:
        folder = Path("/proc") / str(todo.pop())
        try:
            pages = int((folder / "statm").read_text().split()[1])
            children = [path.read_text().split() for path in folder.glob("task/*/children")]
        except OSError:
            continue  # it ended meanwhile
        total_bytes += pages * 4096
        todo += [int(child) for words in children for child in words]
    return total_bytes / MIB


if __name__ == "__main__":
    sys.exit(main())
