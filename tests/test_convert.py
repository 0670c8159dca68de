"""`jaxserve convert`: what it writes serves without the original, on any number of devices, or is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.blueprint import sketch_model
from jaxserve.cli import main
from jaxserve.config import ServerConfig
from jaxserve.convert import TOKENIZER_GGUF
from jaxserve.errors import ConfigError, UnavailableError, WeightError
from jaxserve.planning.shapes import find_model
from jaxserve.runner.sizing import GIB, Machine
from jaxserve.types import KV_CACHE, WEIGHTS
from jaxserve.weights.gguf import open_gguf, read_gguf_metadata
from jaxserve.weights.resolve import resolve_model
from jaxserve.weights.saved_form import HEADER_FILE
from tests.engine.running_engine import RunningEngine, start_tiny_engine, token_ids
from tests.goldens.read import read_tiny_goldens
from tests.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from tests.weights.gguf_files import write_model
from tests.weights.packed_files import write_packed_model

V5E = Machine(platform="tpu", num_devices=1, memory_bytes=16 * GIB, free_bytes=16 * GIB)


def convert(model_path: Path, output: Path, *flags: str) -> Path:
    words = ["convert", "--model-path", str(model_path), "--output", str(output), "--log-level", "error"]
    assert main([*words, *flags]) == 0
    return output


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The tiny qwen2, whose head is its embedding; the original is gone."""
    folder = tmp_path_factory.mktemp("qwen2")
    original = write_tiny_checkpoint(folder / "model", "qwen2")
    output = convert(original, folder / "converted")
    shutil.rmtree(original)
    return output


async def ask(engine: RunningEngine, rid: str) -> list[int]:
    return token_ids(await engine.generate(rid, read_tiny_goldens("qwen2")[33].prompt_ids, max_new_tokens=24))


def test_the_same_tokens_on_four_devices_and_on_two_from_what_one_wrote(converted, tmp_path):
    """The golden ones, also after the weights were dropped and read again, or exchanged for others."""
    golden = read_tiny_goldens("qwen2")[33].greedy_ids[:24]
    other = convert(write_tiny_checkpoint(tmp_path / "b", "qwen2", seed=1), tmp_path / "other")
    quantised = convert(tmp_path / "b", tmp_path / "int8", "--quantization", "int8")

    async def scenario():
        async with start_tiny_engine(converted, tp_size=4, max_running_requests=1) as engine:
            assert await ask(engine, "four") == golden
        async with start_tiny_engine(converted, tp_size=2, max_running_requests=1) as engine:
            client = engine.client
            assert await ask(engine, "two") == golden
            await client.release_memory((WEIGHTS, KV_CACHE), keeps_weights=False, mode="wait", timeout_s=10.0)
            await client.resume_memory((WEIGHTS, KV_CACHE))
            assert await ask(engine, "awake") == golden
            await client.update_weights(str(other), "auto", flushes_cache=True)
            assert await ask(engine, "other") != golden
            with pytest.raises(UnavailableError, match="was converted to int8, and float32 is served here"):
                await client.update_weights(str(quantised), "auto", flushes_cache=True)
            await client.update_weights(str(converted), "auto", flushes_cache=True)
            assert await ask(engine, "back") == golden

    asyncio.run(asyncio.wait_for(scenario(), 600))


def test_the_folder_holds_what_serving_needs_and_says_what_it_is(tmp_path):
    original = write_tiny_checkpoint(tmp_path / "model", "llama", shards=2)
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "preprocessor_config.json"):
        (original / name).write_text(f"{{}} {name}")
    output = convert(original, tmp_path / "converted", "--quantization", "int8", "--dtype", "bfloat16")
    expected = {path.name for path in original.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in output.iterdir()} == expected | {"params", HEADER_FILE}
    assert (output / "merges.txt").read_text() == "{} merges.txt"
    files = resolve_model(str(output), on_progress=lambda *_: None)
    assert (files.kind, files.hf_config, files.local_dir) == ("orbax", tiny_config("llama"), output)
    assert files.generation_config == json.loads((original / "generation_config.json").read_text())
    saved = files.saved
    assert saved is not None
    assert (saved.architecture, saved.dtype, saved.quantization) == ("LlamaForCausalLM", "bfloat16", "int8")
    assert main(["convert", "--model-path", str(output), "--output", str(tmp_path / "again")]) == 2


