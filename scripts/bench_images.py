"""What images cost those who only chat: the time between tokens of text streams, with and without images.

    python scripts/bench_images.py --base-url http://127.0.0.1:30000 --streams 32 --image-streams 8

Two loads in turn, several times, on one server: `--streams` streams of text; and as many, some of which send
an image with every request. A stream sends its next request when the last one is answered, for `--seconds`.
Each prompt and each image is new, so no cache has it. Prints the mean and percentiles of the time between
tokens of the text streams under both loads, and their ratio; of the images, how many a second and the time to
their first token. The last line is one JSON object. Needs aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import time
from typing import Any

import aiohttp
import numpy as np
from bench_serving import percentile
from PIL import Image
from serving_client import Outcome, Target, send_request
from serving_workload import Request, make_text

TEXT, MIXED = "text alone", "with images"


def make_image_url(seed: int, side: int) -> str:
    """A square of noise as a data URL. JPEG, as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side)).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def run_stream(
    session: aiohttp.ClientSession, target: Target, arguments: argparse.Namespace, seed: int, side: int
) -> list[Outcome]:
    """Requests one after the other until the time is over; with images of `side` pixels, 0 for none."""
    rng = random.Random(seed)
    outcomes = []
    end_s = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end_s:
        images = (make_image_url(rng.randrange(1 << 32), side),) if side else ()
        request = Request(
            prompt=make_text(rng, arguments.input_tokens),
            num_output_tokens=arguments.output_tokens,
            image_urls=images,
        )
        outcomes.append(await send_request(session, target, request, time.perf_counter()))
    return outcomes


async def run_load(
    session: aiohttp.ClientSession, target: Target, arguments: argparse.Namespace, seed: int, num_images: int
) -> dict[str, Any]:
    """One load: its figures, in ms."""
    sides = [arguments.image_side] * num_images + [0] * (arguments.streams - num_images)
    start_s = time.perf_counter()
    streams = [run_stream(session, target, arguments, seed + order, side) for order, side in enumerate(sides)]
    found = await asyncio.gather(*streams)
    elapsed_s = time.perf_counter() - start_s
    texts = [outcome for outcomes in found[num_images:] for outcome in outcomes]
    images = [outcome for outcomes in found[:num_images] for outcome in outcomes]
    errors = [outcome.error for outcome in (*texts, *images) if outcome.error is not None]
    if errors:
        raise SystemExit(f"{len(errors)} requests failed, the first with {errors[0]}.")
    gaps_ms = sorted(1e3 * gap_s for outcome in texts for gap_s in outcome.gaps_s)
    first_ms = sorted(1e3 * outcome.ttft_s for outcome in images if outcome.ttft_s is not None)
    return {
        "itl_mean_ms": statistics.fmean(gaps_ms),
        **{f"itl_p{rank}_ms": percentile(gaps_ms, rank / 100) for rank in (50, 90, 99)},
        "text_tokens_per_s": sum(outcome.num_output_tokens for outcome in texts) / elapsed_s,
        "images_per_s": len(images) / elapsed_s,
        "image_prompt_tokens": max((outcome.num_prompt_tokens for outcome in images), default=0),
        "image_ttft_p50_ms": percentile(first_ms, 0.5) if first_ms else None,
    }


async def run(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    target = Target(base_url=arguments.base_url.rstrip("/"), route="chat")
    runs: dict[str, list[dict[str, Any]]] = {TEXT: [], MIXED: []}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as session:
        print(f"| load | {' | '.join(HEADS)} |\n|---|{'---|' * len(HEADS)}", flush=True)
        for repeat in range(arguments.repeats):
            for name, num_images in ((TEXT, 0), (MIXED, arguments.image_streams)):
                figures = await run_load(session, target, arguments, 1000 * repeat, num_images)
                runs[name].append(figures)
                print(describe(name, figures), flush=True)
    return runs


HEADS = (
    "ITL mean, ms",
    "p50 / p90 / p99",
    "text tokens/s",
    "images/s",
    "tokens of such a prompt",
    "their TTFT p50, ms",
)


def describe(name: str, figures: dict[str, Any]) -> str:
    first_ms = figures["image_ttft_p50_ms"]
    cells = [
        name,
        f"{figures['itl_mean_ms']:.1f}",
        " / ".join(f"{figures[f'itl_p{rank}_ms']:.1f}" for rank in (50, 90, 99)),
        f"{figures['text_tokens_per_s']:.0f}",
        f"{figures['images_per_s']:.2f}",
        str(figures["image_prompt_tokens"] or "-"),
        "-" if first_ms is None else f"{first_ms:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians of the rounds' ratios, with images to without."""
    return {
        name: statistics.median(
            mixed[name] / text[name] for text, mixed in zip(runs[TEXT], runs[MIXED], strict=True)
        )
        for name in ("itl_mean_ms", "itl_p50_ms", "itl_p99_ms")
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000", help="[%(default)s]")
    add("--streams", type=int, default=32, help="at a time [%(default)s]")
    add("--image-streams", type=int, default=8, help="of them with images [%(default)s]")
    add("--image-side", type=int, default=448, help="pixels; 448 are 1,024 patches [%(default)s]")
    add("--input-tokens", type=int, default=64, help="of text in a prompt, about [%(default)s]")
    add("--output-tokens", type=int, default=64, help="of a reply [%(default)s]")
    add("--seconds", type=float, default=30.0, help="of each load [%(default)s]")
    add("--repeats", type=int, default=3, help="[%(default)s]")
    arguments = parser.parse_args()
    runs = asyncio.run(run(arguments))
    ratios = compare(runs)
    print("\nWith images to without: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print(json.dumps({"settings": vars(arguments), "runs": runs, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
