"""Stopping at a regular expression, in a text that arrives token by token.

Patterns come from clients, so nothing here may take long or take much memory: what compiling a pattern
expands to is measured before it is compiled, and all searches of a call share an allowance of processor
time. The syntax is that of Python's `re`, and of it what a search in growing text has a use for. The `regex`
package runs it, because it can tell how much of the text's end could still become a match. Used by
text/output.py, and by the server to refuse a request early. Knows nothing of tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from jaxserve.errors import InvalidRequestError

MAX_PATTERNS = 32
MAX_PATTERN_BYTES = 256

# The regex package writes out what a pattern repeats at least: (a{1000}){1000} would take gigabytes.
_MAX_ITEMS = 2048  # of one pattern, its repeats written out
_MAX_ITEMS_IN_ALL = MAX_PATTERNS * MAX_PATTERN_BYTES
# Processor time for searching: a share of the time that passes, some in reserve, and the most for one search,
# which is how long a server's other requests may have to wait for it. Ordinary patterns take microseconds.
_SEARCH_SHARE = 0.2
_SEARCH_RESERVE_S = 0.1
_SEARCH_LIMIT_S = 0.03

_TOKEN = re.compile(
    r"""
      (?P<set> \[ \^? \]? (?: \\. | [^\]\\] )* \] )
    | (?P<repeat> \{ (?P<least>\d*) (?: ,\d* )? \} )
    | (?P<edge> \\[bB] )
    | (?P<item> \\[pPN]\{\^?[A-Za-z][\w\ =:-]*\} | \\[^KGL] | \(\?P=\w+\) )
    | (?P<flags> \A\(\?[aims]+\) )
    | (?P<open> \( (?: \?: | \?> | \?<?[=!] | \?P<\w+> | \?[aims]*-?[ims]*: | \?\(\w+\) | (?![?*]) ) )
    | (?P<close> \) )
    | (?P<brace> \{ )
    | (?P<unknown> \(.. | \\. )
    | (?P<other> . )
    """,
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class PatternMatch:
    """Where a pattern matches: characters [begin, end) of the whole text."""

    begin: int
    end: int
    pattern: str


class SearchAllowance:
    """Processor time for the searches of one call, whatever the number of its choices.

    It is a fifth of the time that passes, divided among the `count_sharing` calls that search at that time
    (so that all of them together leave a server most of its time), and a tenth of a second in reserve. `now`
    is the clock, in seconds.
    """

    def __init__(
        self, count_sharing: Callable[[], int] = lambda: 1, now: Callable[[], float] = time.monotonic
    ):
        self._count_sharing = count_sharing
        self._now = now
        self._noted_s = now()
        self._left_s = _SEARCH_RESERVE_S

    def read_left_s(self) -> float:
        """What may be spent now, in seconds; 0 or less when all is spent."""
        now_s = self._now()
        gained_s = (now_s - self._noted_s) * _SEARCH_SHARE / max(self._count_sharing(), 1)
        self._noted_s = now_s
        self._left_s = min(self._left_s + gained_s, _SEARCH_RESERVE_S)
        return self._left_s

    def spend(self, duration_s: float) -> None:
        self._left_s -= duration_s


class StopRegex:
    """The patterns of one request over its reply's text. `allowance` is shared by the replies of a call.

    A pattern matches where `re.search` finds it in the text so far: `$`, `\\Z` and `\\b` take the end of the
    text so far for an end. (The one exception: a match that only the absence of an end allows, such as
    that of `a(?!$)`, is not seen if it begins in settled text.)

    Raises InvalidRequestError for patterns that `check_stop_regex` refuses, and later, from `push`, when
    searching for them takes too long.
    """

    def __init__(self, patterns: tuple[str, ...], allowance: SearchAllowance | None = None):
        self._patterns = patterns
        self._compiled = _compile_all(patterns)
        self._starts = [0] * len(patterns)  # no match of pattern i can begin before character _starts[i]
        self._text = ""
        self._allowance = allowance or SearchAllowance()

    @property
    def is_empty(self) -> bool:
        return not self._patterns

    @property
    def num_settled(self) -> int:
        """How many characters at the start of the text can be in no match that is still to come."""
        return min(self._starts, default=len(self._text))

    def push(self, new_text: str, may_stop: bool = True) -> PatternMatch | None:
        """Take the text of one more token; the match that begins first, of equal ones the first pattern's.

        Without `may_stop` a match is passed over and becomes text like any other.
        """
        self._text += new_text
        found: PatternMatch | None = None
        for order, pattern in enumerate(self._patterns):
            match = self._advance(order, may_stop)
            if match is not None and (found is None or match.start() < found.begin):
                found = PatternMatch(match.start(), match.end(), pattern)
        return found

    def _advance(self, order: int, may_stop: bool) -> regex.Match[str] | None:
        """The match of one pattern, or None after moving its start to where one could still begin."""
        while match := self._search(order, self._compiled[order].whole, is_partial=False):
            if may_stop:
                return match
            if match.end() == self._starts[order]:  # a match of no characters: it would be found for ever
                self._starts[order] = len(self._text)
                return None
            self._starts[order] = match.end()
        begun = self._search(order, self._compiled[order].begun, is_partial=True)
        self._starts[order] = len(self._text) if begun is None else begun.start()
        return None

    def _search(
        self, order: int, compiled: regex.Pattern[str], *, is_partial: bool
    ) -> regex.Match[str] | None:
        """One search. The time limit is the clock's, but only the processor's time counts in the end: having
        had to wait for its turn is no fault of a pattern."""
        while (left_s := self._allowance.read_left_s()) > 0:
            limit_s = min(left_s, _SEARCH_LIMIT_S)
            started_s = time.thread_time()
            try:
                return compiled.search(
                    self._text,
                    pos=self._starts[order],
                    partial=is_partial,
                    concurrent=False,
                    timeout=limit_s,
                )
            except TimeoutError:
                if time.thread_time() - started_s > 0.8 * limit_s:
                    break
            finally:
                self._allowance.spend(time.thread_time() - started_s)
        raise InvalidRequestError(
            f"stop_regex {self._patterns[order]!r} takes too long to search for (more than "
            f"{_SEARCH_LIMIT_S * 1000:g} ms, or for long more than {_SEARCH_SHARE:.0%} of the time, in all "
            "choices and all requests that search). Write it without repeats inside repeats, and without a "
            "repeat of anything at its start.",
            param="stop_regex",
        )


def check_stop_regex(patterns: tuple[str, ...]) -> None:
    """Raise InvalidRequestError unless there are at most 32 patterns, each of at most 256 bytes, valid, not
    repeating too much, and not matching the empty text."""
    _compile_all(patterns)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """One pattern twice: to find it whole, and to find where it has begun."""

    whole: regex.Pattern[str]
    begun: regex.Pattern[str]


@lru_cache(maxsize=16)  # the request's check and each of its choices ask for the same
def _compile_all(patterns: tuple[str, ...]) -> tuple[_Compiled, ...]:
    if len(patterns) > MAX_PATTERNS:
        raise InvalidRequestError(
            f"stop_regex must be at most {MAX_PATTERNS} patterns, got {len(patterns)}.", param="stop_regex"
        )
    for pattern in patterns:
        _check_form(pattern)
    if sum(map(_count_items, patterns)) > _MAX_ITEMS_IN_ALL:
        raise InvalidRequestError(
            "stop_regex repeats too much: with the repeats written out all patterns together have more than "
            f"{_MAX_ITEMS_IN_ALL} items.",
            param="stop_regex",
        )
    return tuple([_compile(pattern) for pattern in patterns])


def _compile(pattern: str) -> _Compiled:
    """A pattern of good form, compiled.

    At the text's end it is open whether a word ends there. To find what has begun, both are taken for
    true; a further character is asked for, so that no whole match hides one which began earlier.
    """
    tokens = list(_TOKEN.finditer(pattern))
    try:
        whole = regex.compile("".join(map(_quote, tokens)), flags=regex.V0, cache_pattern=False)
    except regex.error as error:
        raise InvalidRequestError(
            f"stop_regex {pattern!r} is not a valid regular expression: {_explain(pattern, error)}.",
            param="stop_regex",
        ) from None
    if whole.search("") is not None:
        raise InvalidRequestError(
            f"stop_regex {pattern!r} matches the empty text, so it would stop before the first token. "
            "Make it match at least one character.",
            param="stop_regex",
        )
    if not any(token["edge"] for token in tokens):
        return _Compiled(whole, whole)
    flags = "".join([token.group() for token in tokens if token["flags"]])
    body = [rf"(?>{token['edge']}|\Z)" if token["edge"] else _quote(token) for token in tokens]
    begun = f"{flags}(?:{''.join(body[len(flags) > 0 :])})(?s:.*+.)"
    return _Compiled(whole, regex.compile(begun, flags=regex.V0, cache_pattern=False))


def _check_form(pattern: str) -> None:
    """What can be told before compiling, and has to be: whether that would end."""
    num_bytes = len(pattern.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_PATTERN_BYTES:
        raise InvalidRequestError(
            f"stop_regex patterns must be at most {MAX_PATTERN_BYTES} bytes, got one of {num_bytes}.",
            param="stop_regex",
        )
    for token in _TOKEN.finditer(pattern):
        if token["unknown"]:
            raise InvalidRequestError(
                f"stop_regex {pattern!r} holds {token.group()!r} at position {token.start()}, which is not "
                "supported: the syntax is that of Python's re without comments, with the flags a, i, m and "
                "s at its start.",
                param="stop_regex",
            )
    if _count_items(pattern) > _MAX_ITEMS:
        raise InvalidRequestError(
            f"stop_regex {pattern!r} repeats too much: with its repeats written out it has more than "
            f"{_MAX_ITEMS} items.",
            param="stop_regex",
        )


def _count_items(pattern: str) -> int:
    """How many items a pattern has when each repeat is written out as often as it must match."""
    groups: list[list[int]] = [[]]  # of each open group, the sizes of what it holds
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            groups.append([])
        elif token["close"] and len(groups) > 1:
            size = sum(groups.pop())
            groups[-1].append(max(size, 1))
        elif token["repeat"] and groups[-1]:
            groups[-1][-1] *= max(int(token["least"] or 1), 1)
        else:
            groups[-1].append(1)
    return sum(sum(group) for group in groups)


def _quote(token: re.Match[str]) -> str:
    """A token as the regex package must be given it to take it as `re` does: a brace that is no repeat
    (a fuzzy match to the package) and a bracket inside a set (perhaps a named set) stand for themselves."""
    if token["set"]:
        return "[" + re.sub(r"(\\.)|\[", lambda part: part[1] or r"\[", token["set"][1:], flags=re.DOTALL)
    return r"\{" if token["brace"] else token.group()


def _explain(pattern: str, error: Any) -> str:
    """What regex.error says, whose fields its type stub does not know, with the place in `pattern`."""
    where = "" if error.pos is None else f" at position {_find_place(pattern, error.pos)}"
    return f"{error.msg}{where}"


def _find_place(pattern: str, quoted_pos: int) -> int:
    """The character of `pattern` that became character `quoted_pos` of what was compiled."""
    for token in _TOKEN.finditer(pattern):
        size = len(_quote(token))
        if quoted_pos < size:
            return min(token.start() + quoted_pos, token.end() - 1)
        quoted_pos -= size
    return len(pattern)
