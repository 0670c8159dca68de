"""Token ids to text as they arrive: a byte buffer that gives out whole characters only.

Used by text/output.py for every reply. Each token's bytes go into an incremental UTF-8 decoder, which keeps
back at most three bytes of an unfinished character: O(1) a token, and the same text however the ids are cut
up. Knows nothing of stop strings or requests.
"""

from __future__ import annotations

import codecs

from jaxserve.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence of ids, in pieces.

    The pieces from any sequence of `push` calls and the final `flush` join to exactly
    `tokenizer.decode(ids, skip_special_tokens, at_text_start=at_text_start)`.

    `at_text_start`: the ids begin a text. A reply continues its prompt, so the default keeps the space
    with which a SentencePiece model's reply usually begins. `spaces_between_special_tokens` is accepted
    because the wire formats have it; as in transformers' own tokenizers of this kind it changes nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        *,
        at_text_start: bool = False,
    ):
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._drops_space = at_text_start and tokenizer.strips_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_between_characters = not self._drops_space

    def push(self, ids: list[int]) -> str:
        """The characters that `ids` complete. Bytes that cannot begin a character give U+FFFD at once."""
        if len(ids) == 1 and self._is_between_characters:
            # What nearly every token of a stream is: whole characters on its own.
            text = self._tokenizer.whole_text(ids[0])
            if text is not None:
                return "" if ids[0] in self._skipped_ids else text
        token_bytes = self._tokenizer.token_bytes
        new_bytes = b"".join([token_bytes(token_id) for token_id in ids if token_id not in self._skipped_ids])
        if self._drops_space and new_bytes:
            new_bytes = new_bytes.removeprefix(b" ")
            self._drops_space = False
        text = self._decoder.decode(new_bytes)
        self._is_between_characters = not (self._drops_space or self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """U+FFFD for an unfinished character, if there is one: nothing more will come."""
        if self._is_between_characters:
            return ""
        return self._decoder.decode(b"", final=True)
