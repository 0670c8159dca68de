"""peer_generation.py against a stand-in for transformers, which keeps what runs batches as the real does."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class KeepingModel:
    """Its first call decides how many sequences may run at once, until that is destroyed."""

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=100)
        self.most_at_once = 0
        self.told: list[tuple[int, int]] = []  # sequences, and how many of them at once

    def generate_batch(
        self, prompts: list[list[int]], *, generation_config, continuous_batching_config, **_: Any
    ):
        assert continuous_batching_config["allow_block_sharing"] is False
        held = continuous_batching_config["num_blocks"] * continuous_batching_config["block_size"]
        assert held > sum(len(prompt) + generation_config["max_new_tokens"] for prompt in prompts)
        self.most_at_once = self.most_at_once or len(prompts)
        self.told.append((len(prompts), min(len(prompts), self.most_at_once)))
        new = SimpleNamespace(generated_tokens=[0] * generation_config["max_new_tokens"])
        return dict.fromkeys(range(len(prompts)), new)

    def destroy_cached_continuous_batching_manager(self) -> None:
        self.most_at_once = 0


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    def draw(most: int, shape: tuple[int, int]) -> Any:
        return SimpleNamespace(tolist=lambda: [[0] * shape[1] for _ in range(shape[0])])

    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), randint=draw, __version__="0")
    logging = SimpleNamespace(disable_progress_bar=lambda: None)
    transformers = SimpleNamespace(
        __version__="0",
        utils=SimpleNamespace(logging=logging),
        GenerationConfig=dict,
        ContinuousBatchingConfig=dict,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.delitem(sys.modules, "peer_generation", raising=False)
    return importlib.import_module("peer_generation")


def test_many_sequences_run_at_once_though_one_was_measured_before(script, monkeypatch, capsys):
    model = KeepingModel()
    monkeypatch.setattr(script, "make_model", lambda *_: model)
    monkeypatch.setattr(script, "generate_padded", lambda *_: None)
    words = ["peer_generation.py", "--model-path", "x", "--sequences", "1", "8", "--prompt-tokens", "300"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("failed") for row in rows] == [None] * 4
    assert set(model.told) == {(1, 1), (8, 8)}
