"""The page of the routes under /v1/lola, from their OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tools.site.docstrings import split

HEAD = """# HTTP routes

This page is made of the OpenAPI document, which a server has at `/openapi.json`. The routes are
those that lola-vllm adds; vLLM's own are in vLLM's documentation.
[Serving](../serving.md#routes) and [sessions](../sessions.md) have examples.

Every route takes `Authorization: Bearer KEY` where the server has a key. Errors have the form of
OpenAI's: `{"error": {"message": ..., "type": ..., "param": ..., "code": 400}}`.
"""
# Bodies that extend one of vLLM's: only what is new is listed.
EXTENDED = {
    "SessionChatRequest": ("ChatCompletionRequest", "/v1/chat/completions"),
    "SessionCompletionRequest": ("CompletionRequest", "/v1/completions"),
    "LibraryChatRequest": ("ChatCompletionRequest", "/v1/chat/completions"),
    "LibraryCompletionRequest": ("CompletionRequest", "/v1/completions"),
}


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the routes alone, without a server."""
    from fastapi import FastAPI
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from lola_vllm.serving.plugin import ROUTERS

    app = FastAPI()
    for routes in ROUTERS:
        app.include_router(routes)
    document = app.openapi()
    for model in (ChatCompletionRequest, CompletionRequest):  # to tell what is vLLM's
        document["components"]["schemas"].setdefault(model.__name__, model.model_json_schema())
    return document


def page() -> str:
    """Markdown with a section for every route, and one for every body and answer."""
    document = openapi()
    schemas = document["components"]["schemas"]
    used: list[str] = []
    lines = [HEAD]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            lines += _route(f"{method.upper()} {path}", route, used)
    lines.append("## Bodies and answers\n")
    for name in used:  # grows as fields name other schemas
        lines += _schema(name, schemas, used)
    return "\n".join(lines)


def _route(title: str, route: dict[str, Any], used: list[str]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{split(route.get('description', ''))['']}\n"
    rows = [
        (item["name"], item["in"], _type(item["schema"], used), item.get("description", ""))
        for item in route.get("parameters", ())
    ]
    if rows:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        yield from (
            f"| `{name}` | {where} | {kind} | {words} |" for name, where, kind, words in rows
        )
        yield ""
    if "requestBody" in route:
        yield f"Body: {_content(route['requestBody'], used)}\n"
    for status, answer in route["responses"].items():
        if status == "200":
            yield f"Answer: {_content(answer, used)}\n"
    refusals = [status for status in route["responses"] if status not in ("200", "422")]
    if refusals:
        yield f"Refusals: {', '.join(refusals)}\n"


def _content(answer: dict[str, Any], used: list[str]) -> str:
    kinds = []
    for media, how in answer.get("content", {}).items():
        kind = _type(how.get("schema", {}), used)
        kinds.append(kind if media == "application/json" else f"`{media}`")
    return ", ".join(kinds) or "empty"


def _schema(name: str, schemas: dict[str, Any], used: list[str]) -> Iterator[str]:
    schema = schemas[name]
    yield f"### {_short(name)}\n"
    yield f"{split(schema.get('description', ''))['']}\n"
    fields = dict(schema.get("properties", {}))
    if name in EXTENDED:
        base, route = EXTENDED[name]
        own = schemas[base]["properties"]
        fields = {k: v for k, v in fields.items() if k not in own or k in ("prompt", "messages")}
        yield f"Besides these fields it has those of `{route}`.\n"
    words = _words(_short(name), fields)
    yield "| field | type | default | |\n|---|---|---|---|"
    for field, how in fields.items():
        required = field in schema.get("required", ())
        default = "required" if required else f"`{json.dumps(how.get('default'))}`"
        said = words.get(field) or how.get("description", "")
        yield f"| `{field}` | {_type(how, used)} | {default} | {said} |"
    yield ""


def _words(name: str, fields: dict[str, Any]) -> dict[str, str]:
    """What the docstrings of a class and of its bases say about fields.

    There several fields may share a line: "total: in the pool. used: held now."
    """
    from lola_vllm.serving import protocol
    from lola_vllm.serving.library import protocol as libraries
    from lola_vllm.serving.sessions import protocol as sessions

    kind = next(getattr(m, name) for m in (libraries, sessions, protocol) if hasattr(m, name))
    found: dict[str, str] = {}
    for base in getattr(kind, "__mro__", ()):
        section = split(base.__dict__.get("__doc__") or "").get("Attributes", "")
        parts = re.split(
            rf"(?:^|(?<=\. ))({'|'.join(fields)})(?:, \w+)?: ", " ".join(section.split())
        )
        for field, text in zip(parts[1::2], parts[2::2], strict=True):
            found.setdefault(field, text.strip().replace("|", "\\|"))
    return found


def _short(name: str) -> str:
    """A schema's name without the module that parts it from one of vLLM's."""
    return name.rpartition("__")[2]


def _type(schema: dict[str, Any], used: list[str]) -> str:
    """A JSON schema in a few words; what it names is added to `used`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if re.match("(Chat)?Completion", name):
            return "vLLM's own"
        if name not in used:
            used.append(name)
        return f"[{_short(name)}](#{_short(name).lower()})"
    options = schema.get("anyOf") or schema.get("oneOf")
    if options and len(options) > 4:  # a message of a chat, which has many kinds
        return "object"
    if options:
        return " or ".join(dict.fromkeys(_type(option, used) for option in options))
    kind = schema.get("type", "any")
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}), used)}"
    bounds = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
        "exclusiveMaximum": "below", "maxLength": "characters: at most",
        "maxItems": "items: at most",
    }  # fmt: skip
    words = [f"{text} {schema[key]:,.10g}" for key, text in bounds.items() if key in schema]
    if "enum" in schema:
        words.append(", ".join(f"`{value}`" for value in schema["enum"]))
    return " ".join([kind, *([f"({'; '.join(words)})"] if words else [])]).replace("|", "\\|")
