"""What a client sees of a reply: stop strings and stop tokens trimmed, nothing shown too early, and the same
result however the engine cuts up its ids."""

from __future__ import annotations

import codecs

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.output import TextStream
from jaxserve.types import FinishReason, SamplingParams

LENGTH = FinishReason(kind="length")
EOS = 256


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def finish_of(stream: TextStream, ids: list[int], finish: FinishReason | None = LENGTH) -> FinishReason:
    delta = stream.push(ids, finish)
    assert delta.finish is not None
    return delta.finish


def test_without_stop_strings_text_comes_as_it_is_decoded(byte_level):
    stream = TextStream(byte_level, SamplingParams())
    assert stream.push(ids_of("hel"), None).text == "hel"
    last = stream.push([*ids_of("lo"), 0xE4], LENGTH)
    assert (last.text, last.token_ids, last.finish) == ("lo\ufffd", [*ids_of("lo"), 0xE4], LENGTH)
    assert (stream.text, stream.num_tokens) == ("hello\ufffd", 6)


def test_a_stop_string_and_all_after_it_are_trimmed(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("STOP",)))
    delta = stream.push(ids_of("a STOP b"), LENGTH)
    assert delta.text == stream.text == "a "
    assert delta.finish == FinishReason(kind="stop", matched="STOP")
    assert delta.token_ids == stream.token_ids == ids_of("a STOP")
    assert stream.num_tokens == 6


def test_no_stop_trim_keeps_the_stop_string_and_nothing_after(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("STOP",), no_stop_trim=True))
    assert stream.push(ids_of("a STOP b"), LENGTH).text == "a STOP"


def test_the_tail_is_held_back_while_it_could_begin_a_stop_string(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("\n\nUser:", "###")))
    shown = [stream.push(ids_of(char), None).text for char in "a\n\nUse #b"]
    assert shown == ["a", "", "", "", "", "", "\n\nUse ", "", "#b"]
    assert stream.push(ids_of("\nx\n"), LENGTH).text == "\nx\n"  # at the end it is text after all


def test_the_stop_string_that_is_complete_first_wins(byte_level):
    assert finish_of(TextStream(byte_level, SamplingParams(stop=("bcd", "c"))), ids_of("abcd")).matched == "c"
    assert finish_of(TextStream(byte_level, SamplingParams(stop=("c", "bc"))), ids_of("abcd")).matched == "bc"
    assert (
        finish_of(TextStream(byte_level, SamplingParams(stop=("x", "d", "b"))), ids_of("abcd")).matched == "b"
    )


def test_a_stop_string_comes_before_the_engines_own_reason(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("b",)))
    reason = finish_of(stream, [*ids_of("abc"), EOS], FinishReason(kind="stop", matched=EOS))
    assert (reason.matched, stream.text, stream.num_tokens) == ("b", "a", 2)


def test_after_the_end_nothing_comes_out(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("b",)))
    stream.push(ids_of("ab"), None)
    after = stream.push(ids_of("cd"), LENGTH)
    assert (after.text, after.token_ids, after.finish) == ("", [], None)
    assert (stream.text, stream.token_ids) == ("a", ids_of("ab"))
    assert stream.finish == FinishReason(kind="stop", matched="b")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (SamplingParams(), "hi"),
        (SamplingParams(skip_special_tokens=False), "hi"),
        (SamplingParams(skip_special_tokens=False, no_stop_trim=True), "hi<|eos|>"),
        (SamplingParams(no_stop_trim=True), "hi"),  # kept, and then skipped as special
    ],
)
def test_the_stop_token_counts_but_is_not_text(byte_level, params, text):
    stream = TextStream(byte_level, params)
    delta = stream.push([*ids_of("hi"), EOS], FinishReason(kind="stop", matched=EOS))
    assert (delta.text, delta.token_ids) == (text, [*ids_of("hi"), EOS])


def test_an_ordinary_stop_token_is_trimmed_too(byte_level):
    newline = FinishReason(kind="stop", matched=ord("\n"))
    assert TextStream(byte_level, SamplingParams()).push(ids_of("hi\n"), newline).text == "hi"
    assert (
        TextStream(byte_level, SamplingParams(no_stop_trim=True)).push(ids_of("hi\n"), newline).text == "hi\n"
    )


def test_a_stop_string_that_spells_a_skipped_special_token_is_still_seen(byte_level):
    for stop_trimmed, text in ((False, "ab"), (True, "ab<|pad|>")):
        stream = TextStream(byte_level, SamplingParams(stop=("<|pad|>",), no_stop_trim=stop_trimmed))
        reason = finish_of(stream, [*ids_of("ab"), 258, *ids_of("c")])
        assert (reason.matched, stream.text, stream.num_tokens) == ("<|pad|>", text, 3)


def test_stop_strings_wait_for_min_new_tokens(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("\n",), min_new_tokens=4))
    reason = finish_of(stream, ids_of("a\nb\nc"))
    assert (reason.matched, stream.text, stream.num_tokens) == ("\n", "a\nb", 4)


def test_an_abort_gives_out_what_was_held(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop=("STOP",)))
    assert stream.push(ids_of("aST"), None).text == "a"
    assert stream.push([], FinishReason(kind="abort", message="gone")).text == "ST"


def test_a_pattern_ends_the_reply_at_the_token_with_which_it_matches(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop_regex=(r"\n\d+\.", "x")))
    shown = [stream.push(ids_of(char), None).text for char in "a\n1\n23"]
    assert shown == ["a", "", "", "\n1", "", ""]  # held back while it could become a match
    delta = stream.push(ids_of(". b"), LENGTH)
    assert (delta.text, stream.text, stream.num_tokens) == ("", "a\n1", 7)
    assert delta.finish == FinishReason(kind="stop", matched=r"\n\d+\.")


