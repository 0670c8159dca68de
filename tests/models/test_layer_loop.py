"""Steps of many tokens in two halves: where a batch is cut, and that its logits stay the same."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.interface import StepBatch
from jaxserve.models.layer_loop import cut_batch
from jaxserve.weights.placement import make_placement
from tests.goldens.read import read_tiny_goldens
from tests.models.forward import compute_logits, load_model
from tests.tiny import GGUF_NAMES, write_tiny_checkpoint


def describe_chunks(batch: StepBatch) -> list[tuple[int, int, int]]:
    """Of each chunk the first token, the length, and how many tokens it attends to with its last."""
    fields = (batch.chunk_token_C, batch.chunk_len_C, batch.chunk_kv_len_C)
    return list(zip(*(np.asarray(field).tolist() for field in fields), strict=True))


def test_a_chunk_that_is_cut_has_its_first_part_as_context():
    """Two decode rows, then chunks of 3, 4 and 2 tokens behind 5, 10 and 0 others, one of padding: cut in the
    middle of the second."""
    num_tokens = 12
    index_T = jnp.arange(num_tokens, dtype=jnp.int32)
    batch = StepBatch(
        token_ids_T=index_T,
        positions_T=index_T + 100,
        write_index_T=index_T + 200,
        rope=(index_T[:, None] + 300, index_T[:, None] + 400),
        decode_slot_R=jnp.array([7, 8]),
        decode_kv_len_R=jnp.array([20, 30]),
        chunk_slot_C=jnp.array([0, 1, 2, 9]),
        chunk_token_C=jnp.array([2, 5, 9, 0]),
        chunk_len_C=jnp.array([3, 4, 2, 0]),
        chunk_kv_len_C=jnp.array([8, 14, 2, 0]),
        table_XW=jnp.zeros((10, 4), jnp.int32),
        sample_token_B=jnp.zeros(6, jnp.int32),
    )
    first, second = cut_batch(batch, 7)
    assert describe_chunks(first) == [(2, 3, 8), (5, 2, 12), (0, 0, 0), (0, 0, 0)]
    assert describe_chunks(second) == [(0, 0, 0), (0, 2, 14), (2, 2, 2), (0, 0, 0)]
    assert first.decode_kv_len_R.tolist() == [20, 30]
    assert second.decode_slot_R.shape == second.decode_kv_len_R.shape == (0,)
    for part, here in ((first, slice(0, 7)), (second, slice(7, 12))):
        assert part.rope is not None
        for own_T, all_T in zip(part[:3], batch[:3], strict=True):
            np.testing.assert_array_equal(own_T, all_T[here])
        np.testing.assert_array_equal(part.rope[1][:, 0], index_T[here] + 400)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("chunk_tokens", [33, 20])
@pytest.mark.parametrize("name", GGUF_NAMES)
def test_logits_of_two_halves_are_those_of_the_whole(tmp_path, name, chunk_tokens, num_devices):
    """Of 33 tokens, or of 20 and of 13 that attend to them."""
    write_tiny_checkpoint(tmp_path, name)
    placement = make_placement(jax.devices()[:num_devices])
    golden = read_tiny_goldens(name)[33]
    model = load_model(tmp_path, placement=placement)
    model.kernels = replace(model.kernels, least_halved_tokens=2)
    logits = compute_logits(model, golden.prompt_ids, chunk_tokens, placement)
    np.testing.assert_allclose(logits, golden.logits, atol=2e-4)
