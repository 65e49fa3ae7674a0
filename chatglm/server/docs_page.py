"""/docs: the OpenAPI description as a page of plain HTML, without scripts and without other sites' files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

EXAMPLES = {
    "/v1/chat/completions": {"model": "MODEL", "messages": [{"role": "user", "content": "你好"}]},
    "/v1/completions": {"model": "MODEL", "prompt": "你好"},
    "/v1/embeddings": {"model": "MODEL", "input": "你好"},
    "/": {"prompt": "你好", "history": []},
    "/stream": {"prompt": "你好", "history": []},
    "/load_model": {"model": "MODEL"},
}
INTRODUCTION = (
    "Replace MODEL by what /v1/models tells. With an API key every request but /health carries "
    'the header Authorization: Bearer KEY. Errors are {"error": {"message", "type", "param", "code"}}. '
    "The whole description for programs is /openapi.json."
)


def docs_page(openapi: dict[str, Any], url: str) -> str:
    """The page for an OpenAPI description; `url` is where the server was reached."""
    routes = [
        (path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    parts = "".join(_route(openapi, url, *route) for route in routes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(openapi["info"]["title"])}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="static/icon.svg">'
        '<link rel="stylesheet" href="static/docs.css">'
        f"<h1>{escape(openapi['info']['title'])}</h1><p>{escape(INTRODUCTION)}</p>{parts}</html>\n"
    )


def _route(openapi: dict[str, Any], url: str, path: str, method: str, operation: dict[str, Any]) -> str:
    text = escape(operation.get("description", ""))
    fields = "".join(_field(*field) for field in _fields(openapi, operation))
    table = f"<table><tr><th>field<th>type<th>meaning</tr>{fields}</table>" if fields else ""
    example = escape(_curl(url, path, method))
    return f'<h2>{method.upper()} {escape(path)}</h2><p>{text}</p><pre tabindex="0">{example}</pre>{table}'


def _curl(url: str, path: str, method: str) -> str:
    if path not in EXAMPLES or method != "post":
        return f"curl {url}{path}"
    body = json.dumps(EXAMPLES[path], ensure_ascii=False)
    return f"curl {url}{path} -H 'Content-Type: application/json' -d '{body}'"


def _fields(openapi: dict[str, Any], operation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    content = operation.get("requestBody", {}).get("content", {})
    for described in content.values():
        schema = _resolved(openapi, described["schema"])
        for name, field in schema.get("properties", {}).items():
            required = ", required" if name in schema.get("required", []) else ""
            yield name, _type(openapi, field) + required, field.get("description", "")


def _type(openapi: dict[str, Any], field: dict[str, Any]) -> str:
    kinds = [_type(openapi, kind) for kind in field.get("anyOf", []) if kind.get("type") != "null"]
    if kinds:
        return " or ".join(kinds)
    if "$ref" in field:
        properties = _resolved(openapi, field).get("properties", {})
        return "{" + ", ".join(properties) + "}"
    if field.get("type") == "array":
        return f"list of {_type(openapi, field['items'])}"
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    least = f" from {low:.12g}" if low is not None and abs(low) < 1e9 else ""
    most = f" to {high:.12g}" if high is not None and abs(high) < 1e9 else ""
    return field.get("type", "") + least + most


def _resolved(openapi: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return openapi["components"]["schemas"][name] if name else schema


def _field(name: str, kind: str, meaning: str) -> str:
    return f"<tr><td>{escape(name)}<td>{escape(kind)}<td>{escape(meaning)}</tr>"
