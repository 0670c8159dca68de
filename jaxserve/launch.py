"""Composition root of the server: files, tokenizer, engine process and HTTP application, put together.

Called by cli.py with the settings. This process speaks HTTP and text and never imports jax; the engine is
a process of its own (supervise.py), and so is each of several (--dp-size). The port is taken before anything
slow happens, the model's files are found or downloaded next, and HTTP answers (503, with the progress) while
the engine loads and compiles.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sanic import Sanic

from jaxserve.config import ServerConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.group import EngineGroup
from jaxserve.engine.messages import UpdateWeights
from jaxserve.engine_process import ENGINE_COMMAND, EngineProcess
from jaxserve.errors import ConfigError, InvalidRequestError, JaxserveError
from jaxserve.hosts.devices import divide_devices
from jaxserve.progress import Progress
from jaxserve.server.app import create_app
from jaxserve.server.decode import decode_body
from jaxserve.server.images import ImageReader
from jaxserve.server.sampling import read_native_sampling
from jaxserve.server.schemas import SamplingBody
from jaxserve.server.settings import ServerSettings, TextTools, read_sampling_defaults
from jaxserve.supervise import EngineSupervisor
from jaxserve.text.chat_template import load_chat_template
from jaxserve.text.stop_regex import check_stop_regex
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.types import TokenParams
from jaxserve.vision.limits import FetchRules, ImageLimits, read_image_form
from jaxserve.vision.loader import ImageLoader
from jaxserve.weights.resolve import ModelFiles, resolve_model

LISTEN_BACKLOG = 1024
DRAIN_POLL_S = 0.05
FLUSH_TIMEOUT_S = 5.0  # for answers that are ready to reach their clients at the end
WARM_UP_TOKENS = 2  # a prefill and a decode step; the first programs hold one row, so nobody else runs yet
YOUNG_OBJECTS = 20_000  # between two looks of the garbage collector

logger = logging.getLogger("jaxserve.launch")


def run(
    config: ServerConfig,
    *,
    command: list[str],
    engine_command: tuple[str, ...] = ENGINE_COMMAND,
    first_engines: Sequence[EngineProcess] = (),
) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. Raises ConfigError or WeightError before serving.

    `first_engines`, one of each dp_rank, were started from `engine_command` before this module was imported.
    """
    engines = first_engines or [
        EngineProcess(engine_command, environment) for environment in divide_devices(config, os.environ)
    ]
    try:
        return _serve(config, command, engine_command, engines)
    finally:
        for engine in engines:
            engine.kill()


def _serve(
    config: ServerConfig,
    command: list[str],
    engine_command: tuple[str, ...],
    engines: Sequence[EngineProcess],
) -> int:
    started_s = time.perf_counter()
    logger.info("server_args=%r", config)
    read_origins(config.allowed_origins)  # a mistake is told before anything slow
    read_preferred_sampling(config.preferred_sampling_params)
    listener = _listen(config.host, config.port)
    with Progress(config.log_level) as progress:
        files = find_model(config, progress)
    model_path = local_model_path(files)
    supervisors = [
        EngineSupervisor(
            config,
            model_path,
            EngineClient(rank if len(engines) > 1 else None),
            engine_command,
            engine,
        )
        for rank, engine in enumerate(engines)
    ]
    clients = [supervisor.client for supervisor in supervisors]
    weights = UpdateWeights(model_path, config.load_format)
    port = clients[0] if len(clients) == 1 else EngineGroup(clients, weights)
    tokenizer = read_tokenizer(config, files)  # while the engine loads
    logger.info("The tokenizer is ready after %.1f s.", time.perf_counter() - started_s)
    text = make_text_tools(config, files, tokenizer)
    app = create_app(port, text, make_settings(config, files, command))
    app.config.GRACEFUL_SHUTDOWN_TIMEOUT = FLUSH_TIMEOUT_S
    _attach_engines(app, config, supervisors, tokenizer, started_s)
    calm_collector()
    app.run(sock=listener, single_process=True, motd=False, access_log=False)
    for supervisor in supervisors:
        if supervisor.failure is not None:
            print(f"jaxserve: error: {supervisor.failure}", file=sys.stderr)
            return supervisor.exit_status
    return 0


