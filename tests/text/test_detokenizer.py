"""Streaming gives the text that decoding at the end would give, as early as it is certain."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.detokenizer import Detokenizer


def cut(draw, items: list) -> list[list]:
    """`items` in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[start:end] for start, end in zip([0, *places], [*places, len(items)], strict=True)]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("at_text_start", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_any_cutting_up_gives_the_same_text(kind, at_text_start, skips, request):
    tokenizer = request.getfixturevalue(kind)
    # Random ids are mostly broken UTF-8; the bytes of real characters in between make it whole again.
    broken = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12)
    whole = st.text(max_size=6).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    pieces = st.lists(st.one_of(broken, whole), max_size=6)

    @settings(max_examples=100)
    @given(st.data(), pieces)
    def check(data, pieces):
        ids = [token_id for piece in pieces for token_id in piece]
        detokenizer = Detokenizer(tokenizer, skips, at_text_start=at_text_start)
        streamed = "".join([detokenizer.push(chunk) for chunk in cut(data.draw, ids)]) + detokenizer.flush()
        assert streamed == tokenizer.decode(ids, skips, at_text_start=at_text_start)

    check()


def test_a_character_comes_with_its_last_byte(byte_level):
    detokenizer = Detokenizer(byte_level)
    emoji = list("👩".encode())
    assert [detokenizer.push([byte]) for byte in emoji] == ["", "", "", "👩"]
    assert detokenizer.flush() == ""


def test_bytes_that_can_begin_nothing_do_not_wait(byte_level):
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push([0xFF]) == "\ufffd"
    assert detokenizer.push([0xE4, 0xBD]) == ""
    assert detokenizer.push([ord("A")]) == "\ufffdA"
    assert detokenizer.push([0xE4]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_skipped_token_does_not_part_the_bytes_around_it(byte_level):
    eos = byte_level.eos_ids[0]
    first, second = "é".encode()
    assert Detokenizer(byte_level).push([first, eos, second]) == "é"
    assert Detokenizer(byte_level, skip_special_tokens=False).push([first, eos]) == "\ufffd<|eos|>"


def test_the_first_space_of_a_reply_is_kept_and_of_a_text_dropped(sentencepiece):
    ids = sentencepiece.encode("is it", add_special_tokens=False)
    assert Detokenizer(sentencepiece).push(ids) == " is it"
    text_start = Detokenizer(sentencepiece, at_text_start=True)
    assert text_start.push([sentencepiece.bos_id]) + text_start.push(ids) == "is it"
    assert text_start.push(ids) == " is it"
