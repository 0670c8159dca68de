"""Chat messages to prompt text, by the model's own Jinja template.

Used by the HTTP side and the library before tokenising (with add_special_tokens=False: a template writes the
beginning-of-sequence token itself). The template runs in a sandbox and sees only the request's plain data.
The environment is the one that templates are written for, transformers'. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.text.chat_messages import MessageForm, prepare_messages
from jaxserve.text.tokenizer import Tokenizer

BUILTIN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}
# What a template that meets data it was not written for can raise: its own raise_exception and Jinja's
# errors, or Python's from an operation inside it ('str' + None, a missing key, a date format).
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
_RESERVED_KWARGS = ("messages", "tools")
# Of a rendered conversation; no context holds as much. Indented JSON, which many templates make of tools, can
# be a thousand times as long as what was sent, and while it is written nobody else is served.
_MAX_CHARS = 64 * 2**20
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class ChatTemplate:
    """One model's template, compiled. `source` None stands for a model without one. If the model takes images
    (`takes_images`), parts of messages that are images go to the template, if it takes parts.

    Raises ConfigError if the source is not valid Jinja.
    """

    def __init__(self, source: str | None, bos_token: str, eos_token: str, *, takes_images: bool = False):
        self.source = source
        self._special_tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: jinja2.Template | None = None
        self._form = MessageForm()
        if source is None:
            return
        environment = _make_environment()
        source = _drop_generation_tags(source)
        try:
            form = read_message_form(environment.parse(source))
            self._form = replace(form, takes_images=takes_images and form.takes_parts)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template is not valid Jinja: {error.message} (line {error.lineno}).",
                param="chat-template",
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for `messages` (OpenAI's form: role, content, tool_calls ...).

        `tools` are OpenAI tool objects. `continue_final_message` takes the last message, which must be the
        assistant's, as the beginning of the reply: its words, just as they are, follow the generation
        prompt, and no turn is closed after them. `extra_kwargs` are further variables for the template
        (chat_template_kwargs).
        Raises InvalidRequestError, with the template's own sentence if it has one.
        """
        if self._template is None:
            raise InvalidRequestError(
                "This model has no chat template, so it cannot take chat messages. Start the server with "
                "--chat-template (a .jinja file or 'chatml'), or send a prompt instead.",
                param="messages",
            )
        for name in _RESERVED_KWARGS:
            if extra_kwargs and name in extra_kwargs:
                raise InvalidRequestError(
                    f"chat_template_kwargs must not set {name!r}; use the request's own field.",
                    param="chat_template_kwargs",
                )
        prepared = prepare_messages(messages, self._form)
        variables = {
            **self._special_tokens,
            "add_generation_prompt": add_generation_prompt,
            **(extra_kwargs or {}),
            "messages": prepared,
        }
        reply_so_far = ""
        if continue_final_message:
            reply_so_far = _read_final_message(messages[-1])
            variables |= {"add_generation_prompt": True, "messages": prepared[:-1]}
        return self._render_with_tools(self._template, variables, tools) + reply_so_far

    def _render_with_tools(
        self,
        template: jinja2.Template,
        variables: dict[str, object],
        tools: Sequence[Mapping[str, object]] | None,
    ) -> str:
        try:
            # As one dict, so that a variable may have any name ("self").
            return _join(template.generate({**variables, "tools": list(tools) if tools else None}))
        except _RENDER_ERRORS as error:
            first_error = error
        # A few templates want the bare functions rather than OpenAI's wrapper around each.
        functions = [tool["function"] for tool in tools or () if isinstance(tool.get("function"), Mapping)]
        if functions:
            try:
                return _join(template.generate({**variables, "tools": functions}))
            except _RENDER_ERRORS:
                pass  # the first attempt's sentence is the one about what was sent
        raise InvalidRequestError(
            f"The chat template cannot render these messages: {_describe(first_error)}", param="messages"
        ) from None


def load_chat_template(
    choice: str | None, tokenizer: Tokenizer, *, takes_images: bool = False
) -> ChatTemplate:
    """The template that --chat-template chooses, or the tokenizer's own if `choice` is None.

    `choice` is a built-in name ("chatml"), the path of a Jinja file, or the template itself.
    Raises ConfigError if it is none of these.
    """
    source = tokenizer.chat_template if choice is None else _find_template(choice)
    return ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token, takes_images=takes_images)


def read_message_form(tree: nodes.Template) -> MessageForm:
    """What a parsed template expects of a message's content.

    It takes parts if it loops over a message's content, and strings too unless it does so without ever
    asking whether the content is a string.
    """
    names = {"content"}  # what macros call their argument
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    takes_parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    asks = any(test.name == "string" and _is_content(test.node, names) for test in tree.find_all(nodes.Test))
    knows_developer = any(const.value == "developer" for const in tree.find_all(nodes.Const))
    return MessageForm(takes_parts, takes_strings=asks or not takes_parts, knows_developer=knows_developer)


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a message's content: m.content, m['content'], or a name that stands for it."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _find_template(choice: str) -> str:
    if choice in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[choice]
    if "{{" in choice or "{%" in choice:
        return choice
    path = Path(choice).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat-template must be a built-in name ({', '.join(BUILTIN_TEMPLATES)}), a Jinja file or the "
            f"template itself, got {choice!r}: {error}.",
            param="chat-template",
        ) from None


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _dump_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _format_now
    return environment


def _drop_generation_tags(source: str) -> str:
    """Make {% generation %} blocks, which mark the assistant's words for training, into plain blocks."""
    return _GENERATION_TAG.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", source
    )


def _dump_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes for HTML, which a prompt is not."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return encoder.encode(value) if indent is None else _join(encoder.iterencode(value))


def _join(pieces: Iterable[str]) -> str:
    """Pieces of a prompt, unless they grow too long. Raises InvalidRequestError."""
    taken: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > _MAX_CHARS:
            raise InvalidRequestError(
                f"The chat template makes more than {_MAX_CHARS} characters of these messages and tools.",
                param="messages",
            )
        taken.append(piece)
    return "".join(taken)


def _raise_template_error(message: str) -> str:
    raise jinja2.TemplateError(message)


def _format_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _describe(error: Exception) -> str:
    sentence = str(error).strip() or type(error).__name__
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."


def _read_final_message(message: Mapping[str, object]) -> str:
    """The words of an assistant's message that the reply goes on with."""
    prepared = prepare_messages([message], MessageForm())[0]
    role = prepared["role"]
    if role != "assistant":
        raise InvalidRequestError(
            f"continue_final_message needs the last message to be the assistant's, its role is {role!r}.",
            param="continue_final_message",
        )
    for name in ("tool_calls", "reasoning_content"):
        if prepared.get(name):
            raise InvalidRequestError(
                f"continue_final_message goes on with the last message's content; its {name} cannot be kept.",
                param="continue_final_message",
            )
    return str(prepared["content"])