def test_a_gguf_file_leaves_its_tokenizer_and_a_packed_model_its_packing(tmp_path):
    original = write_model(tmp_path / "tiny.gguf", tiny_config("llama"), tiny_tensors("llama"))
    output = convert(original, tmp_path / "converted")
    assert read_gguf_metadata(output / TOKENIZER_GGUF) == read_gguf_metadata(original)
    stripped = open_gguf(output / TOKENIZER_GGUF)
    assert stripped.tensors == {}
    stripped.close()
    assert resolve_model(str(output), on_progress=lambda *_: None).kind == "orbax"
    write_packed_model(tmp_path / "awq", "awq")
    output = convert(tmp_path / "awq", tmp_path / "unpacked")
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model-path", "x"], "Say with --output DIR, once, which folder to make."),
        (["--output", "gs://bucket/x", "--model-path", "x"], "output must be a folder on this machine"),
        (["--output", "y", "--model-path", "x", "--quantisation", "int8"], "Did you mean --quantization?"),
        (["--output", "y", "--model-path", "x", "--quantization", "int4"], "int4 cannot be converted yet"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, sentence, capsys):
    assert main(["convert", *argv]) == 2
    assert sentence in capsys.readouterr().err


def sketch(folder: Path, **flags: Any):
    config = ServerConfig(model_path=str(folder), **flags)
    return sketch_model(config, find_model(config), V5E)


def test_plan_and_launch_take_the_types_that_were_saved_and_refuse_others(converted, tmp_path):
    quantised = convert(
        write_tiny_checkpoint(tmp_path / "m", "llama"), tmp_path / "q", "--quantization", "fp8"
    )
    precision = sketch(quantised).precision
    assert (precision.dtype, precision.quantization) == ("float32", "fp8")
    assert sketch(converted, dtype="float32", quantization="none").precision.quantization == "none"
    with pytest.raises(
        ConfigError, match=r"quantization is none, and .* was converted with quantization fp8"
    ):
        sketch(quantised, quantization="none")
    with pytest.raises(ConfigError, match=r"dtype is bfloat16, and .* was converted with dtype float32"):
        sketch(converted, dtype="bfloat16")


def resolve(folder: Path) -> None:
    resolve_model(str(folder), on_progress=lambda *_: None)


def test_a_folder_that_is_not_whole_is_never_served(converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    data = max((copy / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(WeightError, match=r"is damaged: params/.* bytes where .* were written"):
        resolve(copy)
    data.unlink()
    with pytest.raises(WeightError, match=r"is not whole: it lacks params/"):
        resolve(copy)
    data.write_bytes(content)
    resolve(copy)
    header = (copy / HEADER_FILE).read_text()
    for text, sentence in [
        (
            header.replace('"format_version": 1', '"format_version": 2'),
            "is of format 2, and this is jaxserve",
        ),
        (header[:-100], "cannot be read"),
    ]:
        (copy / HEADER_FILE).write_text(text)
        with pytest.raises(WeightError, match=sentence):
            resolve(copy)
    (copy / HEADER_FILE).unlink()
    with pytest.raises(WeightError, match=f"it holds params/ and no {HEADER_FILE}"):
        resolve(copy)


CONVERT_AND_WAIT = """
import signal, sys, time
from jaxserve import cli, convert
from jaxserve.weights import orbax_save
owner, name, first_calls, *argv = sys.argv[1:]
owner = {"convert": convert, "ArrayStream": orbax_save.ArrayStream}[owner]
carry_on, calls = getattr(owner, name), []
def wait(*args):
    calls.append(args)
    if len(calls) > int(first_calls):
        print("here", flush=True)
        time.sleep(60)
    return carry_on(*args)
setattr(owner, name, wait)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(argv))
"""
BETWEEN_ARRAYS = ("ArrayStream", "_pad", "10")
BEFORE_THE_HEADER = ("convert", "write_header", "0")


@contextlib.contextmanager
def convert_up_to(place: tuple[str, ...], original: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that waits at this place."""
    argv = ["convert", "--model-path", str(original), "--output", str(output)]
    command = [sys.executable, "-c", CONVERT_AND_WAIT, *place, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process


@pytest.mark.parametrize("place", [BETWEEN_ARRAYS, BEFORE_THE_HEADER], ids=["weights", "header"])
def test_a_conversion_that_was_killed_is_not_served_and_the_next_one_is_whole(tmp_path, place):
    original = write_tiny_checkpoint(tmp_path / "model", "llama")
    output = tmp_path / "out"
    with convert_up_to(place, original, output) as process:
        process.kill()
    with pytest.raises(ConfigError, match="is under way or was interrupted"):
        resolve(output)
    with pytest.raises(WeightError, match=r"is not whole|no weights"):
        resolve(tmp_path / "out.partial")
    convert(original, output)
    resolve(output)
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_ends_a_conversion_and_leaves_nothing(tmp_path):
    original = write_tiny_checkpoint(tmp_path / "model", "llama")
    with convert_up_to(BETWEEN_ARRAYS, original, tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_others_wrote_or_nobody_finished_is_told(converted, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(
        ConfigError, match=r"out\.partial is of a conversion that is under way or was interrupted"
    ):
        resolve(tmp_path / "out")
    with pytest.raises(WeightError, match="is an Orbax checkpoint of another program"):
        resolve(converted / "params")
