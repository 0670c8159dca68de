"""Fills the tables of docs/*.md from the code that they describe.

    python -m scripts.gen_docs            write the pages that have changed
    python -m scripts.gen_docs --check    write nothing; name the pages that are stale, with status 1

A page holds words, which people write there, and blocks between `<!-- begin NAME -->` and its `end`,
which are made here: settings, routes, fields, refusals, errors and metrics, each read from where the server
reads it. tests/test_docs.py makes the same check, so the pages cannot drift.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.config import FIELDS, allowed, flag_of
from jaxserve.cuda_flags import IGNORED_FLAGS
from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Ready
from jaxserve.errors import ERROR_KINDS, InvalidRequestError
from jaxserve.flags import shipped_configs
from jaxserve.metrics import ServerMetrics
from jaxserve.server.access import OPEN_PATHS
from jaxserve.server.errors import error_body
from jaxserve.server.openapi import ROUTES, describe_api
from jaxserve.server.replies import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    GenerateReply,
    Metadata,
    MetaInfo,
    PromptTokensDetails,
    Usage,
)
from jaxserve.server.schemas import (
    IGNORED_FIELDS,
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
    REFUSED_BY_GENERATE,
)
from jaxserve.types import EngineInfo, SamplingParams
from scripts import plan_table
from scripts.field_notes import FIELD_NOTES

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"<!-- begin (?P<name>[\w-]+) -->.*?<!-- end (?P=name) -->", re.DOTALL)
BODIES = {"chat": "ChatBody", "completions": "CompletionBody", "generate": "GenerateBody"}
REFUSALS = {
    "chat": REFUSED_BY_CHAT,
    "completions": REFUSED_BY_COMPLETIONS,
    "generate": REFUSED_BY_GENERATE,
}


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python -m scripts.gen_docs [--check]", file=sys.stderr)
        return 2
    stale = find_stale_pages()
    for path, text in stale.items():
        if argv:
            print(f"docs/{path.name} is stale: run python -m scripts.gen_docs", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{path.name}")
    return 1 if argv and stale else 0


def find_stale_pages() -> dict[Path, str]:
    """The pages that differ from what the code says now, with the text that they should have.

    Raises ValueError for a block of an unknown name, and for a block that no page holds.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    found = [name for text in texts.values() for name in BLOCK.findall(text)]
    wrong = set(found) ^ BLOCKS.keys()
    if wrong:
        raise ValueError(f"these blocks are not both in docs/ and in BLOCKS: {sorted(wrong)}")
    filled = {path: BLOCK.sub(_fill_block, text) for path, text in texts.items()}
    return {path: text for path, text in filled.items() if text != texts[path]}


def _fill_block(match: re.Match[str]) -> str:
    name = match["name"]
    return f"<!-- begin {name} -->\n\n{BLOCKS[name]()}\n\n<!-- end {name} -->"


def render_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(word: object) -> str:
    return f"`{word}`"


def code_list(words: Iterable[str]) -> str:
    return ", ".join(code(word) for word in words)


def render_json(value: Any) -> str:
    text = json.dumps(json.loads(msgspec.json.encode(value)), indent=2, ensure_ascii=False)
    return f"```json\n{text}\n```"


