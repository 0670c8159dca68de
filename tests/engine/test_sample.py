"""/v1/sample on a real tiny model: every choice is the log-softmax of a plain forward pass at its row.

With the prompt in chunks, with its beginning in the prefix cache, alone and among other requests.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from jaxserve.metrics import ServerMetrics
from jaxserve.server.generation import Generator
from jaxserve.server.sample import SampleReply, answer, make_question
from jaxserve.server.settings import ServerSettings, TextTools
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import byte_tokenizer
from tests.engine.running_engine import RunningEngine, start_tiny_engine, token_ids
from tests.engine.test_engine import run
from tests.models.forward import compute_logits, load_model
from tests.tiny import TINY_CONFIGS, write_tiny_checkpoint

NAME = "qwen2"
CHUNK_TOKENS = 32
NUM_PAGES = 1024 // 8  # of start_tiny_engine
TOLERANCE = 2e-4  # float32, summed in another order
MANY = "y" + "xxxz" * 60  # 180 matches of "x", in 8 chunks
PROMPTS = {
    MANY: "x",
    "Question:<emb_0> is it? Answer:<emb_0>": "<emb_0>",
    "y" + "xxxz" * 30 + "and another end x": "x",
}
TOKENIZER = byte_tokenizer(TINY_CONFIGS[NAME]["vocab_size"])
SETTINGS = ServerSettings(served_model_name="tiny", model_path="tiny")


def make_generator(engine: RunningEngine) -> Generator:
    client = engine.client
    metrics = ServerMetrics("tiny", client.engines)
    return Generator(
        client, TextTools(tokenizer=TOKENIZER, chat_template=ChatTemplate(None, "", "")), SETTINGS, metrics
    )


async def sample(generator: Generator, prompt: str, literal: str, num_top: int = 5) -> SampleReply:
    return await answer(make_question(prompt, literal, num_top, SETTINGS), generator, TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("sample") / NAME, NAME)


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, np.ndarray]:
    """By prompt: the log-probabilities at the row before each match, [matches, vocabulary]."""
    model = load_model(folder)
    return {prompt: expect(model, prompt, literal) for prompt, literal in PROMPTS.items()}


def expect(model, prompt: str, literal: str) -> np.ndarray:
    logits = compute_logits(model, list(prompt.encode())).astype(np.float64)
    pieces = prompt.split(literal)[:-1]
    starts = np.cumsum([len(piece) for piece in pieces]) + len(literal) * np.arange(len(pieces))
    rows = logits[starts - 1]
    return rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)


def check(reply: SampleReply, logprobs: np.ndarray, num_top: int = 5) -> None:
    assert len(reply.choices) == len(logprobs)
    for index, (choice, row) in enumerate(zip(reply.choices, logprobs, strict=True)):
        assert (choice.index, choice.finish_reason) == (index, "selector_match")
        assert choice.logprobs.token_ids == np.argsort(-row)[:num_top].tolist()
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs, np.sort(row)[::-1][:num_top], atol=TOLERANCE
        )
        assert choice.text == choice.logprobs.tokens[0] == TOKENIZER.token_text(choice.logprobs.token_ids[0])


def test_choices_are_the_rows_of_a_forward_pass_in_chunks_and_behind_a_cached_prefix(folder, expected):
    async def scenario():
        async with start_tiny_engine(folder, NAME, chunked_prefill_size=CHUNK_TOKENS) as engine:
            generator = make_generator(engine)
            for _ in range(2):  # the second time what comes before a first match is in the prefix cache
                for prompt, literal in PROMPTS.items():
                    check(await sample(generator, prompt, literal), expected[prompt])
            assert engine.client.stats.num_cached_tokens > 0
            check(await sample(generator, MANY, "x", num_top=1), expected[MANY], num_top=1)
            assert engine.client.stats.num_generated_tokens == 0
            await engine.wait_until_idle()
            assert engine.client.stats.num_free_pages == NUM_PAGES

    run(scenario())


def test_among_other_requests_nothing_changes_for_anybody(folder, expected):
    async def scenario():
        async with start_tiny_engine(folder, NAME, chunked_prefill_size=CHUNK_TOKENS) as engine:
            generator = make_generator(engine)
            prompts = [[5 + index] * 20 for index in range(4)]
            alone = [
                token_ids(await engine.generate(f"a{i}", p, max_new_tokens=40)) for i, p in enumerate(prompts)
            ]
            writing = [
                asyncio.create_task(engine.generate(f"b{i}", prompt, max_new_tokens=40))
                for i, prompt in enumerate(prompts)
            ]
            questions = [*PROMPTS.items()] * 3
            replies = await asyncio.gather(*(sample(generator, *question) for question in questions))
            for (prompt, _), reply in zip(questions, replies, strict=True):
                check(reply, expected[prompt])
            assert [token_ids(await task) for task in writing] == alone

    run(scenario())
