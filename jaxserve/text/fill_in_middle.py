"""Fill in the middle: a prompt of what is before and after a gap, for models that were trained for it.

Such a model has tokens that mark the two parts; which ones, tells its family. /v1/completions uses this where
a request has a `suffix`. Knows nothing of requests.

    prefix first (Bavarian et al., 2022)   PREFIX before SUFFIX after MIDDLE -> middle
    suffix first (Mistral)                 SUFFIX after PREFIX before        -> middle
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Family:
    """How one family spells its markers. Without `middle` the suffix comes first. `ends` are further tokens
    with which its models end a middle, or with which text goes on that is none."""

    prefix: str
    suffix: str
    middle: str | None
    ends: tuple[str, ...] = ()


# As each family's model card or tokenizer has them.
_FAMILIES = (
    # Qwen2.5-Coder, CodeGemma, Yi-Coder, Granite 4
    _Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ends=("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    # StarCoder and StarCoder2, Granite Code, Stable Code, Refact
    _Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ends=("<fim_pad>", "<repo_name>", "<file_sep>", "<|endoftext|>"),
    ),
    # SantaCoder
    _Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<fim-pad>", "<|endoftext|>")),
    # Code Llama
    _Family("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    # DeepSeek-Coder and DeepSeek V2, V3
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ends=("<｜end▁of▁sentence｜>",)),
    # Codestral
    _Family("[PREFIX]", "[SUFFIX]", None, ends=("[MIDDLE]",)),
)


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """The markers of one model. `end_ids`: tokens that end a middle; stop at them besides the model's own."""

    prefix_id: int
    suffix_id: int
    middle_id: int | None
    end_ids: tuple[int, ...]

    def encode(self, tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
        """The prompt for what belongs between `prefix` and `suffix`, begun as the model's prompts are.

        No special token and no marker is read in the two texts. Raises InvalidRequestError if one is not
        valid Unicode.
        """
        markers = frozenset(self.end_ids)
        before = tokenizer.encode_as_text(prefix, markers)
        after = tokenizer.encode_as_text(suffix, markers, is_continued=True)
        begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        if self.middle_id is None:
            return [*begin, self.suffix_id, *after, self.prefix_id, *before]
        return [*begin, self.prefix_id, *before, self.suffix_id, *after, self.middle_id]


def find_fill_in_middle(tokenizer: Tokenizer) -> FillInMiddle | None:
    """The markers that a vocabulary has, or None for one without."""
    for family in _FAMILIES:
        names = (family.prefix, family.suffix, family.middle)
        ids = [None if name is None else tokenizer.id_of(name) for name in names]
        prefix_id, suffix_id, middle_id = ids
        if prefix_id is None or suffix_id is None or (middle_id is None and family.middle is not None):
            continue
        known = [tokenizer.id_of(name) for name in (*names, *family.ends) if name is not None]
        end_ids = tuple([token_id for token_id in known if token_id is not None])
        return FillInMiddle(prefix_id, suffix_id, middle_id, end_ids)
    return None
