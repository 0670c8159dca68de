"""How a vocabulary spells bytes: from one entry's spelling to the raw bytes it stands for.

A tokenizer's decoder says which of three conventions its vocabulary follows. Knowing it lets one token be
turned into bytes on its own, without decoding its neighbours, which is what makes streaming exact and O(1)
a token. Used by text/tokenizer.py. Knows nothing of token ids or of special tokens.

    byte-level      GPT-2's alphabet: one printable character stands for each byte   "Ġhello" -> b" hello"
    sentencepiece   U+2581 stands for a space, <0xNN> for a byte                     "▁hello" -> b" hello"
    wordpiece       "##" joins an entry to the one before, otherwise a space does    "##ing"  -> b"ing"
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer, models
from tokenizers.decoders import Decoder

from jaxserve.errors import WeightError

SPACE_MARK = "▁"  # U+2581, SentencePiece's visible space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, other bytes for U+0100 onwards.

    Source: the encoder published with GPT-2 (Radford et al., 2019).
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in own)
    shifted = {byte: chr(256 + order) for order, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}


CHAR_OF_BYTE: dict[int, str] = _byte_alphabet()
BYTE_OF_CHAR: dict[str, int] = {char: byte for byte, char in CHAR_OF_BYTE.items()}


@dataclass(frozen=True, slots=True)
class Spelling:
    """One vocabulary's convention. `strips_first_space`: a text that starts the sequence loses one space,
    because encoding put it there."""

    kind: str  # "byte-level" | "sentencepiece" | "wordpiece"
    strips_first_space: bool = False
    has_byte_tokens: bool = False

    def spell_token(self, entry: str) -> bytes:
        """The bytes of an ordinary vocabulary entry."""
        if self.kind == "byte-level":
            try:
                return bytes([BYTE_OF_CHAR[char] for char in entry])
            except KeyError:  # an entry stored as plain text, as some vocabularies store whole words
                return entry.encode("utf-8")
        if self.kind == "sentencepiece":
            byte_token = _BYTE_TOKEN.fullmatch(entry) if self.has_byte_tokens else None
            if byte_token is not None:
                return bytes([int(byte_token.group(1), 16)])
            return entry.replace(SPACE_MARK, " ").encode("utf-8")
        return entry[2:].encode("utf-8") if entry.startswith("##") else b" " + entry.encode("utf-8")

    def spell_added_token(self, content: str) -> bytes:
        """The bytes of an added token: its content, where SentencePiece's mark still is a space."""
        if self.kind == "sentencepiece":
            content = content.replace(SPACE_MARK, " ")
        return content.encode("utf-8")


def show_bytes(token: bytes) -> str:
    """The bytes of one token as text: "bytes:" and hexadecimal escapes if they are not whole characters,
    which is how OpenAI's API names such tokens among its log-probabilities."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in token])


def read_spelling(decoder: Decoder | None) -> Spelling:
    """Which convention a tokenizers decoder implements. Raises WeightError for one we cannot stream."""
    if decoder is None:
        raise WeightError("The tokenizer has no decoder, so its tokens cannot be turned into text.")
    steps = _flatten_steps(json.loads(decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return Spelling("byte-level")
    if "WordPiece" in kinds:
        return Spelling("wordpiece", strips_first_space=True)
    strips_first_space = any(step["type"] == "Strip" and step.get("start") == 1 for step in steps)
    for step in steps:
        if step["type"] == "Metaspace":
            strips_first_space = strips_first_space or step.get("prepend_scheme") != "never"
    if (
        "Metaspace" in kinds
        or {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "} in steps
    ):
        return Spelling("sentencepiece", strips_first_space, has_byte_tokens="ByteFallback" in kinds)
    raise WeightError(
        f"The tokenizer's decoder ({', '.join(sorted(kinds))}) is not one that can be streamed; "
        "byte-level, SentencePiece and WordPiece decoders can."
    )


def measure_longest_token(backend: Tokenizer) -> int | None:
    """The most bytes of a text that one token can stand for; None where a tokenizer drops or joins some.

    It is known of byte-level BPE that keeps every byte (of a text that Unicode composition leaves alone).
    """
    model, normalizer, pre_tokenizer = backend.model, backend.normalizer, backend.pre_tokenizer
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if pre_tokenizer is None or backend.truncation is not None:
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return None
    steps = _flatten_steps(json.loads(pre_tokenizer.__getstate__()))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" not in kinds or kinds - {"ByteLevel", "Split", "Digits"}:
        return None
    if any(step.get("behavior") == "Removed" for step in steps):
        return None
    added = backend.get_added_tokens_decoder().values()
    vocab = backend.get_vocab(with_added_tokens=False)
    if any(token.lstrip or token.rstrip for token in added) or not vocab.keys() >= BYTE_OF_CHAR.keys():
        return None
    longest_added = max((len(token.content.encode("utf-8")) for token in added), default=0)
    return max(longest_added, max(map(len, vocab)))


def _flatten_steps(state: dict) -> list[dict]:
    if state["type"] == "Sequence":
        nested = state.get("decoders") or state.get("pretokenizers") or []
        return [step for part in nested for step in _flatten_steps(part)]
    return [state]
