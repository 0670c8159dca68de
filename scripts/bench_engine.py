"""jaxserve's engine in this process, without HTTP, as the benchmarks drive it; and as their worker.

    python scripts/bench_engine.py --model-path MODEL --precision int8 --set max_running_requests=32

Used by bench_offline.py, and started by bench_peers.py as one worker among others. Loads the model, waits
until every program is compiled, then runs batches of token ids. Knows nothing of tables or of peers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_workload import Arrival, Batch, RealPrompt, answer_batches

from jaxserve.build import build_engine
from jaxserve.config import FIELD_BY_KEY, ServerConfig, read_value
from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Ready, Shutdown
from jaxserve.engine.transport import ThreadLink
from jaxserve.launch import read_tokenizer
from jaxserve.text.chat_template import load_chat_template
from jaxserve.types import EngineInfo, TokenParams
from jaxserve.weights.resolve import resolve_model

PRECISIONS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "float32", "quantization": "none"},
    "bf16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
}


class OfflineEngine:
    """A loaded model on a thread of its own, and a client of it. `clock` watches its steps."""

    def __init__(self, config: ServerConfig, *, has_clock: bool = False):
        start_s = time.perf_counter()
        self._loop = asyncio.new_event_loop()
        self._client = EngineClient()
        self._numbers = itertools.count()
        self.files = resolve_model(
            config.model_path, load_format=config.load_format, on_progress=lambda *_: None
        )
        self._link = ThreadLink(self._loop, self._client.handle)
        engine, self._runner, self.info = build_engine(config, self.files, self._link, lambda *_: None)
        self.ready_s = time.perf_counter() - start_s
        self.clock = None
        if has_clock:
            from bench_steps import StepClock

            self.clock = StepClock()
            self.clock.watch(engine, self._runner, self._link)
        self._thread = threading.Thread(target=engine.run_forever, name="jaxserve-engine")
        self._thread.start()
        self._loop.run_until_complete(self._wait_until_warm(self.info))
        self.warm_s = time.perf_counter() - start_s

    async def _wait_until_warm(self, info: EngineInfo) -> None:
        self._client.connect(self._link.put)
        self._client.handle(Ready(info))
        while not self._client.stats.is_warm:
            await asyncio.sleep(0.1)

    def run(self, batch: Batch) -> list[Arrival]:
        """Submit every sequence at once and wait for the last; the prefix cache has nothing for them."""
        return self._loop.run_until_complete(self._run(batch))

    async def _run(self, batch: Batch) -> list[Arrival]:
        number = next(self._numbers)
        arrivals: list[Arrival] = []
        start_s = time.perf_counter()

        async def ask(sequence: int) -> None:
            params = TokenParams(
                max_new_tokens=batch.num_new_tokens[sequence], stop_ids=tuple(batch.stop_ids)
            )
            rid = f"{number}-{sequence}"
            stream = self._client.generate(rid, batch.prompts[sequence], params, cache_salt=rid)
            async for delta in stream:
                if delta.token_ids:
                    arrivals.append((time.perf_counter() - start_s, sequence, len(delta.token_ids)))
                if delta.finish is not None and delta.finish.kind == "abort":
                    raise RuntimeError(f"a sequence was refused: {delta.finish.message}")

        await asyncio.gather(*(ask(sequence) for sequence in range(len(batch.prompts))))
        return arrivals

    def totals(self) -> dict[str, Any]:
        """What the engine itself has counted until now."""
        stats = self._client.stats
        busy_s = stats.step_gap_s + stats.step_busy_s
        return {
            "ready_s": self.ready_s,
            "warm_s": self.warm_s,
            "step_gap_share": stats.step_gap_s / busy_s if busy_s else 0.0,
            "num_late_compiles": stats.num_late_compiles,
            "num_steps": stats.num_steps,
        }

    def close(self) -> None:
        self._link.put(Shutdown())
        self._thread.join()
        self._runner.close()
        if self.clock is not None:
            self.clock.close()
        self._loop.close()


def tokenize(config: ServerConfig, prompts: Sequence[RealPrompt]) -> tuple[list[list[int]], list[int]]:
    """The token ids of each prompt, by the model's own chat template, and the ids that end a reply."""
    files = resolve_model(config.model_path, load_format=config.load_format, on_progress=lambda *_: None)
    tokenizer = read_tokenizer(config, files)
    template = load_chat_template(config.chat_template, tokenizer)
    ids = [
        tokenizer.encode(template.render(prompt.messages), add_special_tokens=False)
        if prompt.messages
        else tokenizer.encode(prompt.text)
        for prompt in prompts
    ]
    return ids, list(tokenizer.eos_ids)


def make_config(
    model_path: str, precision: str, settings: Sequence[str], defaults: dict[str, Any]
) -> ServerConfig:
    """Settings given as KEY=VALUE win over those of the precision, which win over `defaults`.

    Raises ConfigError for a value that is not allowed, ValueError for what is no setting.
    """
    values: dict[str, Any] = {**defaults, **PRECISIONS[precision], "model_path": model_path}
    for setting in settings:
        key, equals, word = setting.partition("=")
        name = FIELD_BY_KEY.get(key.replace("-", "_"))
        if name is None or not equals:
            raise ValueError(f"--set takes KEY=VALUE with a setting of `jaxserve launch`, got {setting!r}.")
        values[name] = read_value(name, word)
    return ServerConfig(**values)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """What makes the engine, alike in every benchmark."""
    parser.add_argument("--model-path", default="pypi:qwen2.5-coder-0.5b-instruct")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of `jaxserve launch`, such as kv_cache_dtype=float32; may be given again",
    )


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark of one engine."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="int8")
    return parser


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    config = make_config(arguments.model_path, arguments.precision, arguments.settings, {})
    engine = OfflineEngine(config)
    ready = {
        "vocab_size": engine.info.vocab_size,
        "gguf": [str(Path(path).resolve()) for path in engine.files.files if Path(path).suffix == ".gguf"],
        "param_bytes": engine.info.param_bytes,
    }
    answer_batches(ready, engine.run, engine.totals)
    engine.close()


if __name__ == "__main__":
    main()
