"""A model directory's tokenizer: which file decides what, and what happens when one is missing or broken."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import WeightError
from jaxserve.text.token_spelling import CHAR_OF_BYTE
from jaxserve.text.tokenizer import load_tokenizer

BOS, EOS, PAD = 256, 257, 258


def byte_level_backend() -> Tokenizer:
    """The 256 bytes, then <s>, </s> and <pad>, all three declared special."""
    vocab = {char: byte for byte, char in CHAR_OF_BYTE.items()} | {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(content, special=True) for content in ("<s>", "</s>", "<pad>")])
    return backend


@pytest.fixture
def folder(tmp_path):
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, **files: object) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def test_tokenizer_json_alone_is_enough(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hi") == [104, 105]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, (), None)
    assert tokenizer.special_ids == {BOS, EOS, PAD}
    assert tokenizer.vocab_size == 259


def test_the_end_of_sequence_ids_of_all_files_count_the_tokenizers_first(folder):
    write(
        folder,
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [5, EOS]},
        config={"eos_token_id": 6, "text_config": {"eos_token_id": [7]}},
    )
    assert load_tokenizer(folder).eos_ids == (EOS, 5, 6, 7)
    assert load_tokenizer(folder, generation_config={"eos_token_id": 8}).eos_ids == (EOS, 8, 6, 7)


def test_special_tokens_map_names_what_the_config_leaves_out(folder):
    write(
        folder,
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
        tokenizer_config={"bos_token": None},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_what_is_put_around_a_prompt_comes_from_the_post_processor_or_the_config(folder):
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    backend.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert load_tokenizer(folder).encode("a") == [BOS, 97, EOS]
    assert load_tokenizer(folder).encode("") == [BOS, EOS]
    assert load_tokenizer(folder).encode("a", add_special_tokens=False) == [97]

    write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False})
    assert load_tokenizer(folder).encode("a") == [97, EOS]
    assert not load_tokenizer(folder).add_bos


def test_added_tokens_of_the_config_are_added_under_their_ids(folder):
    declared = {
        "259": {"content": "<|im_end|>", "special": True},
        "260": {"content": "<think>", "special": False},
        "256": {"content": "<s>", "special": True},
    }
    write(folder, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": declared})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_end|><think>") == [259, 260]
    assert tokenizer.decode([259, 260]) == "<think>"

    write(folder, tokenizer_config={"added_tokens_decoder": {"300": {"content": "<new>"}}})
    with pytest.raises(WeightError, match=r"'<new>' the id 300, but in tokenizer.json its id is 259"):
        load_tokenizer(folder)


def test_saved_truncation_and_padding_are_undone(folder):
    backend = byte_level_backend()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=8, pad_id=PAD, pad_token="<pad>")
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("abcd") == [97, 98, 99, 100]


def test_the_chat_template_file_comes_before_the_configs(folder):
    named = [{"name": "rag", "template": "RAG"}, {"name": "default", "template": "DEFAULT"}]
    write(folder, tokenizer_config={"chat_template": named})
    assert load_tokenizer(folder).chat_template == "DEFAULT"
    write(folder, tokenizer_config={"chat_template": "ONE"})
    assert load_tokenizer(folder).chat_template == "ONE"
    (folder / "chat_template.jinja").write_text("FILE", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "FILE"


def test_a_sentencepiece_style_directory_spells_spaces_and_bytes(folder):
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6}
    merges = [("▁", "a")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("a aé")
    assert ids == [4, 4, 5, 6]
    assert tokenizer.decode(ids, at_text_start=True) == "a aé"
    assert tokenizer.decode(ids) == " a aé"


def test_a_decoder_that_cannot_be_streamed_is_refused(folder):
    backend = byte_level_backend()
    backend.decoder = decoders.CTC()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(WeightError, match=r"decoder \(CTC\) is not one that can be streamed"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config", "config"])
def test_a_truncated_file_is_named(folder, name):
    file = folder / f"{name}.json"
    file.write_text('{"model": {"vocab"', encoding="utf-8")
    with pytest.raises(WeightError, match=rf"{name}.json of .* cannot be read.*Fetch it again"):
        load_tokenizer(folder)


def test_a_file_of_the_wrong_kind_is_named(folder):
    write(folder, config=[1, 2])
    with pytest.raises(WeightError, match=r"config.json of .* must hold a JSON object, not list"):
        load_tokenizer(folder)


def test_an_older_vocabulary_is_converted_by_transformers(tmp_path):
    vocab = {char: byte for byte, char in CHAR_OF_BYTE.items()} | {"hi": 256, "<|endoftext|>": 257}
    write(tmp_path, vocab=vocab, config={"model_type": "gpt2"})
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi hi") == [256, 32, 256]
    assert tokenizer.eos_ids == (257,)


def test_an_older_vocabulary_that_cannot_be_converted_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    write(tmp_path, config={"model_type": "llama"}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(
        WeightError, match=r"no tokenizer.json, and its tokenizer.model could not be converted"
    ):
        load_tokenizer(tmp_path)
