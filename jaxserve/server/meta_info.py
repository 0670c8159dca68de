"""meta_info: the counts, times and logprobs that /generate tells of each output.

Chat and completions add it for `return_meta_info`. Knows nothing of texts.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import UNSET

from jaxserve.server.generation import Run
from jaxserve.server.logprobs import NativeLogprobs
from jaxserve.server.pieces import Piece
from jaxserve.server.replies import MetaInfo, render_finish
from jaxserve.server.state import ServedWeights
from jaxserve.text.tokenizer import Tokenizer


class MetaInfoWriter:
    """Describes the pieces of one run, each of which must be new.

    `has_text` puts each token's text into its logprob entries. `is_cumulative`: see NativeLogprobs.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        weights: ServedWeights,
        *,
        has_text: bool = False,
        is_cumulative: bool = False,
    ):
        self._run = run
        self._weights = weights
        self._logprobs = [
            NativeLogprobs(
                sequence, tokenizer, has_text=has_text, is_cumulative=is_cumulative, is_sealed=True
            )
            for sequence in run.choices
        ]

    def describe(self, piece: Piece) -> MetaInfo:
        logprobs: dict[str, Any] = self._logprobs[piece.index].render(piece)
        return MetaInfo(
            id=self._run.choices[piece.index].rid,
            finish_reason=render_finish(piece.finish, piece.num_output_tokens),
            prompt_tokens=piece.num_prompt_tokens,
            weight_version=self._weights.version,
            total_retractions=piece.num_retractions,
            num_retractions=piece.num_retractions,
            reasoning_tokens=0,
            completion_tokens=piece.num_output_tokens,
            cached_tokens=piece.num_cached_tokens,
            cached_tokens_details={"device": piece.num_cached_tokens, "host": 0},
            dp_rank=None,
            e2e_latency=self._run.elapsed_s,
            response_sent_to_client_ts=time.time(),
            cumulative_logprob=UNSET if piece.cumulative_logprob is None else piece.cumulative_logprob,
            **logprobs,
            **_describe_drafts(piece),
        )


def _describe_drafts(piece: Piece) -> dict[str, Any]:
    """What speculation did for the request, if it guessed anything; a step is a pass of the model."""
    if not piece.num_drafted:
        return {}
    num_steps = max(piece.num_output_tokens - 1 - piece.num_accepted, 1)  # the prefill gives the first token
    return {
        "spec_verify_ct": num_steps,
        "spec_accept_length": piece.num_output_tokens / num_steps,
        "spec_accept_rate": piece.num_accepted / piece.num_drafted,
        "spec_accept_token_num": piece.num_accepted,
        "spec_draft_token_num": piece.num_drafted,
    }
