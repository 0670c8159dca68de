"""The tokenizer in a Hugging Face model directory.

Reads tokenizer.json, and beside it tokenizer_config.json, special_tokens_map.json, config.json,
generation_config.json and chat_template.jinja, each of which may be missing. Called by
text/tokenizer.load_tokenizer. Knows nothing of GGUF files, of hubs or of weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from jaxserve.errors import ConfigError, WeightError
from jaxserve.text.tokenizer import Tokenizer

# The single named special tokens of tokenizer_config.json and special_tokens_map.json.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Vocabularies in forms that only transformers knows how to convert.
_CONVERTIBLE_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def tokenizer_from_directory(
    folder: Path, *, generation_config: Mapping[str, object] | None = None
) -> Tokenizer:
    """The tokenizer of the model in `folder`.

    `generation_config` stands in for the folder's generation_config.json. Raises ConfigError if the folder
    holds no tokenizer, WeightError (with the file's name) if a file cannot be read.
    """
    settings = read_json_object(folder / "special_tokens_map.json")
    own = read_json_object(folder / "tokenizer_config.json")
    settings |= {name: value for name, value in own.items() if value is not None}
    if generation_config is None:
        generation_config = read_json_object(folder / "generation_config.json")
    backend = _read_backend(folder)
    backend.no_truncation()  # both can be saved in tokenizer.json, and neither belongs in a server
    backend.no_padding()
    _add_missing_tokens(backend, settings)

    bos_id = _id_of_named(backend, settings, "bos_token")
    eos_id = _id_of_named(backend, settings, "eos_token")
    model_config = read_json_object(folder / "config.json")
    eos_ids = [
        *([] if eos_id is None else [eos_id]),
        *read_eos_ids(generation_config),
        *read_eos_ids(model_config),
        *read_eos_ids(model_config.get("text_config")),
    ]
    prefix_ids, suffix_ids = _read_surroundings(backend, settings, bos_id, eos_id)
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        chat_template=_read_chat_template(folder, settings),
    )


def read_eos_ids(config: object) -> list[int]:
    """The `eos_token_id` of a config: none, one id or a list of ids."""
    value = config.get("eos_token_id") if isinstance(config, Mapping) else None
    values: Iterable[object] = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file. Raises WeightError if it is not an object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightError(f"{path.name} of {path.parent} cannot be read: {error}. Fetch it again.") from None
    if not isinstance(value, dict):
        raise WeightError(
            f"{path.name} of {path.parent} must hold a JSON object, not {type(value).__name__}."
        )
    return value


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_buffer(file.read_bytes())
        except (OSError, ValueError) as error:
            raise WeightError(
                f"tokenizer.json of {folder} cannot be read: {error}. Fetch it again."
            ) from None
    found = [name for name in _CONVERTIBLE_FILES if (folder / name).is_file()]
    if not found:
        raise ConfigError(
            f"{folder} holds no tokenizer: neither tokenizer.json nor {', '.join(_CONVERTIBLE_FILES)}. "
            "Name another source with --tokenizer-path ('bytes' for a model with random weights).",
            param="tokenizer-path",
        )
    return _convert_with_transformers(folder, found[0])


def _convert_with_transformers(folder: Path, found: str) -> tokenizers.Tokenizer:
    """Convert an older vocabulary. The slow road (seconds of imports), hence never the common one."""
    try:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        sentence = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightError(
            f"{folder} has no tokenizer.json, and its {found} could not be converted: {sentence} "
            "Add a tokenizer.json, or install sentencepiece and protobuf."
        ) from None
    return backend


def _add_missing_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, object]) -> None:
    """Register the added tokens that only the configuration files know of, under the ids they state."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = settings.get("added_tokens_decoder")
    for token_id, entry in sorted(_read_declared(declared).items()):
        token = _read_added_token(entry)
        if token.content in known:
            continue
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        known.add(token.content)
        if backend.token_to_id(token.content) != token_id:
            raise WeightError(
                f"tokenizer_config.json gives the added token {token.content!r} the id {token_id}, but in "
                f"tokenizer.json its id is {backend.token_to_id(token.content)}: the two files do not match."
            )
    for content in _named_contents(settings):
        # A name whose token is not in the vocabulary has no embedding either: leave it out.
        if content not in known and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _read_declared(declared: object) -> dict[int, Mapping[str, object]]:
    if not isinstance(declared, Mapping):
        return {}
    return {
        int(key): entry for key, entry in declared.items() if isinstance(entry, Mapping) and key.isdigit()
    }


def _read_added_token(entry: Mapping[str, object]) -> AddedToken:
    special = bool(entry.get("special", False))
    return AddedToken(
        str(entry.get("content", "")),
        special=special,
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", not special)),
    )


def _named_contents(settings: Mapping[str, object]) -> list[str]:
    extra = settings.get("additional_special_tokens")
    values = [settings.get(name) for name in _NAMED_TOKENS] + (extra if isinstance(extra, list) else [])
    return [content for value in values if (content := _content_of(value)) is not None]


def _content_of(value: object) -> str | None:
    """A special token is written as its text or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_of_named(backend: tokenizers.Tokenizer, settings: Mapping[str, object], name: str) -> int | None:
    content = _content_of(settings.get(name))
    return None if content is None else backend.token_to_id(content)


def _read_surroundings(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, object],
    bos_id: int | None,
    eos_id: int | None,
) -> tuple[list[int], list[int]]:
    """The ids put before and after a prompt: what tokenizer.json's post-processor adds, unless
    tokenizer_config.json says add_bos_token or add_eos_token outright (transformers' order)."""
    bare = backend.encode("a", add_special_tokens=False).ids
    dressed = backend.encode("a", add_special_tokens=True).ids
    num_around = len(dressed) - len(bare)
    start = next((at for at in range(num_around + 1) if dressed[at : at + len(bare)] == bare), 0)
    prefix_ids, suffix_ids = dressed[:start], dressed[start + len(bare) :]
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    if isinstance(add_bos, bool):
        prefix_ids = [bos_id] if add_bos and bos_id is not None else []
    if isinstance(add_eos, bool):
        suffix_ids = [eos_id] if add_eos and eos_id is not None else []
    return prefix_ids, suffix_ids


def _read_chat_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json; of several named
    templates the one called "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise WeightError(f"chat_template.jinja of {folder} cannot be read: {error}.") from None
    value = read_json_object(folder / "chat_template.json").get(
        "chat_template", settings.get("chat_template")
    )
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None
