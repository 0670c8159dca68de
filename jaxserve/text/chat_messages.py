"""Chat messages as clients send them, put into the form that chat templates expect.

Templates are written against plain dictionaries with conventions of their own: content is a string (or, for
some, a list of parts), tool call arguments are mappings, absent fields are absent rather than null. Used by
text/chat_template.py. Knows nothing of Jinja or of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxserve.errors import InvalidRequestError

_TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
# Between the text parts of one message, where the template wants one string. Each part is usually a
# paragraph or a file of its own, and glued words would change the text.
PART_SEPARATOR = "\n"


@dataclass(frozen=True, slots=True)
class MessageForm:
    """What one template expects of a message.

    `takes_parts`: it walks over lists of content parts. `takes_strings`: it also takes a plain string.
    `knows_developer`: it has a rule for the role "developer". `takes_images`: it says where they are, and the
    model takes them.
    """

    takes_parts: bool = False
    takes_strings: bool = True
    knows_developer: bool = False
    takes_images: bool = False


def prepare_messages(messages: Sequence[Mapping[str, object]], form: MessageForm) -> list[dict[str, object]]:
    """Copies of `messages` in the given form. Raises InvalidRequestError, naming the place, if impossible."""
    if not messages:
        raise InvalidRequestError("messages must hold at least one message, got none.", param="messages")
    return [_prepare(message, form, f"messages[{order}]") for order, message in enumerate(messages)]


def _prepare(message: Mapping[str, object], form: MessageForm, place: str) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"{place}.role must be a string such as 'user', got {role!r}.", param="messages"
        )
    role = role.lower()
    if role == "developer" and not form.knows_developer:
        role = "system"  # OpenAI's newer name for it; most templates would drop the message without a word
    # Templates ask whether a field is there, not whether it is null: leave out what says nothing.
    prepared = {key: value for key, value in message.items() if value is not None}
    prepared |= {"role": role, "content": _prepare_content(message.get("content"), form, place)}
    if prepared.get("tool_calls"):
        prepared["tool_calls"] = _prepare_tool_calls(prepared["tool_calls"], place)
    else:
        prepared.pop("tool_calls", None)
    return prepared


def _prepare_content(content: object, form: MessageForm, place: str) -> object:
    if content is None:
        content = ""
    if isinstance(content, str):
        return content if form.takes_strings else [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InvalidRequestError(
            f"{place}.content must be a string or a list of parts, got {type(content).__name__}.",
            param="messages",
        )
    if form.takes_images and any(_is_image(part) for part in content):
        return [_read_part(part, f"{place}.content[{order}]") for order, part in enumerate(content)]
    texts = [_read_text_part(part, f"{place}.content[{order}]") for order, part in enumerate(content)]
    if form.takes_parts:
        return [{"type": "text", "text": text} for text in texts]
    return PART_SEPARATOR.join(texts)


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and _MEDIA.get(str(part.get("type"))) == "images"


def _read_part(part: object, place: str) -> dict[str, str]:
    """A part as templates know it. What an image is does not concern them."""
    if _is_image(part):
        return {"type": "image"}
    return {"type": "text", "text": _read_text_part(part, place)}


def _read_text_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _MEDIA:
        raise InvalidRequestError(
            f"This model does not accept {_MEDIA[kind]}: {place} is of type {kind!r}. Send text parts only.",
            param="messages",
        )
    text = part.get(_TEXT_FIELDS.get(str(kind), "")) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"{place} must be a part such as {{'type': 'text', 'text': '...'}}, got {_shorten(part)}.",
            param="messages",
        )
    return text


def _prepare_tool_calls(calls: object, place: str) -> list[object]:
    """Tool calls with their arguments parsed: clients send JSON in a string, templates print a mapping."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequestError(
            f"{place}.tool_calls must be a list, got {_shorten(calls)}.", param="messages"
        )
    prepared: list[object] = []
    for order, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequestError(
                f"{place}.tool_calls[{order}] must have a function with a name and arguments.",
                param="messages",
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse_arguments(arguments, f"{place}.tool_calls[{order}].function.arguments")
        prepared.append(
            {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
        )
    return prepared


def _parse_arguments(arguments: str, place: str) -> object:
    if not arguments.strip():
        return {}
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise InvalidRequestError(
            f"{place} must be a JSON object, got {_shorten(arguments)} ({error}).", param="messages"
        ) from None
    except RecursionError:
        raise InvalidRequestError(f"{place} is nested too deeply.", param="messages") from None


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
