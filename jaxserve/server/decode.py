"""From request bytes to a schema struct, with every refusal a sentence that names the field.

Called by the routes. Decoding is msgspec's, strict but for integers written as 1.0; its messages are
reworded here. Fields that this version cannot honour are refused from a table, never ignored.
Knows nothing of what the fields mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from jaxserve.errors import InvalidRequestError
from jaxserve.server.schemas import HARMLESS_VALUES

T = TypeVar("T")

_NOUNS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_PATH = r"(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$"
_WRONG_TYPE = re.compile(r"^Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`" + _PATH)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]+)`" + _PATH)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>[^`]+)`" + _PATH)
_OTHER = re.compile(r"^(?P<text>.*?)" + _PATH)

# Values that ask for nothing, whatever the field.
_UNASKED = (None, False, 0, "", [], {})


def decode_body(raw: bytes, body_type: type[T]) -> T:
    """Decode a JSON object; InvalidRequestError when it is malformed or a field has the wrong type."""
    try:
        raw.decode()  # msgspec does not look into keys and values that it skips
        try:
            return msgspec.json.decode(raw, type=body_type)
        except msgspec.ValidationError as error:
            if "`int" in str(error) and "got `float`" in str(error):
                return _decode_with_whole_floats(raw, body_type)
            raise
    except msgspec.ValidationError as error:
        raise _explain(error, body_type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None


def decode_request(raw: bytes, body_type: type[T], refusals: Mapping[str, str]) -> T:
    """`decode_body`, then `refuse_unsupported` with the refusals of the route."""
    body = decode_body(raw, body_type)
    refuse_unsupported(raw, refusals)
    return body


def _decode_with_whole_floats(raw: bytes, body_type: type[T]) -> T:
    """The slow path for clients (JavaScript, jq) that write an integer as 1.0."""
    return msgspec.convert(_whole_floats_to_ints(msgspec.json.decode(raw)), body_type, str_keys=True)


def _whole_floats_to_ints(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_whole_floats_to_ints(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_floats_to_ints(item) for key, item in value.items()}
    return value


def refuse_unsupported(raw: bytes, refusals: Mapping[str, str]) -> None:
    """Raise for a top-level field that asks for something this version lacks.

    `refusals` maps a field to the end of the sentence "FIELD is not supported ...". Null, false, 0
    and empty values pass, and so do those in HARMLESS_VALUES. `raw` must already have been decoded.
    """
    fields = decode_body(raw, dict[str, msgspec.Raw])
    for name in fields.keys() & refusals.keys():
        refuse_value(name, decode_body(bytes(fields[name]), object), refusals[name])


def refuse_value(name: str, value: Any, remedy: str) -> None:
    """Raise InvalidRequestError unless the value asks for nothing."""
    items = value if isinstance(value, list) else [value]
    if value in HARMLESS_VALUES.get(name, ()) or all(item in _UNASKED for item in items):
        return
    raise InvalidRequestError(f"{name} is not supported {remedy}", param=name)


def _explain(error: msgspec.ValidationError, body_type: type) -> InvalidRequestError:
    message = str(error)
    if match := _UNKNOWN.match(message):
        return _explain_unknown(match["field"], _tidy(match["path"]), body_type)
    if match := _MISSING.match(message):
        name = ".".join(filter(None, [_tidy(match["path"]), match["field"]]))
        return InvalidRequestError(f"{name} is required.", param=name)
    if match := _WRONG_TYPE.match(message):
        want, got = _name_types(match["want"]), _name_types(match["got"])
        path = _tidy(match["path"])
        if match["key"]:
            return InvalidRequestError(f"The keys of {path} must be {want}, got {got}.", param=path)
        if not path:
            return InvalidRequestError(f"The request body must be a JSON object, got {got}.")
        return InvalidRequestError(f"{path} must be {want}, got {got}.", param=path)
    match = _OTHER.match(message)
    path = _tidy(match["path"]) if match else ""
    text = match["text"] if match else message
    return InvalidRequestError(f"{path or 'The request body'} is invalid: {text}.", param=path or None)


def _explain_unknown(field: str, path: str, body_type: type) -> InvalidRequestError:
    name = f"{path}.{field}" if path else field
    known = _field_names(body_type)
    near = _ALIASES.get(field) or next(iter(difflib.get_close_matches(field, known, n=1, cutoff=0.6)), None)
    hint = f" Did you mean {near}?" if near else ""
    return InvalidRequestError(f"{name} is not a known field.{hint}", param=name)


# What other servers call our sampling fields, where spelling alone would not lead there.
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}


@cache
def _field_names(body_type: type) -> list[str]:
    """Field names of the struct and of the structs it holds (only one of ours forbids unknown fields)."""
    definitions = msgspec.json.schema_components([body_type])[1]
    strict = [entry for entry in definitions.values() if entry.get("additionalProperties") is False]
    return [name for entry in strict for name in entry["properties"]]


def _name_types(names: str) -> str:
    nouns = [_NOUNS.get(name.strip(), name.strip()) for name in names.split("|")]
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} or {nouns[-1]}"


def _tidy(path: str | None) -> str:
    return (path or "").lstrip(".")
