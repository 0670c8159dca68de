"""What is read of compiled programs; and, where libtpu is installed, a slice's programs themselves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_programs_of_a_slice_are_compiled_by_the_tpu_compiler_and_write_the_pool_in_place(tmp_path):
    """In a process of its own, as the command is: this one has its devices already."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    path = tmp_path / "plan.json"
    words = ["--model-path", str(tmp_path), "--topology", "v5e:1x1", "--max-total-tokens", "64k"]
    words += ["--max-running-requests", "8", "--chunked-prefill-size", "64", "--json", str(path)]
    words += ["--prompt-tokens", "256", "--output-tokens", "128"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    subprocess.run([sys.executable, "-m", "jaxserve", "plan", *words], env=environment, check=True)
    (found,) = json.loads(path.read_text())["slices"]
    assert found["fits"]
    assert [program["shape"] for program in found["programs"]] == ["8 rows", "64 tokens"]
    for program in found["programs"]:
        assert program["problem"] == ""
        assert program["alias_bytes"] >= program["state_bytes"]
        assert program["temp_bytes"] < found["kv_bytes_per_device"] / 4
        assert 0 < program["code_bytes"] < 10e6
