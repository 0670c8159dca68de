"""One streamed request over HTTP and what came of it, as bench_serving.py counts it.

Speaks POST /v1/completions, /v1/chat/completions (any OpenAI-compatible server) and /generate (SGLang's,
which jaxserve has too). Knows nothing of rates and percentiles.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from serving_workload import Request

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which server, and how it is asked."""

    base_url: str
    route: str = "completions"
    model: str | None = None
    api_key: str | None = None
    temperature: float = 0.0
    ignores_eos: bool = True
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def make_body(self, request: Request) -> dict[str, Any]:
        if self.route == "generate":
            params = {
                "max_new_tokens": request.num_output_tokens,
                "temperature": self.temperature,
                "ignore_eos": self.ignores_eos,
            }
            return {"text": request.prompt, "sampling_params": params, "stream": True, **self.extra_body}
        body: dict[str, Any] = {
            "max_tokens": request.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.route == "chat":
            body["messages"] = [{"role": "user", "content": make_content(request)}]
        else:
            body["prompt"] = request.prompt
        if self.model is not None:
            body["model"] = self.model
        if self.ignores_eos:
            body["ignore_eos"] = True  # no part of OpenAI's own API
        return body | self.extra_body


def make_content(request: Request) -> str | list[dict[str, Any]]:
    """Of a chat message: text, or parts if there are images."""
    if not request.image_urls:
        return request.prompt
    images = [{"type": "image_url", "image_url": {"url": url}} for url in request.image_urls]
    return [*images, {"type": "text", "text": request.prompt}]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Times are of time.perf_counter. `error` is the kind of failure; None if the reply came to its end."""

    begin_s: float  # when it was due, or when it was sent, if its sending had to wait for others
    first_s: float | None = None
    last_s: float | None = None
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between events with text
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.begin_s

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens; 0 for a reply of one."""
        if self.first_s is None or self.last_s is None or self.num_output_tokens < 2:
            return 0.0
        return (self.last_s - self.first_s) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.begin_s


async def send_request(
    session: aiohttp.ClientSession, target: Target, request: Request, begin_s: float
) -> Outcome:
    """Send it and read the reply to its end; whatever goes wrong is told by the outcome."""
    outcome = Outcome(begin_s=begin_s, error="cut_off")
    headers = {} if target.api_key is None else {"Authorization": f"Bearer {target.api_key}"}
    try:
        async with asyncio.timeout(target.timeout_s):
            async with session.post(
                target.base_url + PATHS[target.route], json=target.make_body(request), headers=headers
            ) as response:
                if response.status != 200:
                    outcome.error = f"http_{response.status}"
                else:
                    await read_events(response.content, outcome)
    except TimeoutError:
        outcome.error = "timeout"
    except (aiohttp.ClientConnectorError, ConnectionError) as error:
        outcome.error = f"connection ({type(error).__name__})"
    except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:  # the last three: no such events
        outcome.error = f"reply ({type(error).__name__})"
    outcome.end_s = time.perf_counter()
    return outcome


async def read_events(content: aiohttp.StreamReader, outcome: Outcome) -> None:
    """Events up to [DONE]: without it the reply was cut off."""
    async for line in content:
        now_s = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            if outcome.error == "cut_off":
                outcome.error = None if outcome.first_s is not None else "no_tokens"
            return
        note_event(json.loads(data), outcome, now_s)


def note_event(event: dict[str, Any], outcome: Outcome, now_s: float) -> None:
    """Take the counts of one event, and its time if it brought text or tokens."""
    if event.get("error"):
        outcome.error = "error_event"
        return
    meta_info = event.get("meta_info")
    if meta_info is not None:
        has_news = meta_info["completion_tokens"] > outcome.num_output_tokens
        outcome.num_prompt_tokens = meta_info["prompt_tokens"]
        outcome.num_output_tokens = meta_info["completion_tokens"]
        finish = meta_info.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            outcome.error = "aborted"
    else:
        usage = event.get("usage")
        if usage:
            outcome.num_prompt_tokens = usage["prompt_tokens"]
            outcome.num_output_tokens = usage["completion_tokens"]
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        has_news = bool(choices[0].get("text") or delta.get("content") or delta.get("reasoning_content"))
        if choices[0].get("finish_reason") == "abort":
            outcome.error = "aborted"
        if has_news and not usage:
            outcome.num_output_tokens += 1  # the best guess until the usage comes, if it does
    if has_news:
        if outcome.last_s is None:
            outcome.first_s = now_s
        else:
            outcome.gaps_s.append(now_s - outcome.last_s)
        outcome.last_s = now_s