def render_configs() -> str:
    rows = [
        (f"[{name}](../configs/{name})", path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for name, path in shipped_configs().items()
    ]
    return render_table(("Config", "What it serves"), rows)


def render_settings() -> str:
    """One table a group of settings, in the order of config.py."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for name, setting in FIELDS.items():
        flag = flag_of(setting)
        match = re.fullmatch(r"(?P<text>.*?)(?: \[(?P<default>.+)\])?", flag.help)
        assert match is not None
        default = match["default"] or _show_default(setting.default)
        spellings = code_list(_flag_name(word) for word in (name, *flag.aliases))
        rows.setdefault(flag.group, []).append(
            (spellings, allowed(setting), default, _begin_sentence(match["text"], flag.choices))
        )
    head = ("Flag", "Takes", "Default", "Meaning")
    return "\n\n".join(
        f"### {group}\n\n{render_table(head, group_rows)}" for group, group_rows in rows.items()
    )


def _begin_sentence(text: str, choices: tuple[str, ...]) -> str:
    """With a capital letter, unless it begins with a value ("dummy: random weights")."""
    word, colon, rest = text.partition(":")
    return f"{code(word)}:{rest}" if colon and word in choices else text[:1].upper() + text[1:]


def _show_default(value: Any) -> str:
    if value is MISSING:
        return "required"
    return code(str(value).lower() if isinstance(value, bool) else value)


def _flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def render_ignored_flags() -> str:
    by_reason: dict[str, list[str]] = {}
    for name, ignored in IGNORED_FLAGS.items():
        by_reason.setdefault(ignored.reason, []).append(_flag_name(name))
    rows = [(reason[:1].upper() + reason[1:], code_list(names)) for reason, names in by_reason.items()]
    return render_table(("Why it has no meaning here", "Flags"), rows)


def render_routes() -> str:
    rows = [(route.tag, ", ".join(route.methods), code(route.path), route.summary) for route in ROUTES]
    return render_table(("", "Method", "Path", "What it does"), rows)


def render_operator_paths() -> str:
    paths = code_list(route.path for route in ROUTES if route.is_for_operators)
    return f"The orders are {paths}, and `/abort_request` with `abort_all`."


def render_fields() -> str:
    """One row a field of any generation route, with the routes that take it."""
    places = _field_places()
    unknown = places.keys() ^ FIELD_NOTES.keys()
    assert not unknown, f"FIELD_NOTES must name every field once: {sorted(unknown)}"
    rows = []
    for name, note in FIELD_NOTES.items():
        taken = places[name]
        marks = [taken.get(route, "") for route in BODIES]
        rows.append((code(name), taken["type"], *marks, _default_of(name, taken), note))
    return render_table(("Field", "Type", *BODIES, "Default", "Meaning"), rows)


def render_sample_fields() -> str:
    """The body of /v1/sample: each field says in its schema what it means."""
    fields = describe_api()["components"]["schemas"]["SampleBody"]["properties"]
    rows = [(code(name), describe_type(entry), entry["description"]) for name, entry in fields.items()]
    return render_table(("Field", "Type", "Meaning"), rows)


def _field_places() -> dict[str, dict[str, str]]:
    """By field: its type, and for each route that takes it a mark saying where it stands."""
    schemas = describe_api()["components"]["schemas"]
    places: dict[str, dict[str, str]] = {}
    for route, body in BODIES.items():
        for name, entry in schemas[body]["properties"].items():
            _add_place(places, name, entry, route, "yes")
    for name, entry in schemas["SamplingBody"]["properties"].items():
        if not _is_refused(entry):
            _add_place(places, name, entry, "generate", "sampling")
    return places


def _add_place(
    places: dict[str, dict[str, str]], name: str, entry: Mapping[str, Any], route: str, mark: str
) -> None:
    """Where routes differ in a type, the wider one is shown, or both."""
    kind = describe_type(entry)
    place = places.setdefault(name, {"type": kind})
    if place["type"] in kind:
        place["type"] = kind
    elif kind not in place["type"]:
        place["type"] = f"{place['type']} or {kind}"
    place[route] = mark


def _is_refused(entry: Mapping[str, Any]) -> bool:
    """Whether a field of SamplingBody is there only to be refused: those have no type."""
    return not entry.keys() & {"type", "anyOf", "$ref"}


def _default_of(name: str, taken: Mapping[str, str]) -> str:
    """SamplingParams' default, for the sampling fields; the others are explained in their notes."""
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    value = defaults.get(name)
    is_plain = isinstance(value, int | float) and "generate" in taken
    return code(str(value).lower() if isinstance(value, bool) else value) if is_plain else ""


def describe_type(entry: Mapping[str, Any]) -> str:
    """A JSON schema in a few words. Null is left out: it means the default everywhere."""
    if "anyOf" in entry:
        options = [describe_type(option) for option in entry["anyOf"] if option.get("type") != "null"]
        return " or ".join(sorted(options, key=lambda option: option.startswith("list")))
    if "$ref" in entry:
        return "object"
    if entry.get("type") == "array":
        item = describe_type(entry.get("items", {}))
        return f"list of ({item})" if " or " in item else f"list of {item}"
    return str(entry.get("type", "anything"))


def render_refusals() -> str:
    sampling = describe_api()["components"]["schemas"]["SamplingBody"]["properties"]
    in_sampling = {name: "by this version." for name, entry in sampling.items() if _is_refused(entry)}
    routes_by_refusal: dict[tuple[str, str], list[str]] = {}
    for route, refusals in {**REFUSALS, "generate": {**in_sampling, **REFUSED_BY_GENERATE}}.items():
        for name, remedy in refusals.items():
            routes_by_refusal.setdefault((name, remedy), []).append(route)
    rows = [
        (code(name), "all" if len(routes) == len(REFUSALS) else ", ".join(routes), f"not supported {remedy}")
        for (name, remedy), routes in routes_by_refusal.items()
    ]
    return render_table(("Field", "Routes", "The answer says"), rows)


def render_errors() -> str:
    responses = describe_api()["paths"]["/generate"]["post"]["responses"]
    rows = []
    for kind in ERROR_KINDS.values():
        response = responses.get(str(kind.http_status))
        if response is not None:
            status = (str(kind.http_status), code(kind.openai_type), code(kind.status_name))
            rows.append((*status, response["description"]))
    return render_table(("HTTP", "`type`", "`status`", "When"), rows)


def _make_error_body() -> Any:
    try:
        SamplingParams(temperature=-1.0).validate()
    except InvalidRequestError as error:
        return error_body(error)
    raise AssertionError("a negative temperature was accepted")


def _make_chat_reply() -> ChatCompletion:
    """The reply to the question of the quickstart, as Qwen2.5 gives it."""
    choice = ChatChoice(
        index=0,
        message=ChatMessage(content="The capital of France is Paris."),
        finish_reason="stop",
        matched_stop=151645,
    )
    usage = Usage(
        prompt_tokens=36,
        total_tokens=44,
        completion_tokens=8,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
    )
    return ChatCompletion(
        id="64203f0270f44633beffdf3d075b9002",
        created=1767061678,
        model="qwen2.5-0.5b-instruct",
        choices=[choice],
        usage=usage,
        metadata=Metadata(weight_version="default"),
    )


def _make_generate_reply() -> GenerateReply:
    meta_info = MetaInfo(
        id="9933b7fa47e944f1940a074cb0c95a44",
        finish_reason={"type": "length", "length": 2},
        prompt_tokens=5,
        weight_version="default",
        total_retractions=0,
        num_retractions=0,
        reasoning_tokens=0,
        completion_tokens=2,
        cached_tokens=0,
        cached_tokens_details={"device": 0, "host": 0},
        dp_rank=None,
        e2e_latency=0.25,
        response_sent_to_client_ts=1767061679.5,
    )
    return GenerateReply(text=" Paris.", output_ids=[12095, 13], meta_info=meta_info)


def render_metrics() -> str:
    """Every series of /metrics, from an exposition with an engine that has told its facts."""
    info = EngineInfo(**{field.name: _zero(str(field.type)) for field in dataclasses.fields(EngineInfo)})
    client = EngineClient()
    client.handle(Ready(info))
    text = ServerMetrics("model", client.engines).render().decode()
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.M))
    kinds = dict(re.findall(r"^# TYPE (\S+) (.*)$", text, re.M))
    rows = [(code(name), kinds[name], helps[name]) for name in sorted(helps) if not name.endswith("_created")]
    return render_table(("Series", "Type", "Meaning"), rows)


def _zero(kind: str) -> Any:
    return {"str": "", "int": 0, "float": 0.0}[kind]


BLOCKS: dict[str, Callable[[], str]] = {
    "configs": render_configs,
    "slices": lambda: render_table(plan_table.HEAD, plan_table.list_rows()),
    "settings": render_settings,
    "ignored-flags": render_ignored_flags,
    "routes": render_routes,
    "open-paths": lambda: f"No key is asked for on paths that begin with {code_list(OPEN_PATHS)}.",
    "operator-paths": render_operator_paths,
    "fields": render_fields,
    "sample-fields": render_sample_fields,
    "refused-fields": render_refusals,
    "ignored-fields": lambda: code_list(sorted(IGNORED_FIELDS)) + ".",
    "chat-reply": lambda: render_json(_make_chat_reply()),
    "generate-reply": lambda: render_json(_make_generate_reply()),
    "errors": render_errors,
    "error-body": lambda: render_json(_make_error_body()),
    "metrics": render_metrics,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
