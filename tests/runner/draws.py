"""Drawing from the sampler as the step program does; and the softmax that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.runner.batch import slot_params
from jaxserve.runner.device_state import edit_rows
from jaxserve.runner.sampler import edit_logits, read_params, sample
from jaxserve.types import TokenParams

VOCAB_SIZE = 13
PROMPT = (0, 1, 2, 3)
sample_jit = jax.jit(lambda logits_BV, rows, *edits: sample(edit_logits(logits_BV, rows, *edits), rows))


def draw(
    logits_BV: np.ndarray,
    params: Sequence[TokenParams],
    positions: Sequence[int],
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Sampled ids, one a row; row b is in slot b, with the prompt 0, 1, 2, 3 and no output unless given."""
    num_rows = len(params)
    prompts = prompts or [PROMPT] * num_rows
    outputs = outputs or [()] * num_rows
    params_BF = np.stack([slot_params(p, len(prompt)) for p, prompt in zip(params, prompts, strict=True)])
    rows = read_params(jnp.asarray(params_BF), jnp.asarray(positions, jnp.int32))
    edits, bias = zip(
        *(
            edit_rows(VOCAB_SIZE, p, list(prompt), list(output))
            for p, prompt, output in zip(params, prompts, outputs, strict=True)
        ),
        strict=True,
    )
    slot_B = jnp.arange(num_rows, dtype=jnp.int32)
    wide_BV = jnp.asarray(np.broadcast_to(logits_BV, (num_rows, VOCAB_SIZE)), jnp.float32)
    return np.asarray(sample_jit(wide_BV, rows, slot_B, jnp.asarray(edits), jnp.asarray(bias)))


def softmax(logits_V: np.ndarray) -> np.ndarray:
    """In the precision of its argument; -inf gets 0."""
    weight_V = np.exp(logits_V - logits_V.max())
    return weight_V / weight_V.sum()
