"""Chat messages to prompt text: what templates are given, what they may do, whose mistake a failure is."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.text import chat_template
from jaxserve.text.chat_template import BUILTIN_TEMPLATES, ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import byte_tokenizer

PRINT_ROLES = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
PRINT_PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.type }} {{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
HI = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict] = HI, **options) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


def parts(*texts: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


def test_chatml():
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(BUILTIN_TEMPLATES["chatml"], messages) == turns + "<|im_start|>assistant\n"
    assert render(BUILTIN_TEMPLATES["chatml"], messages, add_generation_prompt=False) == turns


def test_templates_find_what_transformers_gives_them():
    assert render("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "<s></s>True"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"  # trim_blocks, lstrip_blocks
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'  # neither HTML nor ASCII
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert (
        render("a{%- generation -%} b {%- endgeneration %} c{% generation %}d{% endgeneration %}") == "ab cd"
    )
    assert render("{{ name | upper }}", extra_kwargs={"name": "x"}) == "X"


def test_the_templates_own_sentence_reaches_the_client():
    source = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match=r"cannot render these messages: Roles must alternate\."):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ 'a' + 1 }}", "{{ messages[7].content.x }}", "{{ 1 // 0 }}", "{{ none.x.y }}"]
)
def test_a_template_that_fails_is_an_invalid_request(source):
    with pytest.raises(InvalidRequestError, match=r"The chat template cannot render these messages: .+"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ ('x' | attr('__class__')).mro }}",
        "{% include '/etc/hostname' %}",
        "{{ range(10000000) | length }}",
    ],
)
def test_templates_reach_neither_files_nor_python(source):
    with pytest.raises(InvalidRequestError):
        render(source)


def test_messages_are_not_changed():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    messages = [{"role": "Assistant", "content": None, "tool_calls": calls}]
    render("{{ messages[0].tool_calls[0].function.arguments.a }}", messages)
    assert messages == [{"role": "Assistant", "content": None, "tool_calls": calls}]
    assert calls[0]["function"]["arguments"] == '{"a": 1}'


def test_text_parts_become_one_string_for_templates_that_want_one():
    assert render(PRINT_ROLES, parts("one", "two")) == "[user:one\ntwo]"


@pytest.mark.parametrize(
    "source",
    [
        PRINT_PARTS,
        PRINT_PARTS.replace("m.content", "m['content']"),
        "{% macro show(content) %}{% for part in content %}<{{ part.type }} {{ part.text }}>{% endfor %}"
        "{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        "{% for m in messages %}{% set words = m.content %}{% for part in words %}"
        "<{{ part.type }} {{ part.text }}>{% endfor %}{% endfor %}",
    ],
)
def test_templates_that_loop_over_content_get_the_parts(source):
    assert render(source, parts("one", "two")) == "<text one><text two>"
    as_string = render(source, HI)  # wrapped in a part, unless the template takes strings too
    assert as_string == ("Hi" if "is string" in source else "<text Hi>")


@pytest.mark.parametrize(
    ("kind", "what"), [("image_url", "images"), ("input_audio", "audio"), ("video_url", "video")]
)
def test_media_on_a_text_model_is_refused(kind, what):
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:"}}]
    place = re.escape("messages[0].content[1]")
    with pytest.raises(InvalidRequestError, match=f"does not accept {what}: {place} is of type '{kind}'"):
        render(PRINT_ROLES, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"content": "x"}, r"messages\[0\].role must be a string"),
        (
            {"role": "user", "content": 3},
            r"messages\[0\].content must be a string or a list of parts, got int",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            r"messages\[0\].content\[0\] must be a part such as",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] must have a function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]},
            r"tool_calls\[0\].function.arguments must be a JSON object, got '{oops'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]},
            r"tool_calls\[0\].function.arguments is nested too deeply",
        ),
    ],
)
def test_a_malformed_message_is_named(message, sentence):
    with pytest.raises(InvalidRequestError, match=sentence):
        render(PRINT_ROLES, [message])
    with pytest.raises(InvalidRequestError, match="at least one message"):
        render(PRINT_ROLES, [])


def test_tool_call_arguments_are_parsed_for_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Zürich"}'}}
    bare = {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}}
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    assert render(source, [{"role": "assistant", "tool_calls": [call, bare]}]) == '{"city": "Zürich"}{}'


@pytest.mark.parametrize("num_tools", [1, 40])
def test_indented_json_grows_only_so_long(monkeypatch, num_tools):
    """Each level of nesting is indented on two lines, so that they are a square of what was sent."""
    monkeypatch.setattr(chat_template, "_MAX_CHARS", 20_000)
    deep: object = 1
    for _ in range(200 if num_tools == 1 else 20):
        deep = {"a": deep}
    tools = [{"type": "function", "deep": deep}] * num_tools
    assert len(str(tools)) < 10_000
    source = "{% for tool in tools %}{{ tool | tojson(INDENT) }}{% endfor %}"
    assert len(render(source.replace("INDENT", ""), tools=tools)) < 10_000
    with pytest.raises(InvalidRequestError, match="more than 20000 characters of these messages and tools"):
        render(source.replace("INDENT", "indent=4"), tools=tools)


def test_fields_that_say_nothing_are_absent():
    source = "{{ messages[0].name is defined }} {{ 'tool_calls' in messages[0] }} [{{ messages[0].content }}]"
    assert (
        render(source, [{"role": "user", "name": None, "tool_calls": [], "content": None}])
        == "False False []"
    )


def test_roles_are_lower_case_and_developer_is_system_unless_the_template_knows_it():
    messages = [{"role": "DEVELOPER", "content": "x"}]
    assert render(PRINT_ROLES, messages) == "[system:x]"
    assert render("{% if messages[0].role == 'developer' %}yes{% endif %}", messages) == "yes"


def test_tools_go_in_as_sent_or_bare_if_the_template_wants_that():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert render("{{ tools[0].function.name }}", tools=tools) == "f"
    assert render("{{ tools is none }}", tools=[]) == "True"
    wants_bare = (
        "{% if tools[0].name is not defined %}{{ raise_exception('no name') }}{% endif %}{{ tools[0].name }}"
    )
    assert render(wants_bare, tools=tools) == "f"
    with pytest.raises(InvalidRequestError, match="no name"):
        render(wants_bare, tools=[{"type": "function", "function": {}}])


def test_the_reply_can_begin_with_the_final_message():
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for content, beginning in [
        ("The capital", "The capital"),
        ("  kept as it is \n", "  kept as it is \n"),  # though templates trim what they print
        ([{"type": "text", "text": "The"}, {"type": "text", "text": "capital"}], "The\ncapital"),
        ("", ""),
        (None, ""),
    ]:
        messages = [*HI, {"role": "Assistant", "content": content}]
        for source in (
            BUILTIN_TEMPLATES["chatml"],
            BUILTIN_TEMPLATES["chatml"].replace("'] }}", "'] | trim }}"),
        ):
            for options in ({}, {"extra_kwargs": {"add_generation_prompt": False}}):
                assert render(source, messages, continue_final_message=True, **options) == prompt + beginning
    alone = render(BUILTIN_TEMPLATES["chatml"], messages[1:], continue_final_message=True)
    assert alone == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user", "content": "x"}, "the last message to be the assistant's, its role is 'user'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "its tool_calls cannot be kept"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "its reasoning_content cannot"),
    ],
)
def test_only_an_assistants_words_can_be_continued(message, sentence):
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        render(PRINT_ROLES, [*HI, message], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.download
@pytest.mark.parametrize("fixture", ["qwen", "smollm2"])
def test_with_real_templates_the_prompt_is_that_of_the_whole_turn_cut_off_after_the_words(fixture, request):
    template = load_chat_template(None, request.getfixturevalue(fixture))
    messages = [*HI, {"role": "assistant", "content": "The capital"}]
    turn = template.render(messages, add_generation_prompt=False)
    assert template.render(messages, continue_final_message=True) == turn[: turn.index("capital") + 7]


def test_extra_variables_cannot_replace_the_conversation():
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs must not set 'messages'"):
        render(PRINT_ROLES, extra_kwargs={"messages": []})


def test_the_template_can_be_chosen(tmp_path):
    tokenizer = byte_tokenizer(259)
    assert load_chat_template(None, tokenizer).render(HI) == "user: Hi\nassistant: "
    assert load_chat_template("chatml", tokenizer).source == BUILTIN_TEMPLATES["chatml"]
    assert load_chat_template("{{ bos_token }}", tokenizer).render(HI) == "<|bos|>"
    (tmp_path / "mine.jinja").write_text("from a file", encoding="utf-8")
    assert load_chat_template(str(tmp_path / "mine.jinja"), tokenizer).render(HI) == "from a file"
    with pytest.raises(ConfigError, match=r"must be a built-in name \(chatml\), a Jinja file .*got 'chatnl'"):
        load_chat_template("chatnl", tokenizer)
    with pytest.raises(ConfigError, match=r"not valid Jinja: .* \(line 1\)"):
        load_chat_template("{% if %}", tokenizer)


def test_a_model_without_a_template_says_how_to_give_it_one():
    with pytest.raises(InvalidRequestError, match=r"no chat template.*--chat-template"):
        ChatTemplate(None, "", "").render(HI)
