"""Which row stands for a match: the one before the first token that covers the first byte of the match."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxserve.errors import InvalidRequestError
from jaxserve.text.selectors import locate_literal
from jaxserve.text.token_spelling import CHAR_OF_BYTE
from jaxserve.text.tokenizer import Tokenizer
from tests.text.text_goldens import read_text_golden


def spell_targets(tokenizer: Tokenizer, text: str, literal: str) -> list[bytes | None]:
    """For each match the bytes of the token whose place its row predicts."""
    found = locate_literal(tokenizer, text, literal)
    return [None if row is None else tokenizer.token_bytes(found.prompt_ids[row + 1]) for row in found.rows]


def make_tokenizer(entries: list[str], merges: list[tuple[str, str]], **parts: object) -> Tokenizer:
    """A byte-level vocabulary: the 256 bytes, then `entries`, then the special <s>, which begins a prompt."""
    vocab = {char: byte for byte, char in CHAR_OF_BYTE.items()}
    vocab |= {entry: 256 + order for order, entry in enumerate(entries)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    bos_ids = backend.encode("<s>").ids
    return Tokenizer(backend, bos_id=bos_ids[0], eos_ids=[], prefix_ids=bos_ids)


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Joins ":" with a "<" behind it, and the last byte of "é" with an "x": matches begin inside tokens."""
    ends_of_e = CHAR_OF_BYTE["é".encode()[1]]
    return make_tokenizer([":<", ends_of_e + "x", "ĠĠ"], [(":", "<"), (ends_of_e, "x"), ("Ġ", "Ġ")])


def test_one_token_a_byte_the_row_is_the_byte_before(byte_level):
    found = locate_literal(byte_level, "ab<x>cd<x>", "<x>")
    assert found.prompt_ids == list(b"ab<x>cd<x>")
    assert found.rows == [1, 6]


def test_a_match_that_is_the_first_thing_the_model_sees_has_no_row(byte_level, merging):
    assert locate_literal(byte_level, "aba", "a").rows == [None, 1]
    assert locate_literal(merging, "aba", "a").rows == [0, 2]  # here <s> comes before it


def test_matches_do_not_overlap_and_are_taken_from_the_left(byte_level):
    assert locate_literal(byte_level, "xaaaaa", "aa").rows == [0, 2]
    assert locate_literal(byte_level, "xyz", "a").rows == []
    assert locate_literal(byte_level, "xyz", "\ud83d").rows == []


def test_a_match_that_begins_inside_a_token_is_where_that_token_stands(merging):
    assert spell_targets(merging, "Q:<e> <e>", "<e>") == [b":<", b"<"]
    # "é" is two bytes, the second in one token with x: both "é" and "x" begin at the token that has their
    # own first byte.
    first, second = "é".encode()
    assert spell_targets(merging, "aéx", "é") == [bytes([first])]
    assert spell_targets(merging, "aéx", "x") == [bytes([second]) + b"x"]
    assert spell_targets(merging, "é漢字 漢字", "漢字") == [b"\xe6", b"\xe6"]
    assert locate_literal(merging, "é漢字 漢字", "漢字").rows == [2, 9]


def test_special_tokens_can_be_matched_whole_and_by_a_part_of_their_name(merging):
    assert spell_targets(merging, "a<s>b<s>", "<s>") == [b"<s>", b"<s>"]
    assert locate_literal(merging, "a<s>b<s>", "s>").rows == [1, 3]
    assert locate_literal(merging, "a<s>b<s>", "b").rows == [2]


def test_sentencepieces_first_space_is_none_of_the_text(sentencepiece):
    """It stands in front of a text, as a token or inside one, and again after each special token."""
    whole = locate_literal(sentencepiece, "is it</s>is", "is")
    assert [sentencepiece.token_bytes(token_id) for token_id in whole.prompt_ids] == [
        *(b"<s>", b" is", b" it", b"</s>", b" is")
    ]
    assert whole.rows == [0, 3]
    apart = locate_literal(sentencepiece, "漢</s>漢", "漢")
    assert apart.rows == [1, 6]  # <s> " " E6 BC A2 </s> " " E6 BC A2
    assert spell_targets(sentencepiece, " is", " ") == [b"  "]
    assert spell_targets(sentencepiece, " is", "is") == [b"is"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "merging"])
