"""A server whose engine computes nothing: it gives every open request its tokens at a set rate.

    python scripts/fake_engine.py --step-ms 12.8 --max-rows 256 --config tiny.yaml --port 30000

Everything but the engine process is what `jaxserve launch` runs, with the flags of `jaxserve launch`, so that
the HTTP side can be measured alone (bench_frontend.py), and load generators and plots tried without a model.
The engine process speaks the real one's protocol over the real socket, one message a step. A reply repeats
the tokens of its prompt. Without jax.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass

from jaxserve.config import ServerConfig
from jaxserve.engine.messages import Abort, Answer, Call, Configure, Ready, Shutdown, StepOutput, Submit
from jaxserve.engine.transport import SocketLink
from jaxserve.flags import load_config
from jaxserve.log import set_up_logging
from jaxserve.types import EngineInfo, EngineStats, FinishReason, TokenDelta

IDLE_WAIT_S = 0.5  # between two signs of life; the HTTP side expects one a second
VOCAB_SIZE = 1 << 20
CONTEXT_LENGTH = 32768
PAGE_SIZE = 16
REFUSAL = "The fake engine cannot do that."

logger = logging.getLogger("jaxserve.engine")


@dataclass(slots=True)
class Row:
    """One open request: the tokens it repeats, and how many it has had."""

    submit: Submit
    num_done: int = 0

    def step(self, num_tokens: int) -> TokenDelta:
        """Its next tokens, the last with the reason to finish."""
        prompt_ids, most = self.submit.prompt_ids, self.submit.params.max_new_tokens
        begin, end = self.num_done, min(self.num_done + num_tokens, most)
        self.num_done = end
        return TokenDelta(
            rid=self.submit.rid,
            token_ids=[prompt_ids[place % len(prompt_ids)] for place in range(begin, end)],
            num_prompt_tokens=len(prompt_ids),
            num_cached_tokens=0,
            num_output_tokens=end,
            finish=FinishReason(kind="length") if end == most else None,
        )

    def end(self) -> TokenDelta:
        return TokenDelta(
            rid=self.submit.rid,
            token_ids=[],
            num_prompt_tokens=len(self.submit.prompt_ids),
            num_cached_tokens=0,
            num_output_tokens=self.num_done,
            finish=FinishReason(kind="abort", message="Aborted"),
        )


class FakeEngine:
    """`max_rows` requests run at once, the others wait; each row gets `tokens_per_step` every `step_s`."""

    def __init__(self, link: SocketLink, step_s: float, tokens_per_step: int, max_rows: int):
        self._link = link
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._max_rows = max_rows
        self._running: dict[str, Row] = {}
        self._waiting: deque[Row] = deque()
        self._ended: list[TokenDelta] = []  # by an abort, and not told yet
        self._num_steps = 0
        self._num_tokens = 0
        self._num_finished = 0
        self._late_s: list[float] = []

    def run_forever(self) -> None:
        """Until the HTTP side says so or is gone."""
        due_s = time.perf_counter()
        while True:
            left_s = due_s - time.perf_counter()
            is_busy = self._running or self._waiting or self._ended
            for message in self._link.receive(max(left_s, 0) if is_busy else IDLE_WAIT_S):
                if isinstance(message, Shutdown):
                    self._tell_lateness()
                    return
                self._take(message)
            now_s = time.perf_counter()
            if not is_busy:
                due_s = now_s
                self._link.send(StepOutput([], self._stats()))
            elif now_s >= due_s:
                self._late_s.append(now_s - due_s)
                due_s = max(due_s, now_s - self._step_s) + self._step_s
                self._link.send(StepOutput(self._step(), self._stats()))

    def _take(self, message: object) -> None:
        if isinstance(message, Submit):
            self._waiting.append(Row(message))
        elif isinstance(message, Abort):
            found = [row for row in self._waiting if row.submit.rid == message.rid]
            row = self._running.pop(message.rid, None) or next(iter(found), None)
            if row in found:
                self._waiting.remove(row)
            if row is not None:
                self._ended.append(row.end())
        elif isinstance(message, Call):
            self._link.send(Answer(message.call_id, False, REFUSAL))

    def _step(self) -> list[TokenDelta]:
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting.popleft()
            self._running[row.submit.rid] = row
        deltas, self._ended = self._ended, []
        for rid, row in list(self._running.items()):
            delta = row.step(self._tokens_per_step)
            self._num_tokens += len(delta.token_ids)
            if delta.finish is not None:
                del self._running[rid]
                self._num_finished += 1
            deltas.append(delta)
        self._num_steps += 1
        return deltas

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_queued=len(self._waiting),
            num_steps=self._num_steps,
            num_generated_tokens=self._num_tokens,
            num_finished=self._num_finished,
            is_warm=True,
        )

    def _tell_lateness(self) -> None:
        """Whether the engine itself kept its rate."""
        late_ms = sorted(late_s * 1e3 for late_s in self._late_s) or [0.0]
        p50, p99 = late_ms[len(late_ms) // 2], late_ms[len(late_ms) * 99 // 100]
        logger.info("%d steps; late by %.2f ms (p50), %.2f ms (p99)", self._num_steps, p50, p99)


def serve_as_engine(arguments: argparse.Namespace) -> int:
    """In the engine process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = SocketLink(socket.socket(fileno=arguments.engine_fd), on_lost=lambda: None)
    messages = link.receive(IDLE_WAIT_S * 100)
    if not messages or not isinstance(messages[0], Configure):
        return 1
    set_up_logging(messages[0].config.log_level)
    link.send(Ready(describe(messages[0].config, arguments.max_rows)))
    engine = FakeEngine(link, arguments.step_ms / 1e3, arguments.tokens_per_step, arguments.max_rows)
    engine.run_forever()
    return 0


def describe(config: ServerConfig, max_rows: int) -> EngineInfo:
    return EngineInfo(
        model_path=config.model_path,
        architecture="FakeForCausalLM",
        model_type="fake",
        vocab_size=VOCAB_SIZE,
        context_length=config.context_length or CONTEXT_LENGTH,
        max_total_tokens=max_rows * CONTEXT_LENGTH,
        max_running_requests=max_rows,
        page_size=PAGE_SIZE,
        num_pages=max_rows * CONTEXT_LENGTH // PAGE_SIZE,
        chunked_prefill_size=CONTEXT_LENGTH,
        param_bytes=0,
        kv_bytes=0,
        dtype="none",
        quantization="none",
        platform="none",
        device_kind="none",
        num_devices=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=12.8, help="time of a step [%(default)s]")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="of each request [%(default)s]")
    parser.add_argument("--max-rows", type=int, default=256, help="requests in a step [%(default)s]")
    parser.add_argument("--engine-fd", type=int, help=argparse.SUPPRESS)  # the engine process
    arguments, launch_flags = parser.parse_known_args()
    if arguments.engine_fd is not None:
        return serve_as_engine(arguments)
    from jaxserve.launch import run

    config = load_config(launch_flags).config
    set_up_logging(config.log_level, config.log_level_http)
    facts = (f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ENGINE_FLAGS)
    engine_command = (sys.executable, os.path.abspath(__file__), *facts, "--engine-fd")
    return run(config, command=sys.argv, engine_command=engine_command)


ENGINE_FLAGS = ("step-ms", "tokens-per-step", "max-rows")


if __name__ == "__main__":
    sys.exit(main())
