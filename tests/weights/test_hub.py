"""Hub models against a small hub on loopback: download, cache, interruptions, and errors with remedies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.models import qwen2
from jaxserve.weights.loader import load_params
from jaxserve.weights.resolve import ModelFiles, resolve_model
from tests import tiny
from tests.weights.fake_hub import FakeHub, serve_fake_hub
from tests.weights.gguf_files import write_model

REPO_ID = "Qwen/Tiny-Instruct"


def ignore_progress(message: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tiny.write_tiny_checkpoint(tmp_path / "served", "qwen2", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "consolidated.safetensors").write_bytes(b"never fetched")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve_fake_hub(REPO_ID, folder) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def resolve(cache: Path, model_path: str = REPO_ID, **options: str) -> ModelFiles:
    return resolve_model(model_path, download_dir=str(cache), on_progress=ignore_progress, **options)


def test_a_hub_model_is_downloaded_and_loads(hub: FakeHub, cache: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    files = resolve_model(
        REPO_ID, download_dir=str(cache), on_progress=lambda *progress: told.append(progress)
    )
    assert files.kind == "safetensors"
    assert files.model_id == REPO_ID
    assert files.hf_config == tiny.tiny_config("qwen2")
    assert files.generation_config["eos_token_id"] == list(tiny.EOS_IDS)
    assert sorted(path.name for path in files.local_dir.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    wanted_bytes = sum(path.stat().st_size for path in files.local_dir.iterdir())
    assert told[-1] == (f"Downloading {REPO_ID}", wanted_bytes, wanted_bytes)
    specs = qwen2.param_specs(qwen2.Config.from_hf(files.hf_config))
    params = load_params(files, specs, dtype="float32", on_progress=ignore_progress)
    np.testing.assert_array_equal(params["embed_VD"], tiny.tiny_tensor("qwen2", "model.embed_tokens.weight"))


def test_the_second_start_downloads_nothing_and_needs_no_hub(hub: FakeHub, cache: Path) -> None:
    first = resolve(cache)
    num_requests = len(hub.requests)
    assert resolve(cache) == first
    assert not any("/resolve/" in line for line in hub.requests[num_requests:])
    hub.is_down = True
    assert resolve(cache) == first


def test_the_cache_serves_offline_whatever_the_case_of_the_id(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(cache, "qwen/tiny-instruct")  # the hub redirects to its own spelling
    assert "models--Qwen--Tiny-Instruct" in str(first.local_dir)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    num_requests = len(hub.requests)
    assert resolve(cache, "qwen/tiny-instruct") == first
    assert len(hub.requests) == num_requests


def test_a_connection_cut_half_way_is_an_error_and_the_next_start_works(hub: FakeHub, cache: Path) -> None:
    hub.cut_file = "model-00002-of-00002.safetensors"
    with pytest.raises(WeightError, match=r"Tiny-Instruct could not be downloaded.*start again"):
        resolve(cache)
    hub.is_down = True  # half a model in the cache is not taken for a model
    # Newer releases of huggingface_hub know by themselves; with older ones the shard index tells.
    with pytest.raises(WeightError, match=r"holds no whole copy|lacks 1 of the 2 shards"):
        resolve(cache)
    hub.cut_file, hub.is_down = None, False
    files = resolve(cache)
    assert [path.stat().st_size for path in files.files] == [
        (hub.folder / path.name).stat().st_size for path in files.files
    ]


def test_only_the_config_is_fetched_for_made_up_weights(hub: FakeHub, cache: Path) -> None:
    files = resolve(cache, load_format="dummy")
    assert (files.kind, files.files) == ("dummy", ())
    assert not any(line.endswith(".safetensors") for line in hub.requests)


def test_one_gguf_file_of_a_repository(hub: FakeHub, cache: Path) -> None:
    write_model(hub.folder / "tiny-q8.gguf", tiny.tiny_config("qwen2"), tiny.tiny_tensors("qwen2"))
    (hub.folder / "other.gguf").write_bytes(b"never fetched")
    files = resolve(cache, f"{REPO_ID}:tiny-q8.gguf")
    assert files.kind == "gguf"
    assert [path.name for path in files.files] == ["tiny-q8.gguf"]
    assert hub.downloads_of("other.gguf") == 0
    assert resolve(cache, f"{REPO_ID}:tiny-q8.gguf") == files
    (hub.folder / "config.json").unlink()
    with pytest.raises(WeightError, match=rf"name one: {REPO_ID}:other\.gguf, {REPO_ID}:tiny-q8\.gguf"):
        resolve(cache)


@pytest.mark.parametrize(
    ("model_path", "revision", "sentence"),
    [
        ("Qwen/No-Such-Model", None, r"no model 'Qwen/No-Such-Model' on the hub at http://127.*HF_TOKEN"),
        (REPO_ID, "v9", r"has no revision 'v9'"),
        (f"{REPO_ID}:none.gguf", None, r"has no none\.gguf"),
        ("a--b/c", None, "neither a path on this machine nor a hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    hub: FakeHub, cache: Path, model_path: str, revision: str | None, sentence: str
) -> None:
    with pytest.raises(WeightError, match=sentence):
        resolve_model(model_path, revision=revision, download_dir=str(cache), on_progress=ignore_progress)


def test_a_gated_model_says_how_to_get_in(hub: FakeHub, cache: Path) -> None:
    hub.gated = True
    with pytest.raises(WeightError, match=r"restricted.*HF_TOKEN.*pypi:smollm2"):
        resolve(cache)


def test_no_network_and_offline_mode_name_the_ways_out(
    cache: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port}")
    with pytest.raises(
        WeightError, match=r"could not be downloaded.*HF_ENDPOINT.*--model-path DIRECTORY.*pypi:"
    ):
        resolve(cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightError, match=r"HF_HUB_OFFLINE is set.*--model-path DIRECTORY"):
        resolve(cache)