def calm_collector() -> None:
    """Let the garbage collector look less often, and not at what stays for good (modules, the vocabulary).

    A step of 256 streams makes and frees thousands of objects without a cycle among them. Python looks at
    every 700th by default, and now and then at all there are: 10 to 20 % of the time of a token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def find_model(config: ServerConfig, progress: Progress) -> ModelFiles:
    """The files of --model-path, downloaded if they are not on this machine."""
    return resolve_model(
        config.model_path,
        revision=config.revision,
        download_dir=config.download_dir,
        load_format=config.load_format,
        on_progress=progress.update,
    )


def local_model_path(files: ModelFiles) -> str:
    """Where the engine finds the same files, without asking a hub again."""
    return str(files.files[0] if files.files and files.files[0].suffix == ".gguf" else files.local_dir)


def read_tokenizer(config: ServerConfig, files: ModelFiles) -> Tokenizer:
    """The tokenizer of --tokenizer-path, else the one that came with the model."""
    return load_tokenizer(
        config.tokenizer_path or local_model_path(files),
        generation_config=files.generation_config,
        vocab_size=(files.hf_config.get("text_config") or files.hf_config).get("vocab_size"),
    )


def make_text_tools(config: ServerConfig, files: ModelFiles, tokenizer: Tokenizer) -> TextTools:
    """Tokenizer, chat template and, for a model that takes images, what reads them."""
    images = _make_image_reader(config, files)
    template = load_chat_template(config.chat_template, tokenizer, takes_images=images is not None)
    return TextTools(tokenizer=tokenizer, chat_template=template, images=images)


def _make_image_reader(config: ServerConfig, files: ModelFiles) -> ImageReader | None:
    vision_config = files.hf_config.get("vision_config")
    token_id = files.hf_config.get("image_token_id")
    if not isinstance(vision_config, Mapping) or token_id is None:
        return None
    limits = ImageLimits(
        max_per_message=config.max_images_per_message,
        max_per_request=config.max_images,
        max_file_bytes=config.max_image_size,
        max_pixels=config.max_image_pixels,
    )
    hosts = (config.allowed_image_hosts or "").split(",")
    rules = FetchRules(
        is_allowed=config.allow_image_urls,
        allowed_hosts=tuple(host.strip() for host in hosts if host.strip()),
    )
    form = read_image_form(files.local_dir, vision_config)
    return ImageReader(ImageLoader(form, limits, rules, num_workers=config.image_workers), token_id)


def make_settings(config: ServerConfig, files: ModelFiles, command: list[str]) -> ServerSettings:
    """The part of the flags that the HTTP side acts on."""
    return ServerSettings(
        served_model_name=config.model_name,
        model_path=config.model_path,
        tokenizer_path=config.tokenizer_path or local_model_path(files),
        load_format=config.load_format,
        api_key=config.api_key,
        admin_api_key=config.admin_api_key,
        allowed_origins=read_origins(config.allowed_origins),
        weight_version=config.weight_version,
        sampling_defaults=read_sampling_defaults(files.generation_config),
        preferred_sampling_params=read_preferred_sampling(config.preferred_sampling_params),
        is_model_name_strict=config.strict_model_name,
        max_concurrent_requests=config.max_concurrent_requests,
        max_prompt_tokens=config.max_prompt_tokens,
        max_n=config.max_n,
        max_sequences=config.max_sequences,
        max_body_bytes=config.max_body_size,
        upload_timeout_s=config.upload_timeout,
        heartbeat_limit_s=config.heartbeat_limit,
        stream_interval=config.stream_interval,
        is_streaming_incremental=config.incremental_streaming_output,
        random_seed=config.random_seed,
        launch_command=" ".join(command),
        server_args=config.shown(),
    )


def read_origins(text: str) -> tuple[str, ...]:
    """Of --allowed-origins. Raises ConfigError for what no browser would send."""
    origins = tuple(word.strip().rstrip("/") for word in text.split(","))
    if origins == ("none",):
        return ()
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(
                f"allowed_origins must be *, none, or origins such as https://example.com, got {origin!r}.",
                param="allowed_origins",
            )
    return origins


def read_preferred_sampling(preferred: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Of --preferred-sampling-params. Raises ConfigError for what a request's own would be refused for."""
    try:
        sampling = read_native_sampling(decode_body(json.dumps(preferred or {}).encode(), SamplingBody))
        sampling.validate()
        check_stop_regex(sampling.stop_regex)
    except InvalidRequestError as error:
        raise ConfigError(
            f"preferred_sampling_params: {error.message}", param="preferred_sampling_params"
        ) from None
    return preferred or {}


