"""One tiny model for the tests of this room, and one cache for its programs."""

from __future__ import annotations

import pytest

from jaxserve.runner.programs import use_compile_cache
from tests.models.forward import load_model
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Of family qwen2, with its head tied to the embedding."""
    folder = tmp_path_factory.mktemp("qwen2")
    write_tiny_checkpoint(folder, "qwen2")
    use_compile_cache(folder / "programs")
    return load_model(folder)