def test_no_stop_trim_keeps_what_a_pattern_matched(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop_regex=("[xy]+",), no_stop_trim=True))
    stream.push(ids_of("abx"), None)
    assert stream.text == "abx"


def test_of_a_stop_string_and_a_pattern_the_one_that_begins_first_counts(sentencepiece):
    (token_id,) = [id_ for id_ in range(700) if sentencepiece.token_bytes(id_) == b" string"]
    for stop, pattern, matched, text in [
        ("ring", "st", "st", " "),
        ("str", "ri", "str", " "),
        ("r", "[rs]", "[rs]", " "),
        ("st", "s", "st", " "),  # both begin at "s"
    ]:
        stream = TextStream(sentencepiece, SamplingParams(stop=(stop,), stop_regex=(pattern,)))
        assert (finish_of(stream, [token_id]).matched, stream.text) == (matched, text)


def test_patterns_wait_for_min_new_tokens_and_ignore_eos_does_not_disable_them(byte_level):
    params = SamplingParams(stop_regex=("b+",), min_new_tokens=4, ignore_eos=True)
    stream = TextStream(byte_level, params)
    reason = finish_of(stream, ids_of("abbab"))
    assert (reason.matched, stream.text, stream.num_tokens) == ("b+", "abba", 5)


def test_at_the_end_what_could_have_become_a_match_is_text(byte_level):
    stream = TextStream(byte_level, SamplingParams(stop_regex=("a.*z",)))
    assert stream.push(ids_of("xa b"), None).text == "x"
    assert stream.push(ids_of("c"), LENGTH).text == "a bc"


def search(pattern: str, text: str) -> regex.Match[str] | None:
    return regex.compile(pattern, cache_pattern=False).search(text)


Stop = tuple[int, int, str]  # what ends a reply: its first character, the one after its last, its name


def expected(tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, int, str | None]:
    """Text, token count and reason by the definition: decode everything, search everything."""
    counts = [0]  # whole characters there are after each token
    for end in range(1, len(ids) + 1):
        data = b"".join(map(tokenizer.token_bytes, ids[:end]))
        counts.append(len(codecs.utf_8_decode(data, "replace", False)[0]))
    text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    counts[-1] = len(text)
    for num_tokens in range(max(1, params.min_new_tokens), len(ids) + 1):
        known, so_far = counts[num_tokens - 1], text[: counts[num_tokens]]
        found: list[Stop] = []
        for end in range(known + 1, len(so_far) + 1):
            ends = [stop for stop in params.stop if stop and so_far[:end].endswith(stop)]
            found = found or [(end - len(stop), end, stop) for stop in sorted(ends, key=len)[-1:]]
        for pattern in params.stop_regex if len(so_far) > known else ():
            match = search(pattern, so_far)
            found += [(*match.span(), pattern)] if match else []
        if found:
            begin, end, matched = min(found, key=lambda stop: stop[0])
            return text[:end] if params.no_stop_trim else text[:begin], num_tokens, matched
    return text, len(ids), None


LETTERS = "ab \né👩\ufffd"
IDS = st.one_of(
    st.text(LETTERS, max_size=12).map(ids_of),
    st.lists(st.sampled_from([*LETTERS.encode(), 0xFF, 0xE4, 0xBD, 0x80]), max_size=20),
)
PATTERNS = st.recursive(
    st.sampled_from([*"abé👩.$", "ab", "a b", r"\n", r"\w", r"\s", "[^a]", r"\b", r"\B", "(?s:.)", r"\Z"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "+?", "{2}", "{0,2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map("(?={})".format),
        inner.map("({})".format),
    ),
    max_leaves=5,
).filter(lambda pattern: search(pattern, "") is None)


def check_every_cut(tokenizer, data, ids: list[int], params: SamplingParams) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    chunks = [ids[start:end] for start, end in zip([0, *places], [*places, len(ids)], strict=True)]
    stream = TextStream(tokenizer, params)
    deltas = [stream.push(chunk, LENGTH if at == len(places) else None) for at, chunk in enumerate(chunks)]

    text, num_tokens, matched = expected(tokenizer, ids, params)
    assert stream.text == "".join(delta.text for delta in deltas) == text
    assert stream.token_ids == [id_ for delta in deltas for id_ in delta.token_ids] == ids[:num_tokens]
    assert stream.finish == (LENGTH if matched is None else FinishReason(kind="stop", matched=matched))
    assert [delta.finish for delta in deltas if delta.finish] == [stream.finish]


LISTS_OF_IDS = st.lists(IDS, max_size=4).map(lambda parts: [id_ for part in parts for id_ in part])
STOPS = st.lists(st.text(LETTERS, max_size=4), max_size=3).map(tuple)


@settings(max_examples=400)
@given(st.data(), LISTS_OF_IDS, STOPS, st.booleans(), st.integers(0, 6))
def test_however_the_ids_are_cut_up_the_result_is_the_defined_one(
    byte_level, data, ids, stops, keeps, at_least
):
    params = SamplingParams(stop=stops, no_stop_trim=keeps, min_new_tokens=at_least)
    check_every_cut(byte_level, data, ids, params)


@settings(max_examples=400)
@given(st.data(), LISTS_OF_IDS, STOPS, st.lists(PATTERNS, min_size=1, max_size=3).map(tuple), st.booleans())
def test_so_it_is_with_stop_strings_and_patterns_together(byte_level, data, ids, stops, patterns, keeps):
    params = SamplingParams(stop=stops, stop_regex=patterns, no_stop_trim=keeps)
    check_every_cut(byte_level, data, ids, params)
