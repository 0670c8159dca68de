"""From the engine's token ids to the text of one reply: detokenising, stop strings and patterns, trimming.

One TextStream per sequence, fed with the engine's deltas by the HTTP side and by the library. However the
ids are cut into deltas, the text, the ids and the reason to finish come out the same. Knows nothing of
queues, HTTP or JSON.

    engine ids -> token by token -> Detokenizer -> stop strings, stop_regex -> |emitted text ... |held back|
                                                                held back: could begin one of them
"""

from __future__ import annotations

import msgspec

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.stop_regex import SearchAllowance, StopRegex
from jaxserve.text.stop_strings import START, build_stop_strings
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason, SamplingParams


class TextDelta(msgspec.Struct, frozen=True):
    """What one push adds. `finish` is set once, on the delta that ends the reply."""

    text: str
    token_ids: list[int]
    finish: FinishReason | None


class TextStream:
    """The text of one sequence as it grows.

    A stop string counts at the character that completes it. If several are complete at the same character
    the longest (which began first) is the one reported. A pattern of `stop_regex` counts at the token with
    which it matches. If one token completes both, the one that begins first in the text is reported, a stop
    string before a pattern. It is taken off the text with all that follows, or, under `no_stop_trim`, kept
    with nothing after it. Like a stop token it cannot end the reply before `min_new_tokens` tokens.

    `allowance` is the time for searching that all streams of a call share; without it the stream has its own.
    Raises InvalidRequestError for a pattern that is refused, and from `push` if one takes too long to
    search for.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, allowance: SearchAllowance | None = None
    ):
        self._keeps_stop = params.no_stop_trim
        self._min_new_tokens = params.min_new_tokens
        self._detokenizer = Detokenizer(
            tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._stops = build_stop_strings(params.stop)
        self._state = START
        self._patterns = StopRegex(params.stop_regex, allowance)
        self._is_searched = not (self._stops.is_empty and self._patterns.is_empty)
        self._num_given = 0  # characters given out; those held back follow them
        self._held = ""  # decoded, but could be the beginning of a stop string or of a pattern's match
        # A skipped special token leaves no characters to search, so a stop string that spells one is
        # looked for among the ids.
        self._stop_tokens: dict[int, str] = {}
        if params.skip_special_tokens:
            for stop in params.stop:
                token_id = tokenizer.special_id_of(stop)
                if token_id is not None:
                    self._stop_tokens[token_id] = stop
        self._parts: list[str] = []
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def num_tokens(self) -> int:
        """Ids taken so far, up to and including the one that ended the reply."""
        return len(self.token_ids)

    def push(self, delta_token_ids: list[int], finish: FinishReason | None) -> TextDelta:
        """Take the next ids of the reply.

        `finish` is the engine's reason, if it ended the sequence with the last of these ids. A stop string
        completed by any of them comes before it. After the end nothing more comes out.
        """
        if self.finish is not None:
            return TextDelta("", [], None)
        if finish is None and not self._is_searched:  # nearly every push of a stream
            self.token_ids += delta_token_ids
            text = self._detokenizer.push(delta_token_ids)
            if text:
                self._parts.append(text)
            return TextDelta(text, delta_token_ids, None)
        num_before = len(self.token_ids)
        shown_ids = self._without_stop_token(delta_token_ids, finish)
        text = self._take(shown_ids)
        if self.finish is None:
            self.token_ids += delta_token_ids[len(shown_ids) :]
            if finish is not None:
                text += self._end(finish)
        if text:
            self._parts.append(text)
        return TextDelta(text, self.token_ids[num_before:], self.finish)

    def _without_stop_token(self, ids: list[int], finish: FinishReason | None) -> list[int]:
        """The ids that have a text: all but the stop token that ended the sequence."""
        if finish is None or finish.kind != "stop" or self._keeps_stop:
            return ids
        return ids[:-1] if ids and ids[-1] == finish.matched else ids

    def _take(self, ids: list[int]) -> str:
        """Decode `ids`, up to the token that ends the reply; the text that is safe to give out."""
        if not self._is_searched:
            self.token_ids += ids
            return self._detokenizer.push(ids)
        text = ""
        for token_id in ids:
            self.token_ids.append(token_id)
            stop = self._stop_tokens.get(token_id)
            if stop is not None and self._may_stop():
                reason = FinishReason(kind="stop", matched=stop)
                text += self._end(reason)
                return text + stop if self._keeps_stop and self.finish is reason else text
            text += self._search(self._detokenizer.push([token_id]))
            if self.finish is not None:
                return text
        return text

    def _search(self, new_text: str) -> str:
        """Take the characters of one token; return what can no longer be part of a stop."""
        buffer = self._held + new_text
        stop = self._find_stop(buffer, len(self._held))
        if stop is not None:
            begin, end, matched = stop
            self.finish = FinishReason(kind="stop", matched=matched)
            self._held = ""
            return buffer[:end] if self._keeps_stop else buffer[:begin]
        num_safe = len(buffer) - self._stops.depth[self._state]
        if not self._patterns.is_empty:
            num_safe = min(num_safe, self._patterns.num_settled - self._num_given)
        self._num_given += num_safe
        self._held = buffer[num_safe:]
        return buffer[:num_safe]

    def _find_stop(self, buffer: str, num_searched: int) -> tuple[int, int, str] | None:
        """What ends the reply with this token: its characters [begin, end) of `buffer`, and its name."""
        found: tuple[int, int, str] | None = None
        for end in range(num_searched + 1, len(buffer) + 1):
            self._state = self._stops.advance(self._state, buffer[end - 1])
            stop = self._stops.found[self._state]
            if stop is not None and self._may_stop():
                found = (end - len(stop), end, stop)
                break
        if len(buffer) > num_searched and not self._patterns.is_empty:
            match = self._patterns.push(buffer[num_searched:], self._may_stop())
            if match is not None and (found is None or match.begin - self._num_given < found[0]):
                found = (match.begin - self._num_given, match.end - self._num_given, match.pattern)
        return found

    def _end(self, finish: FinishReason) -> str:
        """The sequence is over: what was held back is text after all, unless its last half character
        completes a stop (one that contains U+FFFD)."""
        text = self._search(self._detokenizer.flush())
        if self.finish is None:
            self.finish = finish
            text += self._held
            self._held = ""
        return text

    def _may_stop(self) -> bool:
        return len(self.token_ids) >= self._min_new_tokens
