"""LLM: the engine as a library, in this process, without HTTP.

    from jaxserve import LLM, SamplingParams
    llm = LLM(model_path="pypi:smollm2-135m-instruct")
    llm.generate("The capital of France is", SamplingParams(temperature=0))["text"]

The same engine, validation and text handling as the server's, on a thread; answers have the shapes of
POST /generate and of a chat message. Works in notebooks: the event loop is one of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.build import build_engine
from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Failed, Ready, Shutdown
from jaxserve.engine.transport import ThreadLink
from jaxserve.errors import InvalidRequestError
from jaxserve.launch import make_settings, read_tokenizer
from jaxserve.metrics import ServerMetrics
from jaxserve.progress import Progress
from jaxserve.server.generation import Generator, Job, new_rid
from jaxserve.server.pieces import Piece, join_pieces
from jaxserve.server.replies import render_finish
from jaxserve.server.settings import TextTools
from jaxserve.text.chat_template import load_chat_template
from jaxserve.types import SamplingParams
from jaxserve.weights.resolve import resolve_model

Prompt = str | list[int]
Message = dict[str, Any]


class LLM:
    """A loaded model. Keyword arguments are those of `jaxserve launch` (dashes become underscores).

    Usable from any thread; close it, or use it in a `with`, to give the memory back.
    """

    def __init__(self, model_path: str, **settings: Any):
        unknown = settings.keys() - {field.name for field in dataclasses.fields(ServerConfig)}
        if unknown:
            raise TypeError(
                f"LLM() has no setting {', '.join(sorted(unknown))}; see `jaxserve launch --help`"
            )
        self.config = ServerConfig(model_path=model_path, **settings)
        with Progress(self.config.log_level) as progress:
            files = resolve_model(
                model_path,
                revision=self.config.revision,
                download_dir=self.config.download_dir,
                load_format=self.config.load_format,
                on_progress=progress.update,
            )
            self._tokenizer = read_tokenizer(self.config, files)
            self._template = load_chat_template(self.config.chat_template, self._tokenizer)
            self._loop = asyncio.new_event_loop()
            self._client = EngineClient()
            self._link = ThreadLink(self._loop, self._client.handle)
            engine, self._runner, self.info = build_engine(self.config, files, self._link, progress.update)
        text = TextTools(tokenizer=self._tokenizer, chat_template=self._template)
        server_settings = dataclasses.replace(
            make_settings(self.config, files, command=["LLM"]), max_sequences=sys.maxsize
        )
        metrics = ServerMetrics(
            server_settings.served_model_name,
            read_stats=lambda: self._client.stats,
            read_info=lambda: self._client.info,
            read_heartbeat_age_s=lambda: self._client.heartbeat_age_s,
        )
        self._generator = Generator(self._client, text, server_settings, metrics)
        recommended = dataclasses.asdict(server_settings.sampling_defaults)
        self._chat_sampling = SamplingParams(
            **{name: value for name, value in recommended.items() if value is not None}
        )
        self._client.connect(self._link.put)
        self._client.handle(Ready(self.info))
        self._threads = [
            threading.Thread(target=self._loop.run_forever, name="jaxserve-client", daemon=True),
            threading.Thread(target=self._run_engine, args=(engine,), name="jaxserve-engine", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """Continue one prompt (a dict) or several (a list of dicts): text, output_ids, meta_info.

        A prompt is text or a list of token ids. Raises InvalidRequestError as the server would.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several: Any = [prompts] if is_single else prompts
        jobs = [self._make_job(prompt, sampling_params) for prompt in several]
        answers = [_describe(pieces) for pieces in self._run(jobs, show_progress)]
        return answers[0] if is_single else answers

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """The reply to one conversation (a dict) or several (a list): like `generate`, by chat template.

        Without `sampling_params`, as the model recommends.
        """
        is_single = bool(messages) and isinstance(messages[0], dict)
        several: Any = [messages] if is_single else messages
        jobs = [self._make_chat_job(conversation, sampling_params) for conversation in several]
        answers = [_describe(pieces) for pieces in self._run(jobs, show_progress)]
        return answers[0] if is_single else answers

    def stream(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """New text as it comes, of a prompt or a conversation. Leaving the loop early ends the request."""
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)
        make: Any = self._make_chat_job if is_chat else self._make_job
        arrived: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        async def pump(job: Job) -> None:
            async with self._generator.open([job]) as run:
                async for pieces in run:
                    arrived.put("".join(piece.text for piece in pieces))

        task = asyncio.run_coroutine_threadsafe(pump(make(prompt, sampling_params)), self._loop)
        task.add_done_callback(lambda done: arrived.put(None if done.cancelled() else done.exception()))
        try:
            while isinstance(item := arrived.get(), str):
                if item:
                    yield item
            if item is not None:
                raise item
        finally:
            task.cancel()

    def close(self) -> None:
        """End the engine's thread and free its memory. Nothing may be asked of it afterwards."""
        self._link.put(Shutdown())
        self._threads[1].join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._threads[0].join()
        self._loop.close()

    def _run_engine(self, engine: Any) -> None:
        """The engine's thread: serve, and tell the reason if the device fails."""
        try:
            engine.run_forever()
        except RuntimeError as error:
            self._link.send(Failed(str(error)))
            raise
        finally:
            self._runner.close()

    def _make_job(self, prompt: Prompt, sampling_params: SamplingParams | None) -> Job:
        return Job(
            rid=new_rid(),
            prompt=prompt,
            prompt_field="prompts",
            sampling=sampling_params or SamplingParams(),
        )

    def _make_chat_job(self, messages: list[Message], sampling_params: SamplingParams | None) -> Job:
        if not messages:
            raise InvalidRequestError("messages must hold at least one message.", param="messages")
        job = self._make_job(self._template.render(messages), sampling_params or self._chat_sampling)
        return dataclasses.replace(job, prompt_field="messages", has_special_tokens=True)

    def _run(self, jobs: list[Job], show_progress: bool) -> list[list[Piece]]:
        """Every job's finished choices, each with its prompt's length."""

        async def collect() -> list[list[Piece]]:
            num_done = 0
            with Progress() as progress:
                async with self._generator.open(jobs) as run:
                    parts: list[list[Piece]] = [[] for _ in run.sequences]
                    async for pieces in run:
                        for piece in pieces:
                            parts[piece.index].append(piece)
                            num_done += piece.finish is not None
                        if show_progress:
                            progress.update("Generating", num_done, len(parts), "sequences")
            whole = [join_pieces(part) for part in parts]
            return [[whole.pop(0) for _ in range(job.sampling.n)] for job in jobs]

        return asyncio.run_coroutine_threadsafe(collect(), self._loop).result()


def _describe(choices: list[Piece]) -> Any:
    """One dict a prompt; a list of dicts when n > 1."""
    answers = [
        {
            "text": piece.text,
            "output_ids": list(piece.token_ids),
            "meta_info": {
                "finish_reason": render_finish(piece.finish, piece.num_output_tokens),
                "prompt_tokens": piece.num_prompt_tokens,
                "completion_tokens": piece.num_output_tokens,
                "cached_tokens": piece.num_cached_tokens,
            },
        }
        for piece in choices
    ]
    return answers[0] if len(answers) == 1 else answers
