"""What --model-path may name, and what is said of a path that names nothing usable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError, JaxserveError, WeightError
from jaxserve.weights.cache import cache_dir
from jaxserve.weights.resolve import ModelFiles, resolve_model
from tests import tiny
from tests.weights.gguf_files import write_model


def resolve(path: Path | str, load_format: str = "auto") -> ModelFiles:
    return resolve_model(str(path), load_format=load_format, on_progress=lambda message, done, total: None)


def write_tiny_gguf(path: Path) -> Path:
    return write_model(path, tiny.tiny_config("qwen2"), tiny.tiny_tensors("qwen2"))


def test_a_directory_of_safetensors(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama", shards=2)
    files = resolve(tmp_path)
    assert (files.kind, files.model_id, files.local_dir) == ("safetensors", str(tmp_path), tmp_path)
    assert [path.name for path in files.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert files.hf_config == tiny.tiny_config("llama")
    assert files.generation_config["eos_token_id"] == [2, 3]
    (tmp_path / "generation_config.json").unlink()
    assert resolve(tmp_path).generation_config == {}


def test_a_gguf_file_and_the_directory_that_holds_it(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    by_file, by_directory = resolve(path), resolve(tmp_path)
    assert by_file.kind == by_directory.kind == "gguf"
    assert by_file.files == by_directory.files == (path,)
    assert by_file.hf_config == by_directory.hf_config
    assert by_file.hf_config["architectures"] == ["Qwen2ForCausalLM"]


def test_safetensors_win_over_a_gguf_file_beside_them(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    write_tiny_gguf(tmp_path / "m.gguf")
    assert resolve(tmp_path).kind == "safetensors"


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_tiny_checkpoint(tmp_path / "org" / "name", "llama")
    assert resolve("org/name").kind == "safetensors"


def test_made_up_weights_need_only_a_config(tmp_path: Path) -> None:
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    files = resolve(tmp_path, load_format="dummy")
    assert (files.kind, files.files) == ("dummy", ())
    assert files.hf_config["model_type"] == "llama"
    gguf_path = write_tiny_gguf(tmp_path / "sub.gguf")
    files = resolve(gguf_path, load_format="dummy")
    assert (files.kind, files.files) == ("dummy", (gguf_path,))  # its tokenizer is still wanted


def test_unusable_directories_say_what_is_wrong(tmp_path: Path) -> None:
    def sentence() -> str:
        with pytest.raises(WeightError) as caught:
            resolve(tmp_path)
        return str(caught.value)

    assert "is not a model: it holds neither config.json" in sentence()
    (tmp_path / "config.json").write_text("{}")
    assert "has a config.json but no weights" in sentence()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickles and can run code" in sentence()
    write_tiny_gguf(tmp_path / "a.gguf")
    write_tiny_gguf(tmp_path / "b.gguf")
    assert "holds 2 GGUF files (a.gguf, b.gguf); give one of them" in sentence()
    tiny.write_tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in sentence()
    (tmp_path / "config.json").unlink()
    assert "holds safetensors files but no config.json" in sentence()


@pytest.mark.parametrize(
    ("model_path", "sentence"),
    [
        ("./no/such/dir", "'./no/such/dir' does not exist on this machine"),
        ("no/such/file.gguf", "does not exist on this machine"),
        ("smollm2-135m-instruct", "Did you mean pypi:smollm2-135m-instruct"),
        ("gpt2", r"neither a directory .* nor a hub id \(ORG/NAME or ORG/NAME:FILE\.gguf\)"),
        ("", "neither a directory"),
    ],
)
def test_a_model_path_that_means_nothing(model_path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        resolve(model_path)
    assert caught.value.param == "model_path"


def test_an_unknown_load_format_is_refused() -> None:
    with pytest.raises(JaxserveError, match="load_format must be one of auto, dummy, got 'pt'"):
        resolve("any", load_format="pt")


def test_the_cache_is_chosen_by_flag_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "from_environment"))
    assert cache_dir("given") == Path("given")
    assert cache_dir() == tmp_path / "from_environment"
    monkeypatch.delenv("JAXSERVE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "jaxserve"


def test_finding_a_model_never_imports_jax() -> None:
    script = "import sys, jaxserve.weights.resolve, jaxserve.weights.hub; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
