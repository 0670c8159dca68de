"""Make the golden token ids in tests/text/goldens/, from the reference implementations.

Run by hand when a golden must change, in an environment that has what each part names; the test suite
needs none of it:

    python tests/text/make_goldens.py real qwen2.5-coder-0.5b-instruct FILE.gguf   (transformers 5, torch)
    python tests/text/make_goldens.py real smollm2-135m-instruct FILE.gguf
    python tests/text/make_goldens.py sentencepiece                                (sentencepiece)

"real" loads the GGUF file with transformers' AutoTokenizer and then sets the two things that its GGUF
loader leaves out and the models' published tokenizer.json has: Qwen2.5 composes text (NFC) first, and
SmolLM2 cuts every digit off on its own. "sentencepiece" trains a small BPE vocabulary with the settings of
Llama 2 on text of the standard library, and encodes with SentencePiece itself.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"
QUESTION = "What is the capital of France?"
STRINGS = [
    "",
    " ",
    "The capital of France is",
    "  two spaces before, and after  ",
    "I'm sure they'll say it's FINE; don't you? WE'VE said so.",
    "def add(a, b):\n\treturn a + b\n\n\nclass A:\n    x  = 0x1F  # 12345 67.89\n",
    "one\r\ntwo\n\rthree\u2028four\t\tfive   \n   six",
    "3 33 333 3333 1,000,000.50 ½ ² ٣٤٥ 一二三",
    "人工智能正在改变世界。你好，世界！",
    "吾輩は猫である。名前はまだ無い。カタカナ、ｶﾀｶﾅ",
    "مرحبا بالعالم، كيف حالك؟",
    "Привет, мир! Здравствуйте. Ελληνικά हिन्दी ไทย 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 e\u0301 e\u0308 \u00e9",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><tool_call>{}</tool_call> <|not_a_token|>",
    '{"a": [1, 2.5e-3, null], \'b\': "\\u00e9"} </s> <s> <unk> [PAD] <0x41>',
    "\u00a0\u200b\ufeffzero\u200dwidth\u0000nul \U0010ffff",
    "a" * 40 + "=" * 33 + " " * 17 + "\n" * 9 + "end",
]


def make_real(name: str, file: Path) -> dict:
    """Ids of STRINGS and of the rendered chat question, by transformers from the GGUF file."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    if name.startswith("qwen2"):
        backend.normalizer = normalizers.NFC()
    if name.startswith("smollm2"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    messages = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {
        "encoded": [
            {"text": text, "ids": backend.encode(text, add_special_tokens=False).ids} for text in STRINGS
        ],
        "chat": {
            "messages": messages,
            "text": chat,
            "ids": backend.encode(chat, add_special_tokens=False).ids,
        },
    }


def make_sentencepiece() -> dict:
    """A vocabulary of 700 pieces in GGUF's terms, and ids of STRINGS by SentencePiece."""
    import pydoc_data.topics

    import sentencepiece  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join([*pydoc_data.topics.topics.values(), *STRINGS[1:]]), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder) / "tiny"),
            model_type="bpe",
            vocab_size=700,
            character_coverage=0.995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["<tool_call>"],
            num_threads=1,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tiny.model"))
    kinds = [_kind_of_piece(model, token_id) for token_id in range(len(model))]
    # Added tokens inside a text differ on purpose: control tokens spelled out are text to SentencePiece, and
    # the space prefix follows each added token in llama.cpp and in Llama 2's tokenizer.json. Leave such
    # texts out.
    texts = [
        text for text in STRINGS if not {"<s>", "<tool_call>", "\u0000"} & set(re.findall(r"<\w+>|\0", text))
    ]
    return {
        "tokens": [model.id_to_piece(token_id) for token_id in range(len(model))],
        "scores": [model.get_score(token_id) for token_id in range(len(model))],
        "token_type": kinds,
        "encoded": [
            {"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))}
            for text in texts
        ],
    }


def _kind_of_piece(model, token_id: int) -> int:
    """The GGUF token type of a piece."""
    if model.is_unknown(token_id):
        return 2
    if model.is_control(token_id):
        return 3
    if model.is_byte(token_id):
        return 6
    return 4 if model.id_to_piece(token_id) == "<tool_call>" else 1


def main() -> None:
    kind, *rest = sys.argv[1:] or ["help"]
    if kind == "real" and len(rest) == 2:
        name, golden = rest[0], make_real(rest[0], Path(rest[1]))
    elif kind == "sentencepiece":
        name, golden = "sentencepiece", make_sentencepiece()
    else:
        sys.exit(__doc__)
    GOLDENS.mkdir(exist_ok=True)
    lines = json.dumps(golden, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"')
    (GOLDENS / f"{name}.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
