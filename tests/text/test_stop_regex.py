"""Patterns that clients send: what is a match, what is refused, and that neither can take the server's time.

How patterns act on a reply, together with stop strings, is in test_output.py.
"""

from __future__ import annotations

import random
import re

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.text.stop_regex import PatternMatch, SearchAllowance, StopRegex, check_stop_regex


def feed(
    patterns: tuple[str, ...], tokens: list[str], token_s: float = 0.0
) -> tuple[PatternMatch | None, list[int]]:
    """The match and, after each token before it, how much text is settled. A token comes each `token_s`."""
    clock = Clock()
    search, settled = StopRegex(patterns, SearchAllowance(now=clock)), []
    for token in tokens:
        clock.now_s += token_s
        match = search.push(token)
        if match is not None:
            return match, settled
        settled.append(search.num_settled)
    return None, settled


def test_text_is_settled_once_no_match_can_begin_in_it():
    assert feed((r"\d+\. END",), ["ab", "12", ". E", "x", "7"]) == (None, [2, 2, 2, 8, 8])
    assert feed((".*foo",), ["ab", "c\n", "d"]) == (None, [0, 4, 4])
    assert feed(("foo", "[xy]z"), ["x", "f", "o"]) == (None, [0, 1, 1])


@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        (r"\n\bEND\b", ["a\n", "END"]),  # "\n" alone ends no word, and yet a match may begin there
        (r"foo\Bd", ["a", "foo", "d"]),
        (r"(?<=ab)c", ["a", "b", "c"]),  # looks back into settled text
        (r"^END", ["a\nEND", "END"]),
        (r"(?m)^END", ["a\n", "EN", "D"]),
        (r"(?s)a.b", ["a", "\n", "b"]),
        (r"(\w+) \1!", ["cat ca", "t!"]),
        (r"x(?!y)", ["x", "y"]),
        (r"{e}", ["foo", "{e}"]),  # braces that repeat nothing are text, as in Python's re
        (r"[[:a]", ["b", ":"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_a_match_in_several_tokens_is_the_one_in_the_whole_text(pattern, tokens):
    match, settled = feed((pattern,), tokens)
    ends = ["".join(tokens[:count]) for count in range(1, len(tokens) + 1)]
    whole = next((found for found in (re.search(pattern, text) for text in ends) if found), None)
    assert (match and (match.begin, match.end)) == (whole and whole.span())
    assert whole is None or all(count <= whole.start() for count in settled)


def test_the_match_that_begins_first_is_told_and_of_equals_the_first_pattern():
    assert feed(("c", "bc", "b"), ["abcd"])[0] == PatternMatch(1, 3, "bc")


def test_a_match_that_comes_too_early_is_passed_over():
    search = StopRegex(("x+", r"\b"))
    assert search.push("ax xa", may_stop=False) is None
    assert search.num_settled == 5
    assert search.push("x") == PatternMatch(5, 6, "x+")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("(a", r"stop_regex '\(a' is not a valid regular expression: missing \) at position 2"),
        ("x{2}[b-a]", "bad character range at position 8"),
        ("{[b-a]", "bad character range at position 5"),
        ("a*", r"'a\*' matches the empty text, so it would stop before the first token"),
        ("$", "matches the empty text"),
        ("a" * 257, "at most 256 bytes, got one of 257"),
        ("é" * 129, "at most 256 bytes, got one of 258"),
        ("(?r)a", r"holds '\(\?r' at position 0, which is not supported: the syntax is that of Python's re"),
        ("a(?i)b", r"holds '\(\?i' at position 1"),
        (r"a\Kb", r"holds '\\\\K' at position 1"),
        ("(?R)b", "is not supported"),
        ("(?:a{100}){21}", "repeats too much: with its repeats written out it has more than 2048 items"),
        ("(?:(?:(?:a{65535}){65535}){65535})", "repeats too much"),
        ("[[:alpha:](?:]{9999}", "repeats too much"),  # to the regex package "[:alpha:]" would be a set in it
        (r"(?:\p{9999}){9}", "repeats too much"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_in_a_sentence(pattern, sentence):
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        check_stop_regex(("fine", pattern))
    assert caught.value.param == "stop_regex"


def test_there_may_be_32_patterns_and_so_many_repeats():
    check_stop_regex(tuple(f"a{order}" for order in range(32)))
    with pytest.raises(InvalidRequestError, match="at most 32 patterns, got 33"):
        check_stop_regex(("a",) * 33)
    with pytest.raises(InvalidRequestError, match="all patterns together have more than 8192 items"):
        check_stop_regex(tuple(f"{letter}{{1700}}" for letter in "abcde"))


@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        ("(?:a|aa)+[cd]", ["a" * 80, "b"]),  # exponential: never ends
        (r"(?:.|\n)*?[!?]{3}", ["word "] * 4000),  # quadratic: too slow once the text is long
    ],
)
def test_a_pattern_that_takes_too_long_ends_its_own_request_and_soon(pattern, tokens):
    with pytest.raises(InvalidRequestError, match="takes too long to search for"):
        feed((pattern,), tokens)


@pytest.mark.parametrize("pattern", ["foo", "(?s).*foo", r"\b(?:User|Human):", r"(?i)final answer: .*\."])
def test_ordinary_patterns_stay_within_their_allowance_over_a_long_reply(pattern):
    words = random.Random(0).choices([" the", " cat", " sat", " on", ".\n", " a", " mat"], k=4000)
    assert feed((pattern,), words, token_s=0.002)[0] is None


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_replies_of_a_call_share_one_allowance_that_grows_with_time():
    clock = Clock()
    allowance = SearchAllowance(now=clock)
    allowance.spend(0.1)
    replies = [StopRegex((pattern,), allowance) for pattern in ("foo", "bar")]
    for reply in replies:
        with pytest.raises(InvalidRequestError, match="or for long more than 20% of the time"):
            reply.push("a")
    clock.now_s = 0.2
    assert allowance.read_left_s() == pytest.approx(0.04)
    assert [reply.push("a") for reply in replies] == [None, None]
    clock.now_s = 9.0
    assert allowance.read_left_s() == pytest.approx(0.1)  # what is not used is not saved up


def test_calls_that_search_at_once_divide_the_share():
    clock = Clock()
    allowance = SearchAllowance(lambda: 4, clock)
    allowance.spend(0.1)
    clock.now_s = 1.0
    assert allowance.read_left_s() == pytest.approx(0.05)
