"""The /docs page: one self-contained HTML document made from the OpenAPI description.

Called by openapi.py. No scripts, no fonts, nothing from another host. Knows nothing of the app.
"""

from __future__ import annotations

from html import escape
from typing import Any

from jaxserve.server.schemas import (
    IGNORED_FIELDS,
    REFUSED_BY_ALL,
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
    REFUSED_BY_GENERATE,
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { padding: .8rem; border: 1px solid #8886; border-radius: 6px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; }
td, th { border-bottom: 1px solid #8884; }
summary { cursor: pointer; }
"""
_EXAMPLE = """curl http://localhost:30000/v1/chat/completions -H "Content-Type: application/json" \\
  -d '{"model": "MODEL", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'"""
_REFUSALS = {
    "Every generation route": REFUSED_BY_ALL,
    "/generate": REFUSED_BY_GENERATE,
    "/v1/chat/completions": REFUSED_BY_CHAT,
    "/v1/completions": REFUSED_BY_COMPLETIONS,
}


def render_page(api: dict[str, Any], model_name: str) -> str:
    """The whole page as HTML text."""
    schemas = api["components"]["schemas"]
    routes = "".join(_render_route_row(path, entry) for path, entry in api["paths"].items())
    bodies = "".join(
        _render_schema(name, schemas[name])
        for name in ("ChatBody", "CompletionBody", "GenerateBody", "SamplingBody", "AbortBody")
    )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>jaxserve API</title>"
        f"<style>{_STYLE}</style></head><body><h1>jaxserve</h1>"
        f"<p>Serving <code>{escape(model_name)}</code>. The same as JSON: "
        f"<a href='openapi.json'>openapi.json</a>.</p>"
        f"<pre>{escape(_EXAMPLE.replace('MODEL', model_name))}</pre>"
        f"<h2>Routes</h2><table><tr><th>Method</th><th>Path</th><th></th></tr>{routes}</table>"
        f"<h2>Request fields</h2>{bodies}"
        f"<h2>Refused fields</h2><p>A request that asks for one of these is answered 400, never served "
        f"without it.</p>{_render_refusals()}"
        f"<h2>Fields without effect</h2><p>{', '.join(f'<code>{name}</code>' for name in IGNORED_FIELDS)}</p>"
        f"</body></html>"
    )


def _render_route_row(path: str, entry: dict[str, Any]) -> str:
    methods = [method for method in entry if method != "parameters"]
    summary = entry[methods[0]]["summary"]
    names = ", ".join(method.upper() for method in methods)
    return f"<tr><td>{names}</td><td><code>{escape(path)}</code></td><td>{escape(summary)}</td></tr>"


def _render_schema(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{field}</code></td><td>{escape(_describe_type(entry))}</td>"
        f"<td>{'required' if field in schema.get('required', ()) else ''}</td></tr>"
        for field, entry in schema["properties"].items()
    )
    text = escape(schema.get("description", ""))
    return f"<details><summary><code>{name}</code> {text}</summary><table>{rows}</table></details>"


def _describe_type(entry: dict[str, Any]) -> str:
    """A schema in a few words: "integer or null", "list of string"."""
    if "anyOf" in entry:
        return " or ".join(_describe_type(option) for option in entry["anyOf"])
    if "$ref" in entry:
        return entry["$ref"].rpartition("/")[2]
    if entry.get("type") == "array":
        return f"list of {_describe_type(entry.get('items', {}))}"
    return str(entry.get("type", "anything"))


def _render_refusals() -> str:
    parts = []
    for title, refusals in _REFUSALS.items():
        shown = {k: v for k, v in refusals.items() if refusals is REFUSED_BY_ALL or k not in REFUSED_BY_ALL}
        rows = "".join(
            f"<tr><td><code>{name}</code></td><td>not supported {escape(remedy)}</td></tr>"
            for name, remedy in shown.items()
        )
        parts.append(f"<details><summary>{title}</summary><table>{rows}</table></details>")
    return "".join(parts)
