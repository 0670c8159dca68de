"""The tokenizer inside a GGUF file, rebuilt from the file's metadata.

A GGUF file names a vocabulary kind (tokenizer.ggml.model) and, for byte-level BPE, how text is cut up before
merging (tokenizer.ggml.pre); it does not hold the rules themselves. The rules here are those of the
tokenizer.json that each model was published with, as llama.cpp identifies them. A name that is not in the
table is an error: guessing would give a model tokens it was not trained on. Called by
text/tokenizer.load_tokenizer. Knows nothing of reading files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.errors import WeightError
from jaxserve.text.hf_tokenizer import read_eos_ids
from jaxserve.text.token_spelling import SPACE_MARK
from jaxserve.text.tokenizer import Tokenizer

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ANY_CASE_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORDS_AND_SPACES}"
_LLAMA3 = rf"{_ANY_CASE_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS_AND_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_CASED_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ANY_CASE_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ANY_CASE_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_SPACES}"
)


@dataclass(frozen=True, slots=True)
class _Rules:
    """How one family of byte-level vocabularies cuts text up, and what its files leave unsaid."""

    splits: tuple[str, ...]  # regular expressions, each applied inside the pieces of the one before
    is_nfc: bool = False  # text is put in Unicode's composed form first
    ignores_merges: bool = False  # a piece that is an entry as a whole becomes it without merging
    adds_bos: bool = False  # where the file has no add_bos_token


_RULES_QWEN2 = _Rules((_QWEN2,), is_nfc=True)
_RULES_LLAMA3 = _Rules((_LLAMA3,), ignores_merges=True, adds_bos=True)
_RULES_GPT2 = _Rules((_GPT2,))
_RULES_SINGLE_DIGITS = _Rules((r"\p{N}", _GPT2))
_RULES_GPT4O = _Rules((_GPT4O,))
_RULES_BY_PRE: dict[str, _Rules] = {
    # What llama.cpp does with files that predate tokenizer.ggml.pre.
    "default": _Rules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _RULES_GPT2,
    "phi-2": _RULES_GPT2,
    "mpt": _RULES_GPT2,
    "olmo": _RULES_GPT2,
    "llama-bpe": _RULES_LLAMA3,
    "llama3": _RULES_LLAMA3,
    "llama-v3": _RULES_LLAMA3,
    "falcon3": _RULES_LLAMA3,
    "qwen2": _RULES_QWEN2,
    "deepseek-r1-qwen": _RULES_QWEN2,
    "smollm": _RULES_SINGLE_DIGITS,
    "starcoder": _RULES_SINGLE_DIGITS,
    "refact": _RULES_SINGLE_DIGITS,
    "codeshell": _RULES_SINGLE_DIGITS,
    "exaone": _RULES_SINGLE_DIGITS,
    "tekken": _Rules((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "gpt-4o": _RULES_GPT4O,
    "llama4": _RULES_GPT4O,
}

# Control tokens that end a turn whichever model they belong to. A GGUF file names one eos id, where the
# model's generation_config.json (which it does not carry) often lists several; llama.cpp goes by these too.
_TURN_ENDS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
    "<end_of_turn>",
    "</s>",
    "<eos>",
)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The arrays of the file: entry i is spelled tokens[i], and so on."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str] | None

    def entries(self) -> dict[str, int]:
        """Spelling to id. Unused ids (padding) are left out: nothing may encode to them."""
        return {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != _UNUSED
        }

    def added_tokens(self) -> list[AddedToken]:
        return [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
        ]


def tokenizer_from_gguf(
    metadata: Mapping[str, object], *, generation_config: Mapping[str, object] | None = None
) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    `metadata` maps GGUF keys to plain values, arrays as lists. `generation_config` adds its eos ids.
    Raises WeightError if a key is missing or of the wrong kind, or if the vocabulary or its
    pre-tokenizer is of a kind not known here.
    """
    vocabulary = _read_vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        rules = _rules_for(metadata.get("tokenizer.ggml.pre"))
        backend = _build_byte_level(vocabulary, rules)
        adds_bos = rules.adds_bos
    elif kind == "llama":
        backend = _build_sentencepiece(vocabulary, metadata)
        adds_bos = True
    else:
        raise WeightError(
            f"tokenizer.ggml.model is {kind!r}, which is not a vocabulary known here; 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece BPE) are. Name a directory with the model's tokenizer.json "
            "with --tokenizer-path."
        )
    added = vocabulary.added_tokens()
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])

    bos_id = _read_id(metadata, "bos_token_id", vocabulary)
    eos_id = _read_id(metadata, "eos_token_id", vocabulary)
    adds_bos = _read_flag(metadata, "add_bos_token", adds_bos) and bos_id is not None
    adds_eos = _read_flag(metadata, "add_eos_token", False) and eos_id is not None
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[*_find_eos_ids(metadata, vocabulary, eos_id), *read_eos_ids(generation_config)],
        prefix_ids=[bos_id] if adds_bos and bos_id is not None else [],
        suffix_ids=[eos_id] if adds_eos and eos_id is not None else [],
        chat_template=template if isinstance(template, str) else None,
        vocab_size=len(vocabulary.tokens),
    )