def _listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; a busy port is told before minutes are spent on loading."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. "
            "Choose another with --host and --port, or stop the program that uses it.",
            param="port",
        ) from error
    listener.listen(LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


def _attach_engines(
    app: Sanic,
    config: ServerConfig,
    supervisors: Sequence[EngineSupervisor],
    tokenizer: Tokenizer,
    started_s: float,
) -> None:
    """Start the engines with the server and end them after the last request."""
    tasks: list[asyncio.Task[None]] = []
    clients = [supervisor.client for supervisor in supervisors]

    async def start(app: Sanic) -> None:
        tasks.extend(asyncio.create_task(_supervise(app, supervisor)) for supervisor in supervisors)
        tasks.append(asyncio.create_task(_welcome(config, clients, tokenizer, started_s)))

    async def hear_signals(app: Sanic) -> None:
        _hear_signals(app, supervisors, config.drain_timeout)

    async def drain(_app: Sanic) -> None:
        for client in clients:
            client.drain()

    async def stop(app: Sanic) -> None:
        await asyncio.gather(*(supervisor.stop() for supervisor in supervisors))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        images = app.ctx.state.text.images
        if images is not None:
            await images.loader.close()

    app.register_listener(start, "before_server_start")
    app.register_listener(hear_signals, "after_server_start")  # in place of Sanic's own handlers
    app.register_listener(drain, "before_server_stop")
    app.register_listener(stop, "after_server_stop")


def _hear_signals(app: Sanic, supervisors: Sequence[EngineSupervisor], drain_timeout_s: float) -> None:
    """SIGTERM and Ctrl-C: the first lets open requests end and then stops, the second ends all at once.

    Meanwhile HTTP goes on: probes are answered, and new requests get 503.
    """
    tasks: list[asyncio.Task[None]] = []

    def hear(number: int) -> None:
        if tasks:
            for supervisor in supervisors:
                supervisor.kill()
            os._exit(128 + number)
        clients = [supervisor.client for supervisor in supervisors]
        tasks.append(asyncio.create_task(_drain(app, clients, drain_timeout_s)))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, hear, number)


async def _drain(app: Sanic, clients: Sequence[EngineClient], timeout_s: float) -> None:
    generator = app.ctx.state.generator
    for client in clients:
        client.drain()
    deadline_s = time.monotonic() + timeout_s
    if generator.num_open:
        logger.info("Shutting down; %d open requests have %g s to end.", generator.num_open, timeout_s)
    while generator.num_open and time.monotonic() < deadline_s:
        await asyncio.sleep(DRAIN_POLL_S)
    if generator.num_open:
        logger.warning("Shutting down; %d requests had not ended.", generator.num_open)
        for client in clients:
            client.end_all("The server shut down before the request had ended.", 503)
        await asyncio.sleep(DRAIN_POLL_S)  # to be told so
    app.stop()


async def _supervise(app: Sanic, supervisor: EngineSupervisor) -> None:
    try:
        await supervisor.run()
    except OSError as error:  # no process, no memory, no file handles
        supervisor.failure = f"The engine process could not be started: {error}"
    if supervisor.failure is not None:
        app.stop()


async def _welcome(
    config: ServerConfig, clients: Sequence[EngineClient], tokenizer: Tokenizer, started_s: float
) -> None:
    """Once all engines are ready: one request of our own to each, then the line that scripts wait for."""
    await asyncio.gather(*(_await_answer(config, client, tokenizer) for client in clients))
    logger.info("Ready after %.1f s.", time.perf_counter() - started_s)
    logger.info(
        "Listening on http://%s:%d (docs at /docs)",
        "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host,
        config.port,
    )
    logger.info("The server is fired up and ready to roll!")


async def _await_answer(config: ServerConfig, client: EngineClient, tokenizer: Tokenizer) -> None:
    """Until an engine is ready and has answered, if it is to."""
    while True:
        while client.status != "ready":
            await client.status_changed.wait()
        failure = None if config.skip_server_warmup else await _warm_up(client, tokenizer)
        if failure is None:
            return
        logger.error("The warm-up request failed: %s", failure)
        await client.status_changed.wait()


async def _warm_up(client: EngineClient, tokenizer: Tokenizer) -> str | None:
    """One short request; the reason if it fails."""
    assert client.info is not None
    num_new_tokens = min(WARM_UP_TOKENS, client.info.context_length - 1)
    prompt_ids = tokenizer.encode("The capital city of France is")
    prompt_ids = prompt_ids[: client.info.context_length - num_new_tokens]
    try:
        async for delta in client.generate("warm-up", prompt_ids, TokenParams(max_new_tokens=num_new_tokens)):
            if delta.finish is not None and delta.finish.kind == "abort":
                return delta.finish.message
    except JaxserveError as error:
        return error.message
    return None
