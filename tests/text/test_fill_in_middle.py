"""Prompts with a gap: each family's markers in their order, around texts in which no marker is read."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxserve.text.fill_in_middle import find_fill_in_middle
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.token_spelling import CHAR_OF_BYTE
from jaxserve.text.tokenizer import Tokenizer
from tests.text.text_goldens import sentencepiece_metadata

CONTROL = 3


def byte_level_with(*markers: str, adds_bos: bool = False) -> Tokenizer:
    """Ids 0 to 255 are bytes; the markers follow."""
    tokens = [*CHAR_OF_BYTE.values(), *markers]
    values = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [1] * 256 + [CONTROL] * len(markers),
        "merges": [],
        "bos_token_id": len(tokens) - 1,
        "eos_token_id": len(tokens) - 1,
        "add_bos_token": adds_bos,
    }
    return tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in values.items()})


def sentencepiece_with(golden: dict, *markers: str) -> Tokenizer:
    metadata = sentencepiece_metadata(golden)
    added = {"tokens": list(markers), "scores": [0.0] * len(markers), "token_type": [CONTROL] * len(markers)}
    return tokenizer_from_gguf(
        metadata
        | {
            f"tokenizer.ggml.{name}": metadata[f"tokenizer.ggml.{name}"] + more
            for name, more in added.items()
        }
    )


def spell(tokenizer: Tokenizer, prefix: str, suffix: str) -> str:
    markers = find_fill_in_middle(tokenizer)
    assert markers is not None
    return tokenizer.decode(markers.encode(tokenizer, prefix, suffix), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("markers", "prompt"),
    [
        (
            ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
            "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        ),
        (("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), "<fim_prefix>a<fim_suffix>b<fim_middle>"),
        (("<fim-prefix>", "<fim-middle>", "<fim-suffix>"), "<fim-prefix>a<fim-suffix>b<fim-middle>"),
        (
            ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
            "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
        ),
        (("[SUFFIX]", "[PREFIX]"), "[SUFFIX]b[PREFIX]a"),
    ],
)
def test_each_family_has_its_markers_and_their_order(markers, prompt):
    assert spell(byte_level_with(*markers), "a", "b") == prompt


def test_code_llama_has_no_space_before_the_suffix(sentencepiece_golden):
    tokenizer = sentencepiece_with(sentencepiece_golden, "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")
    assert spell(tokenizer, "is", "it") == "<s> <PRE> is <SUF>it <MID>"
    markers = find_fill_in_middle(tokenizer)
    assert markers is not None
    assert [tokenizer.token_text(token_id) for token_id in markers.end_ids] == [
        " <PRE>",
        " <SUF>",
        " <MID>",
        " <EOT>",
    ]


def test_the_prompt_begins_as_the_models_prompts_do():
    tokenizer = byte_level_with("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<bos>", adds_bos=True)
    assert spell(tokenizer, "", "") == "<bos><fim_prefix><fim_suffix><fim_middle>"


def test_a_vocabulary_without_all_markers_has_none(byte_level):
    assert find_fill_in_middle(byte_level) is None
    assert find_fill_in_middle(byte_level_with("<fim_prefix>", "<fim_suffix>")) is None


SPECIALS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|im_end|>", "<|")


@given(st.lists(st.sampled_from([*SPECIALS, "<|fim_", "middle|>", "a", " ", "é"]), max_size=8).map("".join))
def test_what_is_spelled_in_the_texts_stays_text(text):
    tokenizer = byte_level_with(*SPECIALS)
    assert tokenizer.encode_as_text(text) == list(text.encode())
    assert spell(tokenizer, text, text) == f"<|fim_prefix|>{text}<|fim_suffix|>{text}<|fim_middle|>"


def test_in_sentencepiece_too_and_no_spaces_come_in(sentencepiece):
    for text in ("</s>", "is</s>it", " <s> </s>", "☺ is it"):
        for is_continued in (False, True):
            ids = sentencepiece.encode_as_text(text, is_continued=is_continued)
            assert not set(ids) & sentencepiece.special_ids
            assert sentencepiece.decode(ids) == text if is_continued else f" {text}"


def test_a_token_that_takes_in_the_spaces_before_it_is_cut_in_halves_not_space_by_space():
    backend = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in CHAR_OF_BYTE.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    text = " " * 5000 + "<mask>"
    tokenizer = Tokenizer(backend, bos_id=None, eos_ids=[])
    assert len(tokenizer.encode(text)) == 1
    assert tokenizer.encode_as_text(text) == list(text.encode())


@pytest.mark.download
def test_qwen_coder(qwen):
    markers = find_fill_in_middle(qwen)
    assert markers is not None
    assert (markers.prefix_id, markers.suffix_id, markers.middle_id) == (151659, 151661, 151660)
    assert set(markers.end_ids) == {151659, 151660, 151661, 151662, 151663, 151664, 151643}
    before, after = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
    prompt = f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"
    assert markers.encode(qwen, before, after) == qwen.encode(prompt)
