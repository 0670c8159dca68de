"""LLM: the engine as a library, in this process, without HTTP.

    from jaxserve import LLM, SamplingParams
    with LLM("pypi:smollm2-135m-instruct") as llm:
        llm.generate("The capital of France is", SamplingParams(temperature=0))["text"]

The same engine, validation and text handling as the server's, on a thread; answers have the shapes of
POST /generate and of a chat message. Works in notebooks: the event loop is one of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import queue
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from jaxserve.build import build_engine
from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Failed, Ready, Shutdown
from jaxserve.engine.transport import ThreadLink
from jaxserve.errors import ConfigError, InvalidRequestError, UnavailableError
from jaxserve.launch import find_model, make_settings, make_text_tools, read_tokenizer
from jaxserve.metrics import ServerMetrics
from jaxserve.progress import Progress
from jaxserve.server.generation import Generator, Job, new_rid
from jaxserve.server.logprobs import NativeLogprobs
from jaxserve.server.pieces import Piece, join_pieces
from jaxserve.server.replies import render_finish
from jaxserve.server.sample import MAX_TOKENS_SHOWN, answer, make_question
from jaxserve.server.sampling import count_choices, read_library_sampling
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import SamplingParams

T = TypeVar("T")
Prompt = str | list[int]
Message = dict[str, Any]
Sampling = SamplingParams | Mapping[str, Any]  # whole, or some of what /generate takes under that name


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
        if (self.config.nnodes or 1) > 1:
            raise ConfigError("LLM() runs on one host; several serve with `jaxserve launch`.", param="nnodes")
        if self.config.dp_size > 1:
            raise ConfigError("LLM() is one engine; several serve with `jaxserve launch`.", param="dp_size")
        with Progress(self.config.log_level) as progress:
            files = find_model(self.config, progress)
            self._tokenizer = read_tokenizer(self.config, files)
            self._text = make_text_tools(self.config, files, self._tokenizer)
            self._loop = asyncio.new_event_loop()
            self._client = EngineClient()
            self._link = ThreadLink(self._loop, self._client.handle)
            engine, self._runner, self.info = build_engine(self.config, files, self._link, progress.update)
        server_settings = dataclasses.replace(
            make_settings(self.config, files, command=["LLM"]), max_sequences=sys.maxsize
        )
        metrics = ServerMetrics(server_settings.served_model_name, self._client.engines)
        self._settings = server_settings
        self._generator = Generator(self._client, self._text, server_settings, metrics)
        self._client.connect(self._link.put)
        self._client.handle(Ready(self.info))
        self._is_closed = False
        self._client_thread = threading.Thread(
            target=self._loop.run_forever, name="jaxserve-client", daemon=True
        )
        self._engine_thread = threading.Thread(
            target=self._run_engine, args=(engine,), name="jaxserve-engine", daemon=True
        )
        self._client_thread.start()
        self._engine_thread.start()
        atexit.register(self.close)  # a program that forgets to must not end in the middle of a compile

    def __enter__(self) -> LLM:
        return self

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into token ids here, and back: `encode`, `token_text`."""
        return self._tokenizer

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Sampling | None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """Continue one prompt (a dict) or several (a list of dicts): text, output_ids, meta_info.

        A prompt is text or a list of token ids; with n or beam_width above 1 it gets a list of dicts. Without
        `sampling_params`, as the setting preferred_sampling_params says.
        Logprobs that `sampling_params` asks for are in meta_info, as in the answers of /generate, with each
        token's text. Raises InvalidRequestError as the server would.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several: Any = [prompts] if is_single else prompts
        jobs = [self._make_job(prompt, sampling_params) for prompt in several]
        answers = self._run(jobs, show_progress)
        return answers[0] if is_single else answers

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: Sampling | None = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """The reply to one conversation (a dict) or several (a list): like `generate`, by chat template.

        Without `sampling_params`, as preferred_sampling_params says, and then the model.
        """
        is_single = bool(messages) and isinstance(messages[0], dict)
        several: Any = [messages] if is_single else messages
        jobs = [self._make_chat_job(conversation, sampling_params) for conversation in several]
        answers = self._run(jobs, show_progress)
        return answers[0] if is_single else answers

    def stream(
        self, prompt: Prompt | list[Message], sampling_params: Sampling | None = None
    ) -> Iterator[str]:
        """New text as it comes, of a prompt or a conversation. Leaving the loop early ends the request.

        One text at a time: n must be 1, and beam_width too.
        """
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)
        sampling = self._read_sampling(sampling_params, is_chat=is_chat)
        for name in ("n", "beam_width"):
            number = getattr(sampling, name)
            if number > 1:
                raise InvalidRequestError(f"{name} must be 1 for a stream, got {number}.", param=name)
        make: Any = self._make_chat_job if is_chat else self._make_job
        arrived: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        async def pump(job: Job) -> None:
            async with self._generator.open([job]) as run:
                async for pieces in run:
                    arrived.put("".join(piece.text for piece in pieces))

        task = self._start(pump(make(prompt, sampling)))
        task.add_done_callback(lambda done: arrived.put(None if done.cancelled() else done.exception()))
        try:
            while isinstance(item := arrived.get(), str):
                if item:
                    yield item
            if item is not None:
                raise item
        finally:
            task.cancel()

    def sample(
        self, prompts: str | Sequence[str], selector: str | Sequence[str], logprobs: int = MAX_TOKENS_SHOWN
    ) -> Any:
        """What the model expects wherever a prompt's text holds `selector`: a dict for one prompt, a list of
        dicts for several, in the shape of POST /v1/sample's replies. Prompts may have a selector each.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        selectors = [selector] * len(several) if isinstance(selector, str) else selector
        if len(selectors) != len(several):
            raise InvalidRequestError(
                f"There must be one selector for each of the {len(several)} prompts, got {len(selectors)}.",
                param="selector",
            )
        questions = [
            make_question(prompt, literal, logprobs, self._settings)
            for prompt, literal in zip(several, selectors, strict=True)
        ]

        async def ask() -> list[Any]:
            asked = [answer(question, self._generator, self._tokenizer) for question in questions]
            return [msgspec.to_builtins(reply) for reply in await asyncio.gather(*asked)]

        work = self._start(ask())
        try:
            answers = work.result()
        finally:
            work.cancel()
        return answers[0] if isinstance(prompts, str) else answers

    def close(self) -> None:
        """End the engine's thread; what other threads still wait for fails. Closing again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self._link.put(Shutdown())
        self._engine_thread.join()
        asyncio.run_coroutine_threadsafe(self._fail_open_requests(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._client_thread.join()
        self._loop.close()

    async def _fail_open_requests(self) -> None:
        self._client.lose("The model was closed.")
        if self._text.images is not None:
            await self._text.images.loader.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the client's loop."""
        if self._is_closed:
            work.close()
            raise UnavailableError("The model was closed; make a new LLM.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run_engine(self, engine: Any) -> None:
        """The engine's thread: serve, and tell the reason if the device fails."""
        try:
            engine.run_forever()
        except Exception as error:
            self._link.send(Failed(f"The engine failed: {type(error).__name__}: {error}"))
            raise
        finally:
            self._runner.close()

    def _read_sampling(self, asked: Sampling | None, *, is_chat: bool) -> SamplingParams:
        settings = self._settings
        defaults = settings.sampling_defaults if is_chat else None
        return read_library_sampling(asked, settings.preferred_sampling_params, defaults)

    def _make_job(self, prompt: Prompt, sampling_params: Sampling | None) -> Job:
        return Job(
            rid=new_rid(),
            prompt=prompt,
            prompt_field="prompts",
            sampling=self._read_sampling(sampling_params, is_chat=False),
        )

    def _make_chat_job(self, messages: list[Message], sampling_params: Sampling | None) -> Job:
        if not messages:
            raise InvalidRequestError("messages must hold at least one message.", param="messages")
        sampling = self._read_sampling(sampling_params, is_chat=True)
        job = self._make_job(self._text.chat_template.render(messages), sampling)
        reader = self._text.images
        images = () if reader is None else reader.find(messages, None)
        return dataclasses.replace(job, prompt_field="messages", has_special_tokens=True, images=images)

    def _run(self, jobs: list[Job], show_progress: bool) -> list[Any]:
        """Every job's answer: a dict, or a list of them for several choices."""

        async def collect() -> list[Any]:
            num_done = 0
            with Progress() as progress:
                async with self._generator.open(jobs) as run:
                    parts: list[list[Piece]] = [[] for _ in run.choices]
                    async for pieces in run:
                        for piece in pieces:
                            parts[piece.index].append(piece)
                            num_done += piece.finish is not None
                        if show_progress:
                            progress.update("Generating", num_done, len(parts), "sequences")
            writers = [
                NativeLogprobs(sequence, self._tokenizer, has_text=True, is_cumulative=False)
                for sequence in run.choices
            ]
            answers = [
                _describe(join_pieces(part), writer) for part, writer in zip(parts, writers, strict=True)
            ]
            remaining = iter(answers)
            return [_take_choices(remaining, count_choices(job.sampling)) for job in jobs]

        work = self._start(collect())
        try:
            return work.result()
        finally:
            work.cancel()  # an interrupted caller wants no more of it


def _describe(piece: Piece, logprobs: NativeLogprobs) -> dict[str, Any]:
    meta_info = {
        "finish_reason": render_finish(piece.finish, piece.num_output_tokens),
        "prompt_tokens": piece.num_prompt_tokens,
        "completion_tokens": piece.num_output_tokens,
        "cached_tokens": piece.num_cached_tokens,
        **logprobs.render(piece),
    }
    if piece.cumulative_logprob is not None:
        meta_info["cumulative_logprob"] = piece.cumulative_logprob
    return {"text": piece.text, "output_ids": list(piece.token_ids), "meta_info": meta_info}


def _take_choices(answers: Iterator[dict[str, Any]], num_choices: int) -> Any:
    """The next prompt's answers: one dict, or a list of several."""
    choices = [next(answers) for _ in range(num_choices)]
    return choices[0] if num_choices == 1 else choices
