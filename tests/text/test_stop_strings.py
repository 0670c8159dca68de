"""The automaton against the obvious search over the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.stop_strings import START, StopStrings, build_stop_strings

FEW_LETTERS = st.text("ab", max_size=5)


@settings(max_examples=300)
@given(st.lists(FEW_LETTERS, max_size=4).map(tuple), st.text("abc", max_size=30))
def test_every_character_leads_to_what_the_text_ends_with(stops, text):
    automaton, state = StopStrings(stops), START
    for end, char in enumerate(text, 1):
        state = automaton.advance(state, char)
        so_far = text[:end]
        assert automaton.found[state] == max(
            (stop for stop in stops if stop and so_far.endswith(stop)), key=len, default=None
        )
        begun = [size for stop in stops for size in range(1, len(stop) + 1) if so_far.endswith(stop[:size])]
        assert automaton.depth[state] == max(begun, default=0)


def test_the_work_is_bounded_by_the_new_text_not_by_the_stop_string():
    """A repetitive text makes a naive search compare the whole stop string at every character."""
    automaton, state, num_fallbacks = StopStrings(("a" * 5_000 + "b",)), START, 0
    for char in "a" * 20_000 + "c":
        before = automaton.depth[state]
        state = automaton.advance(state, char)
        num_fallbacks += before + 1 - automaton.depth[state]
    assert num_fallbacks <= 20_001  # depth rises by one a character, and each fallback lowers it
    assert automaton.depth[state] == 0


def test_an_empty_stop_string_is_no_stop_string():
    assert StopStrings(("",)).is_empty
    assert StopStrings(()).is_empty


def test_the_choices_of_a_call_share_one_automaton():
    assert build_stop_strings(("ab", "c")) is build_stop_strings(("ab", "c"))
