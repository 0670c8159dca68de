"""The requests of bench_serving.py: what is asked, how much is wanted, and when each request comes.

    python scripts/serving_workload.py > benchmarks/traces/tiny.jsonl

As a script it writes the trace that is bundled: a made-up minute of a chat service with a burst in it.
Everything is drawn from a seed. Knows nothing of HTTP. Standard library only.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# One token each in the vocabularies of most models, with the space before them.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night "
    "point home water room mother area money story fact month lot right study book eye job word business "
    "issue side kind head house service friend father power hour game line end member law car city name team"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`due_s` counts from the begin of the run."""

    prompt: str
    num_output_tokens: int
    due_s: float = 0.0
    image_urls: tuple[str, ...] = ()  # in front of the prompt; of a chat only


def make_text(rng: random.Random, num_tokens: int) -> str:
    """Random words; about as many tokens, which the server counts exactly."""
    return " ".join(rng.choices(WORDS, k=max(num_tokens, 1)))


def draw_length(rng: random.Random, most: int, spread: float) -> int:
    """Between (1 - spread) x most and most, all alike."""
    return rng.randint(max(1, math.ceil(most * (1 - spread))), max(1, most))


def make_random(
    num_requests: int, *, input_tokens: int, output_tokens: int, spread: float, seed: int
) -> list[Request]:
    """Prompts that share nothing."""
    rng = random.Random(seed)
    return [
        Request(
            prompt=make_text(rng, draw_length(rng, input_tokens, spread)),
            num_output_tokens=draw_length(rng, output_tokens, spread),
        )
        for _ in range(num_requests)
    ]


def make_shared_prefix(
    num_requests: int,
    *,
    num_groups: int,
    prefix_tokens: int,
    input_tokens: int,
    output_tokens: int,
    spread: float,
    seed: int,
) -> list[Request]:
    """Questions of `input_tokens` after one of `num_groups` system prompts of `prefix_tokens`."""
    rng = random.Random(seed)
    prefixes = [make_text(rng, prefix_tokens) for _ in range(num_groups)]
    questions = make_random(
        num_requests, input_tokens=input_tokens, output_tokens=output_tokens, spread=spread, seed=seed + 1
    )
    return [replace(asked, prompt=f"{rng.choice(prefixes)}\n{asked.prompt}") for asked in questions]


def read_trace(path: Path, seed: int) -> list[Request]:
    """Requests of a recording, in order of arrival. ValueError with the line where one cannot be read.

    A line is a JSON object with `arrival_s`, `output_tokens`, and either `prompt` or `prompt_tokens`.
    """
    rng = random.Random(seed)
    requests: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry: dict[str, Any] = json.loads(line)
            prompt = entry["prompt"] if "prompt" in entry else make_text(rng, int(entry["prompt_tokens"]))
            requests.append(
                Request(
                    prompt=prompt,
                    num_output_tokens=int(entry["output_tokens"]),
                    due_s=float(entry["arrival_s"]),
                )
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of {path} is no request: {error!r}.") from None
    if not requests:
        raise ValueError(f"{path} holds no requests.")
    begin_s = min(request.due_s for request in requests)
    requests.sort(key=lambda request: request.due_s)
    return [replace(request, due_s=request.due_s - begin_s) for request in requests]


def arrive_at_random(requests: Iterable[Request], rate: float, seed: int) -> list[Request]:
    """The same requests as a Poisson process of `rate` a second; inf: all at once."""
    rng = random.Random(seed)
    due_s = 0.0
    timed: list[Request] = []
    for request in requests:
        timed.append(replace(request, due_s=due_s))
        due_s += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return timed


def rate_of(requests: list[Request]) -> float:
    """Requests a second, by the times they are due."""
    span_s = requests[-1].due_s - requests[0].due_s
    return (len(requests) - 1) / span_s if span_s > 0 else math.inf


def stretch(requests: list[Request], rate: float) -> list[Request]:
    """A recording played faster or slower, so that it has this mean rate."""
    factor = rate_of(requests) / rate
    return [replace(request, due_s=request.due_s * factor) for request in requests]


def write_tiny_trace(write: Callable[[str], Any]) -> None:
    """Sixty requests: one in two seconds, then four a second, then one in two seconds again."""
    rng = random.Random(4)
    arrival_s = 0.0
    for order in range(60):
        arrival_s += rng.expovariate(4.0 if 15 <= order < 45 else 0.5)
        entry = {
            "arrival_s": round(arrival_s, 3),
            "prompt_tokens": int(min(max(rng.lognormvariate(4.5, 0.8), 8), 600)),
            "output_tokens": int(min(max(rng.lognormvariate(3.5, 0.6), 4), 200)),
        }
        write(json.dumps(entry))


if __name__ == "__main__":
    write_tiny_trace(print)
