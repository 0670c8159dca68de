"""Lookup: guesses the next tokens of a sequence from where its newest ones stood before in it.

Used by speculate.py, which decides whether a guess is worth a row. Knows token ids only. The idea is prompt
lookup (Saxena 2023); how sure a guess is, is learnt as the match models of compressors do (Mahoney, lpaq):

    tokens    a b c d e f ... b c d | e f   <- expected next: what followed the same tokens before
                    ^ source            length 3: that many tokens before `source` equal the newest ones

While the expected token comes, source and length grow with it; when another one comes, the longest match is
looked for among the latest few places where the last two tokens stood before. If there is none, a long match
that just ended goes on behind the token that differed, as in an edited text. The share of right guesses is
counted by length, for each sequence, and starts from what other texts showed; it is counted whether or not
anybody uses the guess, so that a sequence shows for nothing that guesses would pay.

A token costs O(1): a dictionary of pairs and a chain of earlier places, nothing that grows with the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_LENGTH = 32  # of a match; more makes nobody surer
MAX_PLACES = 4  # tried after a wrong guess, latest first
LEAST_EDITED = 4  # length of a match that goes on behind a token that differed
# Lengths from each of these to below the next are counted together.
LENGTHS = (0, 2, 3, 4, 6, 9, 16, 24)
CLASS_OF_LENGTH = tuple(
    max(index for index, least in enumerate(LENGTHS) if least <= length) for length in range(MAX_LENGTH + 1)
)
# The share of right guesses by class before anything is known of the text, and how many guesses it is worth.
PRIOR_RATES = (0.35, 0.4, 0.55, 0.7, 0.85, 0.9, 0.93, 0.96)
PRIOR_WEIGHT = 4.0
FORGETTING = 0.95  # of old guesses at each new one of the class, so that a text may change its ways


@dataclass(slots=True, eq=False)
class Lookup:
    num_read: int = 0  # tokens that are in the index
    source: int = -1  # place of the token that is expected next; -1: nothing is expected
    length: int = 0
    latest: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # a pair's latest place: the one after it
    earlier: list[int] = field(
        default_factory=list
    )  # by place: the place before it with the same pair, or -1
    hits: list[float] = field(default_factory=lambda: [0.0] * len(LENGTHS))
    guesses: list[float] = field(default_factory=lambda: [0.0] * len(LENGTHS))

    def read(self, token_ids: list[int], num_prompt_tokens: int, max_tokens: int) -> int:
        """Take in tokens not read so far, at most `max_tokens`; returns how many. Nothing is guessed in the
        prompt, which says little of how the reply goes on."""
        end = min(len(token_ids), self.num_read + max_tokens)
        num_new = end - self.num_read
        if self.num_read < num_prompt_tokens:
            self._index(token_ids, min(end, num_prompt_tokens))
            if self.num_read == num_prompt_tokens:
                self._search(token_ids)
        for place in range(self.num_read, end):
            self._follow(token_ids, place)
        return num_new

    def guess(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The next tokens; a match that reaches the end of the text repeats itself."""
        if self.source < 0:
            return []
        found = token_ids[self.source : self.source + num_tokens]
        period = len(found)
        while len(found) < num_tokens:
            found.append(found[len(found) - period])
        return found

    def rate(self, num_ahead: int) -> float:
        """How likely the guess after `num_ahead` right ones is right as well."""
        index = CLASS_OF_LENGTH[min(self.length + num_ahead, MAX_LENGTH)]
        return (self.hits[index] + PRIOR_RATES[index] * PRIOR_WEIGHT) / (self.guesses[index] + PRIOR_WEIGHT)

    def _follow(self, token_ids: list[int], place: int) -> None:
        """Read the token at `place`: compare it with the guess, and guess anew."""
        if self.source >= 0:
            index = CLASS_OF_LENGTH[self.length]
            is_right = token_ids[self.source] == token_ids[place]
            self.guesses[index] = self.guesses[index] * FORGETTING + 1.0
            self.hits[index] = self.hits[index] * FORGETTING + is_right
            if is_right:
                self.source += 1
                self.length = min(self.length + 1, MAX_LENGTH)
                self._index(token_ids, place + 1)
                return
        edited = self.source + 1 if self.length >= LEAST_EDITED else -1
        self._index(token_ids, place + 1)
        self._search(token_ids)
        if self.source < 0:
            self.source = edited

    def _index(self, token_ids: list[int], end: int) -> None:
        latest, earlier = self.latest, self.earlier
        for place in range(self.num_read + 1, end + 1):
            if place < 2:
                earlier += [-1] * (2 - len(earlier))
                continue
            pair = (token_ids[place - 2], token_ids[place - 1])
            earlier.append(latest.get(pair, -1))
            latest[pair] = place
        self.num_read = end

    def _search(self, token_ids: list[int]) -> None:
        """The longest match for the newest tokens among the latest places of their last two."""
        end = self.num_read
        self.source, self.length = -1, 0
        place = self.earlier[end] if end >= 2 else -1
        for _ in range(MAX_PLACES):
            if place < 0:
                return
            length = 2
            limit = min(place, MAX_LENGTH)
            while length < limit and token_ids[place - 1 - length] == token_ids[end - 1 - length]:
                length += 1
            if length > self.length:
                self.source, self.length = place, length
            place = self.earlier[place]