def test_rows_agree_with_the_bytes_of_the_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    num_before = len(tokenizer.encode("")) if kind != "byte_level" else 0

    @given(
        st.text(alphabet="ab: <xé漢👍\n", max_size=30), st.text(alphabet="a <é漢:", min_size=1, max_size=2)
    )
    def check(text, literal):
        found = locate_literal(tokenizer, text, literal)
        assert found.prompt_ids == tokenizer.encode(text)
        tokens = [tokenizer.token_bytes(token_id) for token_id in found.prompt_ids[num_before:]]
        num_extra = sum(map(len, tokens)) - len(text.encode())
        ends = [end - num_extra for end in itertools.accumulate(map(len, tokens))]
        starts, start = [], text.find(literal)
        while start >= 0:
            starts.append(len(text[:start].encode()))
            start = text.find(literal, start + len(literal))
        covering = [next(place for place, end in enumerate(ends) if end > start) for start in starts]
        rows = [num_before + place - 1 for place in covering]
        assert found.rows == [None if row < 0 else row for row in rows]

    check()


def test_a_tokenizer_that_composes_characters_finds_what_the_client_sent():
    """The text is matched as it came: "e" and an accent, which the tokenizer makes into one character."""
    tokenizer = make_tokenizer([], [], normalizer=normalizers.NFC())
    apart, composed = "caf\u0065\u0301 <x> caf\u0065\u0301<x>", "café <x> café<x>"
    assert locate_literal(tokenizer, apart, "<x>") == locate_literal(tokenizer, composed, "<x>")
    assert locate_literal(tokenizer, apart, "é").rows == []
    assert (
        locate_literal(tokenizer, apart, "\u0065\u0301").rows == locate_literal(tokenizer, composed, "é").rows
    )
    assert spell_targets(tokenizer, apart, "\u0301") == [b"\xa9", b"\xa9"]  # the end of "é"


def test_spans_without_their_spaces_are_made_whole_again():
    """Llama 3's tokenizer.json trims the spaces off its spans; a match may begin with one all the same."""
    trims = processors.ByteLevel(trim_offsets=True)
    entries, merges = ["Ġa"], [("Ġ", "a")]
    trimmed = make_tokenizer(entries, merges, post_processor=trims, normalizer=normalizers.NFC())
    assert spell_targets(trimmed, "x a", " ") == [b" a"]
    assert spell_targets(trimmed, "e\u0301 a a", " a") == [b" a", b" a"]


def test_words_in_lower_case_are_found_where_they_were():
    vocab = {"[UNK]": 0, "the": 1, "quick": 2, "##er": 3, "fox": 4, ".": 5}
    tokenizer = make_tokenizer([], [], normalizer=normalizers.Lowercase())
    assert locate_literal(tokenizer, "ÀB<X>", "<X>").rows == [3]
    wordpiece = make_tokenizer(
        [],
        [],
        model=models.WordPiece(vocab=vocab, unk_token="[UNK]"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    assert spell_targets(wordpiece, "The  QUICKER Fox. 漢", "QUICK") == [b" quick"]
    assert spell_targets(wordpiece, "The  QUICKER Fox. 漢", "ER") == [b"er"]
    assert spell_targets(wordpiece, "The  QUICKER Fox. 漢", " Fox") == [b" fox"]
    assert spell_targets(wordpiece, "The  QUICKER Fox. 漢", "漢") == [b" [UNK]"]
    assert spell_targets(wordpiece, "fox \x00", "\x00") == [None]  # dropped, and nothing comes after it


def test_hundreds_of_matches_in_a_long_text(sentencepiece):
    text = "what is 漢 in <emb_0> it? " * 2000
    found = locate_literal(sentencepiece, text, "<emb_0>")
    assert len(found.rows) == 2000
    line = text[: text.index("?") + 2]
    num_tokens = len(sentencepiece.encode(line * 2)) - len(sentencepiece.encode(line))
    assert found.rows[1:] == [row + num_tokens for row in found.rows[:-1] if row is not None]


def test_invalid_unicode_is_the_clients_mistake(byte_level):
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        locate_literal(byte_level, "a\ud83da", "a")


@pytest.mark.download
@pytest.mark.parametrize(
    ("fixture", "golden"),
    [("qwen", "qwen2.5-coder-0.5b-instruct"), ("smollm2", "smollm2-135m-instruct")],
)
def test_real_tokenizers_on_the_documents_prompt_and_on_awkward_ones(fixture, golden, request):
    tokenizer = request.getfixturevalue(fixture)
    text = "问题:<emb_0> 是否命中。结论:<emb_0>"
    targets = spell_targets(tokenizer, text, "<emb_0>")
    assert all(target is not None and b"<" in target for target in targets)
    assert len(targets) == 2
    assert spell_targets(tokenizer, "a<|im_end|>\nb", "<|im_end|>") == [b"<|im_end|>"]
    awkward = "\n".join(case["text"] for case in read_text_golden(golden)["encoded"])
    awkward = unicodedata.normalize("NFC", awkward)  # as Qwen's tokenizer does, so that bytes compare
    for char in set(awkward):
        targets = spell_targets(tokenizer, "\x7f" + awkward, char)
        assert all(target is not None and char.encode()[:1] in target for target in targets), char
