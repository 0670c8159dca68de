"""Tokenizers out of GGUF metadata: the same ids as the reference implementations, or an error that says why.

The golden ids are made by tests/text/make_goldens.py: those of the real files by transformers, those of the
small SentencePiece vocabulary by SentencePiece itself.
"""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import WeightError
from jaxserve.text.chat_template import load_chat_template
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.token_spelling import CHAR_OF_BYTE
from tests.text.text_goldens import read_text_golden, sentencepiece_metadata

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def byte_level_metadata(
    pre: str | None, merges: tuple[str, ...] = (), **changes: object
) -> dict[str, object]:
    """A GPT-2-like vocabulary: the 256 bytes, what `merges` make, three control tokens, a user-defined
    one and one that pads."""
    ordinary = [*CHAR_OF_BYTE.values(), *(merge.replace(" ", "") for merge in merges)]
    values = {
        "model": "gpt2",
        "tokens": [*ordinary, *SPECIALS, "<tool_call>", "[PAD0]"],
        "token_type": [NORMAL] * len(ordinary) + [CONTROL] * 3 + [USER_DEFINED, UNUSED],
        "merges": list(merges),
        "bos_token_id": len(ordinary),
        "eos_token_id": len(ordinary) + 2,
        **({} if pre is None else {"pre": pre}),
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def pieces(pre: str | None, merges: tuple[str, ...], text: str) -> list[str]:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre, merges))
    return [tokenizer.token_text(id_) for id_ in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("qwen2", ["1", "2", "3", "4"]),  # every digit on its own
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),  # at most three together
        ("gpt-2", ["1234"]),  # all together
        ("default", ["123", "4"]),
        (None, ["123", "4"]),
    ],
)
def test_each_pre_tokenizer_groups_digits_its_own_way(pre, expected):
    assert pieces(pre, ("1 2", "12 3", "123 4"), "1234") == expected


def test_smollm_splits_digits_before_it_splits_spaces():
    """GPT-2's rule alone would leave the last space to the digit, as transformers' GGUF loader does."""
    assert pieces("smollm", ("Ġ Ġ",), "a  1") == ["a", "  ", "1"]
    assert pieces("gpt-2", ("Ġ Ġ",), "a  1") == ["a", " ", " ", "1"]


def test_qwen2_composes_characters_first():
    assert pieces("qwen2", ("Ã ©",), "e\u0301") == ["é"]
    assert pieces("gpt-2", ("Ã ©",), "é") == ["é"]
    assert pieces("gpt-2", ("Ã ©",), "e\u0301")[0] == "e"


def test_llama3_takes_a_word_that_is_an_entry_without_merging_and_adds_bos():
    """ "abc" cannot be reached by its merges: a+b is never made."""
    metadata = byte_level_metadata("llama-bpe", ("b c", "a bc"))
    metadata["tokenizer.ggml.merges"] = ["b c"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert [tokenizer.token_text(id_) for id_ in tokenizer.encode("abc")] == ["<|endoftext|>", "abc"]
    assert tokenizer.add_bos


def test_the_file_decides_on_bos_if_it_says():
    assert not tokenizer_from_gguf(byte_level_metadata("llama-bpe", add_bos_token=False)).add_bos
    assert tokenizer_from_gguf(byte_level_metadata("qwen2", add_bos_token=True)).add_bos
    assert not tokenizer_from_gguf(byte_level_metadata("qwen2")).add_bos


def test_token_types_say_what_is_special_what_is_whole_and_what_is_nothing():
    tokenizer = tokenizer_from_gguf(byte_level_metadata("qwen2"))
    ids = tokenizer.encode("<|im_start|>a<tool_call>[PAD0]")
    assert ids[:3] == [257, ord("a"), 259]
    assert tokenizer.decode(ids) == "a<tool_call>[PAD0]"
    assert tokenizer.special_ids == {256, 257, 258}
    assert (tokenizer.vocab_size, tokenizer.token_bytes(260)) == (261, b"")  # padding: never made, no text


def test_every_known_end_of_turn_ends_generation():
    """The file names one; a model that writes <|endoftext|> instead would otherwise never stop."""
    tokenizer = tokenizer_from_gguf(
        byte_level_metadata("qwen2"), generation_config={"eos_token_id": [258, 9]}
    )
    assert tokenizer.eos_ids == (258, 256, 9)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer_from_gguf(byte_level_metadata("qwen2", eot_token_id=5)).eos_ids == (258, 5, 256)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian'.*known are .*qwen2.*--tokenizer-path"),
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'.*--tokenizer-path"),
        ({"tokens": None}, "carries no tokenizer"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        (
            {"merges": ["a b"], "tokens": ["a", "b"], "token_type": None},
            r"merges\[0\] is 'a b', which does not",
        ),
        ({"token_type": [1, 1]}, "token_type has 2 values for 261 tokens"),
        ({"eos_token_id": 900}, r"eos_token_id must be a token id in \[0, 261\), got 900"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(changes, sentence):
    with pytest.raises(WeightError, match=sentence):
        tokenizer_from_gguf(
            byte_level_metadata("qwen2") | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
        )


def test_sentencepiece_vocabularies_encode_as_sentencepiece_does(sentencepiece, sentencepiece_golden):
    for case in sentencepiece_golden["encoded"]:
        ids = sentencepiece.encode(case["text"], add_special_tokens=False)
        assert ids == case["ids"], case["text"]
        assert sentencepiece.decode(ids, at_text_start=True) == case["decoded"] == case["text"]


def test_sentencepiece_control_tokens_are_special_and_user_defined_ones_whole(sentencepiece):
    ids = sentencepiece.encode("<s>a<tool_call>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 3)
    assert sentencepiece.decode(ids) == " a<tool_call>"


def test_without_a_space_prefix_nothing_is_put_in_front(sentencepiece_golden):
    metadata = sentencepiece_metadata(sentencepiece_golden) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("is it", add_special_tokens=False)
    assert tokenizer.decode(ids) == "is it"
    assert not tokenizer.strips_first_space


@pytest.mark.download
@pytest.mark.parametrize(
    ("fixture", "golden_name"),
    [("qwen", "qwen2.5-coder-0.5b-instruct"), ("smollm2", "smollm2-135m-instruct")],
)
def test_the_real_files_encode_as_transformers_does(fixture, golden_name, request):
    tokenizer = request.getfixturevalue(fixture)
    golden = read_text_golden(golden_name)
    for case in golden["encoded"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    chat = golden["chat"]
    prompt = load_chat_template(None, tokenizer).render(chat["messages"])
    assert prompt == chat["text"]
    assert tokenizer.encode(prompt, add_special_tokens=False) == chat["ids"]


@pytest.mark.download
def test_the_quickstarts_counts_hold_for_qwen(qwen):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert len(qwen.encode(load_chat_template(None, qwen).render(messages), add_special_tokens=False)) == 36
    assert len(qwen.encode("The capital of France is")) == 5
    assert qwen.eos_ids == (151645, 151643)
    assert not qwen.add_bos


@pytest.mark.download
def test_any_text_survives_qwens_tokenizer(qwen):
    @given(st.text())
    def check(text):
        assert qwen.decode(qwen.encode(text), skip_special_tokens=False) == unicodedata.normalize("NFC", text)

    check()
