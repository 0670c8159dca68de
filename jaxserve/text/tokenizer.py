"""The tokenizer of one model: text to token ids, and each token id to the bytes it stands for.

Used by the HTTP side and the library; the engine sees only ids. `load_tokenizer` is the front door: a
Hugging Face directory, a .gguf file, or "bytes" for models without one. Wraps the `tokenizers` library;
transformers is never imported on this path. Knows nothing of requests, templates or stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.text.token_spelling import CHAR_OF_BYTE, measure_longest_token, read_spelling, show_bytes

BYTES_PATH = "bytes"  # the tokenizer path that asks for `byte_tokenizer`
BYTES_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Keeps SentencePiece's space away from the text that follows: no vocabulary joins it to other characters.
_LEAD = "\u263a"

_CACHE_SIZE = 1000  # 6 MB when full; the default, 10,000, is 58 MB


class Tokenizer:
    """Text to ids and back. Constant once built, so that threads may share it.

    Attributes:
        bos_id: the token that begins a sequence, if the model has one.
        eos_ids: every id that ends generation; the tokenizer's own end-of-sequence token comes first.
        special_ids: the ids left out of the text when `skip_special_tokens` is asked for.
        added_ids: the ids that are cut out of a text before it is normalised, special ones included.
        vocab_size: one more than the highest id with a meaning.
        add_bos: whether `encode` begins with `bos_id`.
        chat_template: the model's Jinja template, if it came with one.
        strips_first_space: whether encoding puts a space before a text, which decoding a whole text removes.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        prefix_ids: Iterable[int] = (),
        suffix_ids: Iterable[int] = (),
        chat_template: str | None = None,
        vocab_size: int | None = None,
    ):
        self._backend = backend
        self._spelling = read_spelling(backend.decoder)
        added_tokens = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added_tokens.items()}
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met; a pure function of the id
        self._texts: dict[int, str] = {}  # the same, as they are shown on their own
        self._whole_texts: dict[int, str | None] = {}  # the same, where they are characters
        self._longest_token = measure_longest_token(backend)
        _bound_cache(backend)
        self._keeps_unicode = backend.normalizer is None
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.added_ids = frozenset(self._added)
        self.special_ids = frozenset(token_id for token_id, token in added_tokens.items() if token.special)
        self.add_bos = bos_id is not None and bos_id in self._prefix_ids
        self.chat_template = chat_template
        self.vocab_size = vocab_size or max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.strips_first_space = self._spelling.strips_first_space

    @property
    def bos_token(self) -> str:
        """The text of `bos_id`, or "" without one: what chat templates call bos_token."""
        return "" if self.bos_id is None else self.token_text(self.bos_id)

    @property
    def eos_token(self) -> str:
        return self.token_text(self.eos_ids[0]) if self.eos_ids else ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in the text become their ids.

        `add_special_tokens` adds what the model puts around a prompt (usually the beginning-of-sequence
        token). A rendered chat template already holds it: encode that with False.
        Raises InvalidRequestError if the text is not valid Unicode.
        """
        _require_unicode(text)
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int] | None]]:
        """`encode` with special tokens, and for each id the characters [start, end) of `text` that it comes
        from, as the tokenizers library counts them: tokens that share a character both have it. None for
        what is put around a prompt. text/selectors.py makes exact bytes of it."""
        _require_unicode(text)
        encoding = self._encode_one(text)
        before: list[tuple[int, int] | None] = [None] * len(self._prefix_ids)
        return self._surround(encoding.ids), before + encoding.offsets + [None] * len(self._suffix_ids)

    def encode_as_text(
        self, text: str, hidden_ids: frozenset[int] = frozenset(), *, is_continued: bool = False
    ) -> list[int]:
        """`encode` without special tokens, and without reading any in the text: what spells a special token,
        or one of `hidden_ids`, stays text. `is_continued` text follows other text, so that no space is put
        before it."""
        _require_unicode(text)
        lead = _LEAD if is_continued and self.strips_first_space else ""
        encoding = self._encode_one(lead + text)
        pairs = [(token_id, span) for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)]
        pairs = [(token_id, span) for token_id, span in pairs if span[1] > len(lead)] if lead else pairs
        hidden_ids = hidden_ids | self.special_ids
        # Cut in two, a spelling is none. In its middle, because a token may take in any number of spaces.
        cuts = [
            (start + end) // 2 - len(lead)
            for token_id, (start, end) in pairs
            if token_id in hidden_ids and end - start > 1
        ]
        if not cuts:
            return [token_id for token_id, _ in pairs]
        ids: list[int] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            is_later = is_continued or start > 0
            ids += self.encode_as_text(text[start:end], hidden_ids, is_continued=is_later)
        return ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on several cores."""
        for text in texts:
            _require_unicode(text)
        # The "fast" form leaves out character offsets, which nobody here reads.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self._surround(encoding.ids) if add_special_tokens else encoding.ids for encoding in encodings
        ]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, *, at_text_start: bool = False
    ) -> str:
        """Text of `ids`: their bytes put together, with U+FFFD for what is not UTF-8.

        The same text as Detokenizer gives for the same ids, however they are cut up. `at_text_start` says
        that the ids begin a text rather than continue one, so that the space which encoding put before
        the text (SentencePiece vocabularies only) is taken off again.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([self.token_bytes(token_id) for token_id in ids if token_id not in skipped])
        if at_text_start and self.strips_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token; empty for an id without a meaning (a model's vocabulary is often
        padded beyond the tokenizer's)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def whole_text(self, token_id: int) -> str | None:
        """The characters that one token stands for; None if its bytes are not whole characters."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            pass
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._whole_texts[token_id] = text
        return text

    def token_text(self, token_id: int) -> str:
        """One token on its own, for logprobs and display: special tokens are spelled out, bytes that are not
        whole characters are shown as OpenAI does, "bytes:\\xe2\\x80". Empty for an id without a meaning."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = show_bytes(self.token_bytes(token_id))
        return known

    def id_of(self, entry: str) -> int | None:
        """The id of the vocabulary's entry spelled exactly `entry`, special or not, if there is one."""
        return self._backend.token_to_id(entry)

    def special_id_of(self, text: str) -> int | None:
        """The id of the special token spelled exactly `text`, if there is one."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def count_least(self, text: str) -> int:
        """The fewest tokens that `text` can have, told from its length alone; 0 where that tells nothing."""
        if self._longest_token is None or not (text.isascii() or self._keeps_unicode):
            return 0
        return -(-len(text.encode("utf-8", "surrogatepass")) // self._longest_token)

    def _encode_one(self, text: str) -> tokenizers.Encoding:
        # As a batch: only that lets other threads run meanwhile.
        return self._backend.encode_batch([text], add_special_tokens=False)[0]

    def _surround(self, ids: list[int]) -> list[int]:
        return [*self._prefix_ids, *ids, *self._suffix_ids]

    def _spell(self, token_id: int) -> bytes:
        content = self._added.get(token_id)
        if content is not None:
            return self._spelling.spell_added_token(content)
        entry = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return b"" if entry is None else self._spelling.spell_token(entry)


def _bound_cache(backend: tokenizers.Tokenizer) -> None:
    """The library remembers the pieces of words that it met, long after their text is gone: memory that
    would grow over thousands of requests. (Only its Rust half has a public name for this.)"""
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(_CACHE_SIZE)


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text is not valid Unicode: character {error.start} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X})."
        ) from None


def load_tokenizer(
    path: str | Path,
    *,
    generation_config: Mapping[str, object] | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """The tokenizer at `path`: a Hugging Face directory, a .gguf file (or a directory with just one),
    or "bytes".

    `generation_config` replaces the directory's own generation_config.json; its eos_token_id (an id or a
    list) joins `eos_ids`. `vocab_size` matters to "bytes" only. Raises ConfigError if there is no
    tokenizer at `path`, WeightError if there is one that cannot be read.
    """
    if str(path) == BYTES_PATH:
        return byte_tokenizer(vocab_size or _NUM_BYTE_TOKENS)
    # Imported here because both build the class above.
    from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
    from jaxserve.text.hf_tokenizer import tokenizer_from_directory

    path = Path(path).expanduser()
    if path.is_dir():
        gguf_files = list(path.glob("*.gguf"))
        if len(gguf_files) != 1 or (path / "tokenizer.json").is_file():
            return tokenizer_from_directory(path, generation_config=generation_config)
        path = gguf_files[0]
    if not path.is_file():
        raise ConfigError(f"tokenizer-path {str(path)!r} does not exist.", param="tokenizer-path")
    if path.suffix != ".gguf":
        raise ConfigError(
            f"tokenizer-path must be a directory with a tokenizer.json, a .gguf file or 'bytes', "
            f"got the file {str(path)!r}.",
            param="tokenizer-path",
        )
    # The one import of the weights room: its metadata reader is plain Python, and the tokenizer of a GGUF
    # file is inside it. Only when such a file is loaded.
    from jaxserve.weights.gguf import read_gguf_metadata

    return tokenizer_from_gguf(read_gguf_metadata(str(path)), generation_config=generation_config)


_BYTE_SPECIALS = ("<|eos|>", "<|bos|>", "<|pad|>")
_NUM_BYTE_TOKENS = 256 + len(_BYTE_SPECIALS)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer without training: ids 0..255 are the bytes, then come eos, bos and pad.

    For models with random weights. Ids above those exist so that whatever such a model samples has a
    text, "<|300|>"; encoding never produces them. Raises ConfigError if `vocab_size` is below 259.
    """
    if vocab_size < _NUM_BYTE_TOKENS:
        raise ConfigError(
            f"The 'bytes' tokenizer needs a vocabulary of at least {_NUM_BYTE_TOKENS} tokens "
            f"(256 bytes, eos, bos and pad), got {vocab_size}.",
            param="tokenizer-path",
        )
    vocab = {char: byte for byte, char in CHAR_OF_BYTE.items()}
    vocab |= {content: 256 + order for order, content in enumerate(_BYTE_SPECIALS)}
    vocab |= {f"<|{token_id}|>": token_id for token_id in range(_NUM_BYTE_TOKENS, vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(content, special=True, normalized=False) for content in _BYTE_SPECIALS]
    )
    return Tokenizer(
        backend, bos_id=257, eos_ids=[256], chat_template=BYTES_CHAT_TEMPLATE, vocab_size=vocab_size
    )
