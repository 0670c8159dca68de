"""Finding stop strings in a text that arrives character by character.

An Aho-Corasick automaton (Aho and Corasick, 1975) over all stop strings of a request: one state per distinct
prefix of a stop string, one step per character whatever the number and length of the strings. The state also
says how much of the text's tail could still become a stop string, which is what must be held back. Used by
text/output.py. Knows nothing of tokens.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache

START = 0  # the state in which no stop string has begun


class StopStrings:
    """The automaton. Constant once built; the state is the caller's to keep.

    `depth[state]`: how many characters at the end of the text begin a stop string.
    `found[state]`: the stop string that the text ends with, the longest if there are several, or None.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._next: list[dict[str, int]] = [{}]
        self._fallback: list[int] = [START]
        self.depth: list[int] = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    @property
    def is_empty(self) -> bool:
        return len(self.depth) == 1

    def advance(self, state: int, char: str) -> int:
        """The state after one more character. Amortised O(1): each fallback undoes an earlier step."""
        while char not in self._next[state] and state != START:
            state = self._fallback[state]
        return self._next[state].get(char, START)

    def _add(self, stop: str) -> None:
        state = START
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self._next.append({})
                self._fallback.append(START)
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = self._next[state][char]
        if state != START:  # an empty string never stops anything
            self.found[state] = stop

    def _link(self) -> None:
        """Breadth first, point each state at the longest shorter suffix that is a state too."""
        waiting = deque(self._next[START].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fallback[child] = self.advance(self._fallback[state], char)
                if self.found[child] is None:
                    self.found[child] = self.found[self._fallback[child]]
                waiting.append(child)


@lru_cache(maxsize=8)  # the choices of a call ask for the same; one takes up to 4 MB
def build_stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """The automaton of these strings, which all who ask for it share."""
    return StopStrings(stops)