def _rules_for(pre: object) -> _Rules:
    rules = _RULES_BY_PRE.get(str(pre)) if pre else _RULES_BY_PRE["default"]
    if rules is None:
        raise WeightError(
            f"tokenizer.ggml.pre is {pre!r}, which is not a pre-tokenizer known here; known are "
            f"{', '.join(sorted(_RULES_BY_PRE))}. Name a directory with the model's tokenizer.json with "
            "--tokenizer-path."
        )
    return rules


def _build_byte_level(vocabulary: _Vocabulary, rules: _Rules) -> Backend:
    if vocabulary.merges is None:
        raise WeightError("The GGUF file has no tokenizer.ggml.merges, which a 'gpt2' vocabulary needs.")
    entries = vocabulary.entries()
    merges = _read_merges(vocabulary.merges, entries)
    backend = Backend(models.BPE(vocab=entries, merges=merges, ignore_merges=rules.ignores_merges))
    if rules.is_nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rules.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, object]) -> Backend:
    """SentencePiece BPE: the two neighbours whose union scores highest merge first, the leftmost on ties.

    A text, and each run of it between special tokens, gets one space in front unless add_space_prefix is
    false, as SentencePiece's dummy prefix and llama.cpp have it.
    """
    entries = vocabulary.entries()
    if vocabulary.merges is None:
        merges = _merges_from_scores(vocabulary, entries)
    else:
        merges = _read_merges(vocabulary.merges, entries)
    unknown_id = _read_id(metadata, "unknown_token_id", vocabulary)
    unknown = None if unknown_id is None else vocabulary.tokens[unknown_id]
    has_byte_tokens = _BYTE in vocabulary.types
    backend = Backend(
        models.BPE(
            vocab=entries, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_byte_tokens
        )
    )
    has_space_prefix = _read_flag(metadata, "add_space_prefix", True)
    to_marks = normalizers.Replace(" ", SPACE_MARK)
    prefix = [normalizers.Prepend(SPACE_MARK)] if has_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, to_marks])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if has_space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _read_merges(merges: list[str], entries: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that the file's merges spell, checked: the tokenizers library panics on broken ones."""
    pairs: list[tuple[str, str]] = []
    for order, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not (left in entries and right in entries and left + right in entries):
            raise WeightError(
                f"tokenizer.ggml.merges[{order}] is {merge!r}, which does not join two entries of the "
                "vocabulary into a third: the file is damaged."
            )
        pairs.append((left, right))
    return pairs


def _merges_from_scores(vocabulary: _Vocabulary, entries: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to cut an entry into two entries, best score first: the order in which SentencePiece
    merges. Only ordinary entries take part; the rest are matched whole or by byte."""
    if not vocabulary.scores:
        raise WeightError("The GGUF file has neither tokenizer.ggml.merges nor tokenizer.ggml.scores.")
    ordinary = {token for token, token_id in entries.items() if vocabulary.types[token_id] == 1}
    ranked = sorted(ordinary, key=lambda token: (-vocabulary.scores[entries[token]], entries[token]))
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in ordinary and token[cut:] in ordinary
    ]


def _find_eos_ids(metadata: Mapping[str, object], vocabulary: _Vocabulary, eos_id: int | None) -> list[int]:
    stated = [eos_id, *(_read_id(metadata, key, vocabulary) for key in ("eot_token_id", "eom_token_id"))]
    known_ends = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == _CONTROL and token in _TURN_ENDS
    }
    return [token_id for token_id in stated if token_id is not None] + list(known_ends.values())


def _read_vocabulary(metadata: Mapping[str, object]) -> _Vocabulary:
    tokens = _read_array(metadata, "tokens")
    if tokens is None:
        raise WeightError("The GGUF file has no tokenizer.ggml.tokens: it carries no tokenizer.")
    types = _read_array(metadata, "token_type") or [1] * len(tokens)
    scores = _read_array(metadata, "scores") or []
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise WeightError(
                f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens: it is damaged."
            )
    return _Vocabulary(tokens, types, scores, _read_array(metadata, "merges"))


def _read_array(metadata: Mapping[str, object], name: str) -> list | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, list):
        raise WeightError(f"tokenizer.ggml.{name} must be an array, not {type(value).__name__}.")
    return value


def _read_flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}")
    return default if value is None else bool(value)


def _read_id(metadata: Mapping[str, object], name: str, vocabulary: _Vocabulary) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(vocabulary.tokens):
        raise WeightError(
            f"tokenizer.ggml.{name} must be a token id in [0, {len(vocabulary.tokens)}), got {value!r}."
        )
    return value
