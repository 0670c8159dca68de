"""Where a literal stands in a prompt, as rows of the sequence that the model runs: for /v1/sample.

The literal is looked for in the text, and each match is carried over to the tokens by its first byte:

    text           Q:<emb_0>?                    matches do not overlap, and are taken from left to right
    tokens   [bos] Q  :<  emb  _  0  >?          the first token that covers the match's first byte is ":<"
    position    0  1   2    3  4  5   6          so the row is 1: what the model expects where ":<" stands

Tokens are laid along the text byte by byte. That works because between two added tokens (which are cut out of
the text first) the tokens' bytes are the text's own, in many vocabularies after one space more. Where a
tokenizer changes the text (Unicode composition, lower case, unknown characters) they are not, and the spans
that the tokenizers library kept are taken instead, which are whole characters. Called by the HTTP side and
the library. Knows nothing of requests or of logits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from jaxserve.text.tokenizer import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SelectorMatches:
    """The sequence as run, what is put around a prompt included, and for each match, in the order of the
    text, the position whose logits stand for it. None: there is no such position, because the match is the
    first thing that the model sees (or because the tokenizer drops the end of the text)."""

    prompt_ids: list[int]
    rows: list[int | None]


def locate_literal(tokenizer: Tokenizer, text: str, literal: str) -> SelectorMatches:
    """All matches of `literal`, which is not empty, in `text`. Linear in the text.

    Raises InvalidRequestError if the text is not valid Unicode.
    """
    prompt_ids, spans = tokenizer.encode_with_spans(text)
    num_before = next((place for place, span in enumerate(spans) if span is not None), len(spans))
    inner = [span for span in spans if span is not None]
    ends = _lay_tokens(tokenizer, text, prompt_ids[num_before : num_before + len(inner)], inner)
    needle = literal.encode("utf-8", "surrogatepass")  # half a surrogate pair is in no text
    rows: list[int | None] = []
    for start in _find_all(text.encode("utf-8"), needle):
        place = bisect_right(ends, start)
        row = num_before + place - 1
        rows.append(row if place < len(ends) and row >= 0 else None)
    return SelectorMatches(prompt_ids, rows)


def _find_all(text: bytes, needle: bytes) -> Iterator[int]:
    """Where non-overlapping matches start. In UTF-8 a match of whole characters starts at a character."""
    start = text.find(needle)
    while start >= 0:
        yield start
        start = text.find(needle, start + len(needle))


def _lay_tokens(tokenizer: Tokenizer, text: str, ids: list[int], spans: list[Span]) -> list[int]:
    """Where in the text's UTF-8 bytes each token ends, ascending; it begins where the one before ends."""
    byte_places = _count_bytes(text)
    ends: list[int] = []
    run_start, char_start = 0, 0
    added = [place for place, token_id in enumerate(ids) if token_id in tokenizer.added_ids]
    for place in [*added, len(ids)]:
        char_stop, next_start = spans[place] if place < len(ids) else (len(text), len(text))
        tokens = [tokenizer.token_bytes(token_id) for token_id in ids[run_start:place]]
        run = text[char_start:char_stop]
        exact = _lay_exactly(tokens, run.encode("utf-8"))
        if exact is not None:
            ends += [byte_places[char_start] + end for end in exact]
        else:
            run_ends = _lay_by_spans(tokens, text, spans[run_start:place])
            ends += [byte_places[min(end, char_stop)] for end in run_ends]
        if place < len(ids):
            ends.append(byte_places[next_start])
        run_start, char_start = place + 1, next_start
    return list(accumulate(ends, max))


def _count_bytes(text: str) -> Sequence[int]:
    """How many bytes of UTF-8 come before each character and before the end."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(char.encode("utf-8")) for char in text)]


def _lay_exactly(tokens: list[bytes], run: bytes) -> list[int] | None:
    """Where each token of a run ends, if their bytes are those of the run, after at most one space more."""
    whole = b"".join(tokens)
    if whole == run:
        num_extra = 0
    elif whole == b" " + run:
        num_extra = 1
    else:
        return None
    return [end - num_extra for end in accumulate(map(len, tokens))]


def _lay_by_spans(tokens: list[bytes], text: str, spans: list[Span]) -> list[int]:
    """The same in characters, by the library's spans. Characters that no span holds go to the token
    before them, unless they are white space that was trimmed off the one after."""
    ends = [end for _, end in spans]
    for place, (start, _) in enumerate(spans[1:], start=1):
        gap = text[ends[place - 1] : start]
        if tokens[place][:1].isspace():
            gap = gap.rstrip()
        ends[place - 1] += len(gap)
    if tokens[:1] == [b" "]:
        start, _ = spans[0]
        if not text[start : start + 1].isspace():
            ends[0] = start  # the space that the vocabulary puts in front
    return ends
