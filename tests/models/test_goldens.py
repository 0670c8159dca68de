"""The families' logits against transformers, on tiny random models; see tests/goldens/manifest.json."""

from __future__ import annotations

import pytest

from tests.goldens.read import TINY_BF16_PROMPT_LENGTH, read_manifest, read_tiny_goldens, relative_error
from tests.models.forward import compute_logits, load_model
from tests.tiny import TINY_NAMES, write_tiny_checkpoint

F32_TOLERANCE = read_manifest()["tolerances"]["float32_relative_error"]


@pytest.fixture(scope="module", params=TINY_NAMES)
def tiny(request, tmp_path_factory):
    """The name of a tiny model and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_checkpoint(folder, request.param)
    return request.param, folder


def test_float32_logits_agree_at_every_position(tiny):
    name, folder = tiny
    model = load_model(folder)
    for golden in read_tiny_goldens(name).values():
        assert relative_error(compute_logits(model, golden.prompt_ids), golden.logits) <= F32_TOLERANCE


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_logits_do_not_depend_on_how_the_prompt_is_cut(tiny, chunk_tokens):
    name, folder = tiny
    golden = read_tiny_goldens(name)[33]
    logits = compute_logits(load_model(folder), golden.prompt_ids, chunk_tokens)
    assert relative_error(logits, golden.logits) <= F32_TOLERANCE


def test_bfloat16_logits_are_as_close_to_float32_as_those_of_torch(tiny):
    """Both sides round, at different places: ours keeps the residual stream in float32."""
    name, folder = tiny
    golden = read_tiny_goldens(name)[TINY_BF16_PROMPT_LENGTH]
    assert golden.bf16_logits is not None
    logits = compute_logits(load_model(folder, dtype="bfloat16"), golden.prompt_ids)
    of_torch = relative_error(golden.bf16_logits, golden.logits)
    assert relative_error(logits, golden.logits) <= 1.25 * of_torch


def test_int8_is_no_further_from_float32_than_three_times_what_bfloat16_is(tiny):
    # Random weights in odd widths, of which runs of two to four channels are mixed: the hardest case for it.
    name, folder = tiny
    golden = read_tiny_goldens(name)[TINY_BF16_PROMPT_LENGTH]
    assert golden.bf16_logits is not None
    logits = compute_logits(load_model(folder, quantization="int8"), golden.prompt_ids)
    assert relative_error(logits, golden.logits) <= 3 * relative_error(golden.bf16_logits, golden.logits)
