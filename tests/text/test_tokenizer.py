"""The tokenizer's contract: every token has bytes of its own, and decoding is nothing but joining them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_any_text_survives_encoding_and_decoding(kind, request):
    tokenizer = request.getfixturevalue(kind)

    @given(st.text())
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, at_text_start=True) == text
        assert tokenizer.encode_batch([text, text], add_special_tokens=False) == [ids, ids]

    check()


def test_a_token_is_its_bytes_even_when_they_are_half_a_character(byte_level, sentencepiece):
    first, second = "é".encode()
    assert [byte_level.token_bytes(id_) for id_ in byte_level.encode("é")] == [
        bytes([first]),
        bytes([second]),
    ]
    assert byte_level.token_text(first) == r"bytes:\xc3"
    assert byte_level.token_text(256) == "<|eos|>"

    space, *rest = sentencepiece.encode("漢", add_special_tokens=False)
    assert sentencepiece.token_bytes(space) == b" "
    assert b"".join(map(sentencepiece.token_bytes, rest)) == "漢".encode()  # no such piece: <0xNN> tokens


def test_a_token_has_a_text_of_its_own_only_if_it_is_whole_characters(byte_level):
    half = byte_level.encode("é")[0]
    for _ in range(2):  # the second time from memory
        assert byte_level.whole_text(ord("a")) == "a"
        assert byte_level.whole_text(half) is None
        assert byte_level.whole_text(byte_level.vocab_size + 5) == ""


def test_special_tokens_are_ids_in_the_text_and_can_be_left_out_of_it(byte_level):
    ids = byte_level.encode("a<|eos|>b")
    assert ids == [ord("a"), 256, ord("b")]
    assert byte_level.decode(ids) == "ab"
    assert byte_level.decode(ids, skip_special_tokens=False) == "a<|eos|>b"
    assert byte_level.special_id_of("<|eos|>") == 256
    assert byte_level.special_id_of("a") is None
    assert (byte_level.bos_token, byte_level.eos_token) == ("<|bos|>", "<|eos|>")


def test_ids_beyond_the_vocabulary_have_no_text(byte_level):
    assert byte_level.vocab_size == 300
    assert byte_level.decode([104, 300, 99_999, 105]) == "hi"
    assert byte_level.decode([299]) == "<|299|>"  # below it, whatever a random model samples can be seen


def test_bytes_that_are_not_utf8_become_replacement_characters(byte_level):
    assert (
        byte_level.decode([0xE4, 0xBD, 0x41, 0xFF])
        == b"\xe4\xbdA\xff".decode("utf-8", "replace")
        == "\ufffdA\ufffd"
    )


def test_the_space_in_front_of_a_text_is_taken_off_at_its_start_only(sentencepiece):
    ids = sentencepiece.encode(" is it", add_special_tokens=False)
    assert sentencepiece.decode(ids, at_text_start=True) == " is it"
    assert sentencepiece.decode(ids) == "  is it"  # as the continuation of a prompt, it is kept


def test_bos_goes_in_front_when_the_model_has_it_so(sentencepiece, byte_level):
    assert sentencepiece.add_bos
    assert sentencepiece.encode("a")[0] == sentencepiece.bos_id == 1
    assert sentencepiece.encode("a", add_special_tokens=False)[0] != 1
    assert not byte_level.add_bos
    assert byte_level.encode("a") == [ord("a")]


def test_a_lone_surrogate_is_the_clients_mistake(byte_level):
    with pytest.raises(InvalidRequestError, match=r"character 2 is a lone surrogate \(U\+D83D\)"):
        byte_level.encode("ab\ud83d")


def test_the_bytes_tokenizer_needs_room_for_its_tokens():
    assert load_tokenizer("bytes").vocab_size == 259
    assert load_tokenizer("bytes", vocab_size=512).eos_ids == (256,)
    with pytest.raises(ConfigError, match=r"at least 259 tokens .*, got 100"):
        byte_tokenizer(100)


def test_a_path_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a \.gguf file or 'bytes', got the file"):
        load_tokenizer(tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_serving_text_needs_neither_transformers_nor_arrays():
    """transformers takes seconds to import, and an HTTP worker must start at once."""
    script = (
        "import sys; from jaxserve.text import chat_template, gguf_tokenizer, output, tokenizer;"
        "tokenizer.load_tokenizer('bytes');"
        "print(sorted({'transformers', 'torch', 'jax', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_fewest_tokens_of_a_text_follow_from_its_length_where_each_byte_is_in_a_token(
    byte_level, sentencepiece
):
    longest = len("<|eos|>")  # also what a byte tokenizer's longest entry, "<|299|>", has
    for text in ("", "a", "é" * 50, "<|eos|>" * 9):
        least = byte_level.count_least(text)
        assert least == -(-len(text.encode()) // longest)
        assert least <= len(byte_level.encode(text))
    assert sentencepiece.count_least("a" * 999) == 0  # its normaliser may shorten a text


def test_a_text_that_a_tokenizer_shortens_has_no_fewest_tokens():
    def count_least(text, **changes):
        backend = byte_tokenizer(300)._backend
        for name, part in changes.items():
            setattr(backend, name, part)
        return Tokenizer(backend, bos_id=None, eos_ids=()).count_least(text)

    dropping = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    removing = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    assert count_least("a" * 70) == 10
    assert count_least("a" * 70, normalizer=normalizers.Strip()) == 0
    assert count_least("a" * 70, pre_tokenizer=dropping) == 0
    assert count_least("a" * 70, pre_tokenizer=removing) == 0
    composing = normalizers.NFC()
    assert count_least("a" * 70, normalizer=composing) == 10
    assert count_least("e\u0301" * 70, normalizer=composing) == 0
